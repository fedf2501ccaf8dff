import pytest
import torch

from training.time_sampling import (
    draw_half_lognormal_sigma,
    draw_lognormal_sigma,
    draw_solver_steps,
    draw_times,
)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def many(matching, distribution="weighted", draws=3000, batch=64, levels=18, most=17):
    source = generator()
    return [draw_times(batch, levels, matching, most, distribution, source) for _ in range(draws)]


@pytest.mark.parametrize("distribution", ["weighted", "uniform"])
def test_number_of_solver_steps(distribution):
    source = generator()
    counts = torch.bincount(
        torch.tensor([draw_solver_steps(4, distribution, source) for _ in range(8000)]), minlength=5
    )
    expected = torch.tensor([0, 1, 2, 3, 4]) / 10 if distribution == "weighted" else torch.tensor([0, 1, 1, 1, 1]) / 4
    torch.testing.assert_close(counts / 8000, expected, atol=0.02, rtol=0)


def test_soft_matching_draws_as_the_authors():
    draws = many("soft")
    t, u, s = (torch.cat([getattr(times, name) for times in draws]) for name in "tus")
    k = torch.tensor([times.solver_steps for times in draws]).repeat_interleave(64)
    assert (u == t + k).all() and (t >= 0).all() and (u <= s).all() and (s <= 17).all()
    assert k.float().mean().item() == pytest.approx(35 / 3, abs=0.2)  # (2M + 1) / 3
    # 49.6 % of the outer jumps, and as many inner ones, are identities: the share that is not computed.
    assert (s == 17).float().mean().item() == pytest.approx(0.496, abs=0.02)
    assert (s == u).float().mean().item() == pytest.approx(0.496, abs=0.02)
    # Given k, t is uniform over the levels that stay on the grid, and s over those from u on.
    three = k == 3
    torch.testing.assert_close(torch.bincount(t[three]) / three.sum(), torch.full((15,), 1 / 15), atol=0.02, rtol=0)
    from_ten = three & (u == 10)
    torch.testing.assert_close(
        torch.bincount(s[from_ten])[10:] / from_ten.sum(), torch.full((8,), 1 / 8), atol=0.06, rtol=0
    )


def test_local_and_global_matching():
    for times in many("local", draws=50):
        assert times.solver_steps == 1 and (times.u == times.t + 1).all()
    assert {s for times in many("local", draws=50) for s in times.s.tolist()} == set(range(1, 18))
    seen = set()
    for times in many("global", "uniform", draws=200):
        assert (times.s == times.u).all()
        seen.add(times.solver_steps)
    assert seen == set(range(1, 18))


def test_slices_keep_the_sample():
    times = draw_times(8, 18, "soft", 17, "weighted", generator())
    part = times[2:4]
    assert part.solver_steps == times.solver_steps and (part.s == times.s[2:4]).all() and (part.t == times.t[2:4]).all()


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
