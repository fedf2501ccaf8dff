import pytest
import torch

from diffusers_ctm.trajectory import karras_sigmas
from training.objective.times import TimeSampler, draw_half_lognormal_sigma, draw_lognormal_sigma


GRID = karras_sigmas(18, dtype=torch.float64)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def places(levels):
    """Place on the ramp of 18 Karras levels: 0 for sigma_max, 17 for sigma_min."""
    top, bottom = 80 ** (1 / 7), 0.002 ** (1 / 7)
    return (levels ** (1 / 7) - top) / (bottom - top) * 17


def many(draws=3000, batch=64, **options):
    sampler, source = TimeSampler(18, max_steps=options.pop("max_steps", 17), **options), generator()
    return [sampler.draw(batch, source) for _ in range(draws)]


def gather(draws, *names):
    return [torch.cat([getattr(times, name) for times in draws]) for name in names]


@pytest.mark.parametrize("per_sample", [False, True])
@pytest.mark.parametrize("distribution", ["weighted", "uniform"])
def test_number_of_solver_steps(distribution, per_sample):
    draws = many(4000, batch=2, max_steps=4, distribution=distribution, per_sample=per_sample)
    steps = torch.stack([times.steps for times in draws])
    counts = torch.bincount(steps[:, 0], minlength=5) / len(steps)
    expected = torch.tensor([0, 1, 2, 3, 4]) / 10 if distribution == "weighted" else torch.tensor([0, 1, 1, 1, 1]) / 4
    torch.testing.assert_close(counts, expected, atol=0.03, rtol=0)
    alike = (steps[:, 0] == steps[:, 1]).float().mean().item()
    assert alike == (pytest.approx(expected.square().sum().item(), abs=0.03) if per_sample else 1)


def test_soft_matching_draws_as_the_authors():
    draws = many()
    t, u, s, k = gather(draws, "t", "u", "s", "steps")
    t, u, s = (places(levels) for levels in (t, u, s))
    assert ((t - t.round()).abs() < 1e-6).all() and ((s - s.round()).abs() < 1e-6).all()
    t, u, s = (place.round().long() for place in (t, u, s))
    assert (u == t + k).all() and (t >= 0).all() and (u <= s).all() and (s <= 17).all()
    assert k.float().mean().item() == pytest.approx(35 / 3, abs=0.2)  # (2M + 1) / 3
    # 49.6 % of the outer jumps, and as many inner ones, are identities: the share that is not computed.
    outer = sum(len(times.outer) for times in draws) / len(s)
    inner = sum(len(times.inner) for times in draws) / len(s)
    assert outer == pytest.approx(0.504, abs=0.02) and inner == pytest.approx(0.504, abs=0.02)
    # Given k, t is uniform over the levels that stay on the grid, and s over those from u on.
    three = k == 3
    torch.testing.assert_close(torch.bincount(t[three]) / three.sum(), torch.full((15,), 1 / 15), atol=0.02, rtol=0)
    from_ten = three & (u == 10)
    torch.testing.assert_close(
        torch.bincount(s[from_ten])[10:] / from_ten.sum(), torch.full((8,), 1 / 8), atol=0.06, rtol=0
    )


def test_levels_are_those_of_the_grid_and_the_ends_are_exact():
    sampler = TimeSampler(18)
    torch.testing.assert_close(sampler.level(torch.arange(18)), GRID, rtol=1e-12, atol=0)
    assert sampler.level(torch.tensor([0, 17])).tolist() == [80.0, 0.002]


def test_local_and_global_matching():
    for times in many(50, matching="local"):
        assert (times.steps == 1).all() and (places(times.u) - places(times.t) - 1).abs().max() < 1e-6
    seen = torch.cat([places(times.s) for times in many(50, matching="local")])
    assert set(seen.round().int().tolist()) == set(range(1, 18))
    seen = set()
    for times in many(200, matching="global", distribution="uniform"):
        assert torch.equal(times.s, times.u) and len(times.inner) == 0
        seen.add(int(times.steps[0]))
    assert seen == set(range(1, 18))


