# Copyright 2026 The diffusers-ctm authors. Licensed under the Apache License, Version 2.0.
"""The distribution of (t, u, s), and of the levels of score matching."""

import pytest
import torch

from diffusers_ctm.trajectory import karras_sigmas
from helpers.comparing import seeded
from training.objective.times import TimeSampler, draw_half_lognormal_sigma, draw_lognormal_sigma


GRID = karras_sigmas(18, dtype=torch.float64)


def places(levels):
    """Place on the ramp of 18 Karras levels: 0 for sigma_max, 17 for sigma_min."""
    top, bottom = 80 ** (1 / 7), 0.002 ** (1 / 7)
    return (levels ** (1 / 7) - top) / (bottom - top) * 17


def many(draws, batch=64, **options):
    sampler, source = TimeSampler(18, **options), seeded()
    return [sampler.draw(batch, source) for _ in range(draws)]


def test_number_of_solver_steps():
    """P(k) ~ k, the authors'."""
    steps = torch.tensor([times.solver_steps for times in many(2000, batch=2, max_steps=4)])
    torch.testing.assert_close(torch.bincount(steps) / len(steps), torch.arange(5) / 10, atol=0.03, rtol=0)


def test_soft_matching_draws_as_the_authors():
    draws = many(1000, batch=192)
    t, u, s = (torch.cat([getattr(times, name) for times in draws]) for name in "tus")
    k = torch.tensor([times.solver_steps for times in draws]).repeat_interleave(192)
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
    local = many(50, matching="local")
    assert all(times.solver_steps == 1 for times in local)
    assert set(torch.cat([places(times.s) for times in local]).round().int().tolist()) == set(range(1, 18))
    every = many(200, matching="global")
    assert all(torch.equal(times.s, times.u) and len(times.inner) == 0 for times in every)
    assert {times.solver_steps for times in every} >= set(range(5, 18))


def test_paths_lead_from_t_to_u_along_the_grid():
    for times in many(20, batch=8):
        assert torch.equal(times.path[0], times.t) and torch.equal(times.path[-1], times.u)
        assert (times.s <= times.u).all() and (times.u < times.t).all() and (times.s >= 0.002).all()
        lengths = places(times.path).diff(dim=0)
        torch.testing.assert_close(lengths, torch.ones_like(lengths), rtol=0, atol=1e-6)
        part = times[2:6]
        assert torch.equal(part.path, times.path[:, 2:6]) and torch.equal(part.s, times.s[2:6])


def test_times_of_a_consistency_model_end_at_sigma_min():
    times = TimeSampler(18).draw_to_end(500, seeded())
    assert (times.u == 0.002).all() and torch.equal(times.s, times.u) and len(times.outer) == len(times.inner) == 0
    assert set(places(times.t).round().int().tolist()) == set(range(17)) and times.solver_steps == 1


def test_times_on_known_trajectories():
    """For each sample P(k) ~ k up to what its trajectory has, t uniform over the places that are left, s below u."""
    first = torch.tensor([0.0, 0.0, 12.0, 16.0]).repeat(6000)
    for options, most in (({"max_steps": 4}, 4), ({"matching": "global"}, 5), ({"matching": "local"}, 1)):
        times = TimeSampler(18, **options).draw_known(first, seeded())
        t, u = times.places
        torch.testing.assert_close(times.path, TimeSampler(18).level(times.places), rtol=0, atol=0)
        assert (t >= first).all() and (u <= 17).all() and (times.u >= times.s).all() and times.solver_steps == 1
        k = u - t
        assert (k[first == 16] == 1).all() and (k[first == 0].max() > 5) == (options == {"matching": "global"})
        late = first == 12
        shares = torch.arange(1, most + 1).double()
        counts = torch.bincount(k[late], minlength=most + 1)[1:].double()
        torch.testing.assert_close(counts / counts.sum(), shares / shares.sum(), rtol=0, atol=0.02)
        one = late & (k == 1)
        torch.testing.assert_close(torch.bincount(t[one])[12:] / one.sum(), torch.full((5,), 0.2), rtol=0, atol=0.05)
        assert torch.equal(times.s, times.u) == (options == {"matching": "global"})


def test_times_between_the_levels():
    """Of two uniform places t is the smaller and s the larger; u is uniform between; 30 % of the s are the end."""
    times = TimeSampler(18).draw_between(40000, seeded())
    assert (times.t >= times.u).all() and (times.u >= times.s).all()
    assert times.t.max() <= 80 and times.s.min() == 0.002 and times.places is None
    t, u, s = (places(levels) / 17 for levels in (times.t, times.u, times.s))
    ends = times.s == 0.002
    assert ends.double().mean().item() == pytest.approx(0.3, abs=0.01)
    for value, mean, square in ((t, 1 / 3, 1 / 6), (s[~ends], 2 / 3, 1 / 2), ((u - t) / (s - t), 1 / 2, 1 / 3)):
        assert value.mean().item() == pytest.approx(mean, abs=0.01)
        assert value.square().mean().item() == pytest.approx(square, abs=0.01)


def test_levels_of_score_matching():
    noise = torch.randn(20000, generator=seeded())
    sigma = draw_lognormal_sigma(noise)
    assert sigma.log().mean().item() == pytest.approx(-1.2, abs=0.03)
    assert sigma.log().std().item() == pytest.approx(1.2, abs=0.03)
    mixed = draw_half_lognormal_sigma(noise, torch.rand(20000, generator=seeded(1)), 0.002, 80.0, 7.0)
    torch.testing.assert_close(mixed[::2], sigma[::2])
    high = mixed[1::2]
    assert high.min().item() == pytest.approx(0.318, abs=0.01) and high.max().item() == pytest.approx(80, rel=0.02)
    assert high.median().item() == pytest.approx(8.5, abs=0.5)