@pytest.mark.parametrize("options", [{}, {"per_sample": True}, {"per_path": 4}, {"per_path": 2, "per_sample": True}])
@pytest.mark.parametrize("continuous", [False, True])
@pytest.mark.parametrize("substeps", [1, 3])
def test_paths_lead_from_t_to_u(options, continuous, substeps):
    for times in many(20, batch=8, continuous=continuous, substeps=substeps, **options):
        of_path = torch.arange(8) // times.per_path
        assert times.per_path == options.get("per_path", 1)
        assert torch.equal(times.path[times.first, of_path], times.t)
        assert torch.equal(times.path[times.last, of_path], times.u)
        assert (times.s <= times.u).all() and (times.u < times.t).all() and (times.s >= 0.002).all()
        assert (times.first >= 0).all() and (times.last <= times.steps[of_path]).all()
        assert torch.equal(times.first[:: times.per_path], torch.zeros(len(times.steps)).long())
        assert torch.equal(times.last[:: times.per_path], times.steps)
        # Steps are as long as those of the grid over `substeps`, and a path that is done stays.
        lengths = places(times.path).diff(dim=0)
        going = torch.arange(len(lengths))[:, None] < times.steps
        torch.testing.assert_close(lengths[going], torch.full_like(lengths[going], 1 / substeps), rtol=0, atol=1e-6)
        assert (lengths[~going] == 0).all()
        assert (times.steps % substeps == 0).all()


def test_parts_of_a_path_are_drawn_as_whole_ones_and_lie_anywhere_in_it():
    draws = many(3000, batch=16, max_steps=4, per_path=4)
    first, last = gather(draws, "first", "last")
    k = torch.cat([times.steps.repeat_interleave(4) for times in draws])
    others = (torch.arange(len(k)) % 4 != 0) & (k == 4)
    length = (last - first)[others]
    torch.testing.assert_close(
        torch.bincount(length) / len(length), torch.tensor([0, 1, 2, 3, 4]) / 10, atol=0.02, rtol=0
    )
    starts = first[others][length == 2]
    torch.testing.assert_close(torch.bincount(starts) / len(starts), torch.full((3,), 1 / 3), atol=0.03, rtol=0)


def test_continuous_times_are_the_grids_without_rounding():
    draws = many(1500, continuous=True, max_steps=1)
    t, u, s = (places(levels) for levels in gather(draws, "t", "u", "s"))
    assert t.unique().numel() > 10000
    # Rounded they are uniform over the places of the grid, as discrete ones are; the ends have half a place's weight, exactly there.
    rounded = torch.bincount(t.round().long()) / len(t)
    torch.testing.assert_close(rounded, torch.full((17,), 1 / 17), atol=0.01, rtol=0)
    assert (gather(draws, "t")[0] == 80).float().mean().item() == pytest.approx(0.5 / 17, abs=0.005)
    near = (u > 8) & (u < 9)  # 17 - u + 1 = 9.5 places on average
    at_end = (gather(draws, "s")[0] == 0.002)[near].float().mean().item()
    assert at_end == pytest.approx(0.5 * sum(1 / (18 - p) for p in (8.25, 8.5, 8.75)) / 3, abs=0.006)
    assert ((s - u)[near] < 1e-9).float().mean().item() == pytest.approx(at_end, abs=0.01)


@pytest.mark.parametrize("options", [{}, {"per_sample": True}, {"per_path": 2, "per_sample": True}])
def test_slices_keep_the_sample(options):
    times = TimeSampler(18, max_steps=17, **options).draw(8, generator())
    part = times[2:6]
    for name in ("t", "u", "s", "first", "last"):
        assert torch.equal(getattr(part, name), getattr(times, name)[2:6])
    paths = slice(2 // times.per_path, 6 // times.per_path)
    assert torch.equal(part.path, times.path[:, paths]) and torch.equal(part.steps, times.steps[paths])


def test_times_of_a_consistency_model_end_at_sigma_min():
    times = TimeSampler(18).draw_to_end(500, generator())
    assert (times.u == 0.002).all() and torch.equal(times.s, times.u) and len(times.outer) == len(times.inner) == 0
    assert set(places(times.t).round().int().tolist()) == set(range(17))
    assert torch.equal(times.path, torch.stack([times.t, times.u])) and (times.steps == 1).all()


def test_levels_of_score_matching():
    noise = torch.randn(20000, generator=generator())
    sigma = draw_lognormal_sigma(noise)
    assert sigma.log().mean().item() == pytest.approx(-1.2, abs=0.03)
    assert sigma.log().std().item() == pytest.approx(1.2, abs=0.03)
    mixed = draw_half_lognormal_sigma(noise, torch.rand(20000, generator=generator(1)), 0.002, 80.0, 7.0)
    torch.testing.assert_close(mixed[::2], sigma[::2])
    high = mixed[1::2]
    assert high.min().item() == pytest.approx(0.318, abs=0.01) and high.max().item() == pytest.approx(80, rel=0.02)
    assert high.median().item() == pytest.approx(8.5, abs=0.5)
