# Copyright 2026 The diffusers-ctm authors. Licensed under the Apache License, Version 2.0.
"""What lies in a pool of trajectories, what is drawn from it, and that neither a split nor a pause changes it."""

import math

import pytest
import torch

from helpers.comparing import seeded
from helpers.exact import GaussianData, levels_like, randn
from training.objective.objectives import ObjectiveOptions
from training.objective.pool import TrajectoryPool
from training.objective.solvers import SOLVERS
from training.objective.times import TimeSampler


STD = 0.5
SAMPLER = TimeSampler(9)
TOTAL, SHAPE = 4, (1, 2, 2)  # samples of a step
MEANS = torch.tensor([-1.0, 0.0, 2.0])  # of the classes
WHOLE = (slice(0, TOTAL),)


def teacher(x, t, labels):
    """The exact denoiser of classes with their own means."""
    return GaussianData(STD, 0.0 if labels is None else levels_like(MEANS[labels], x)).denoiser(x, t)


def pool_of(own=WHOLE, sampler=SAMPLER, total=TOTAL, **options):
    config = ObjectiveOptions(**{"pool_size": 3, "pool_refresh": 2, **options})
    return TrajectoryPool(config, SOLVERS["heun"], sampler, total, own, torch.device("cpu"))


def images(step, total=TOTAL, shape=SHAPE):
    """Classes, images of these and noise of a whole step."""
    labels = torch.randint(3, (total,), generator=seeded(step))
    x_0 = levels_like(MEANS[labels], randn(1, 1, 1, 1)) + STD * randn(total, *shape, seed=1000 + step)
    return labels, x_0.float(), randn(total, *shape, seed=2000 + step).float()


def draw(pool, step, own=WHOLE[0], classes=True, sampler=SAMPLER, total=TOTAL, shape=SHAPE):
    labels, x_0, noise = images(step, total, shape)
    labels = labels[own] if classes else None
    return pool.draw(step, own, x_0[own], labels, lambda: noise[own], teacher, sampler, seeded(3000 + step))


def error(pool):
    """Largest distance of the pool's states from the exact trajectories through their first states."""
    apart = 0.0
    for slot, start in enumerate(pool.starts.tolist()):
        means = levels_like(MEANS[pool.labels[slot]], pool.states[slot, :, 0])
        for place in range(start, 9):
            levels = SAMPLER.level(torch.tensor([start, place]))
            exact = GaussianData(STD, means).jump(pool.states[slot, :, start], *levels)
            apart = max(apart, (pool.states[slot, :, place] - exact).abs().max().item())
    return apart


def test_states_lie_on_the_teachers_trajectories_of_their_class():
    """To Heun's order: a substep of half the length, a quarter of the error."""
    errors = []
    for substeps in (4, 8, 16):
        pool = pool_of(pool_substeps=substeps)
        for step in range(5):
            draw(pool, step)
        errors.append(error(pool))
    assert errors[-1] < 0.01
    assert [math.log2(a / b) for a, b in zip(errors, errors[1:])] == pytest.approx([2, 2], abs=0.4)


def test_what_is_drawn_is_of_one_trajectory_with_its_class():
    pool = pool_of(pool_substeps=8, pool_from_data=0.5)
    for step in range(40):
        times, x_t, x_u, labels = draw(pool, step)
        exact = GaussianData(STD, levels_like(MEANS[labels], x_t)).jump(x_t, times.t.float(), times.u.float())
        torch.testing.assert_close(x_u, exact, rtol=0, atol=0.06)
        assert (times.u < times.t).all() and (times.s <= times.u).all()
    times, x_t, x_u, labels = draw(pool_of(), 0, classes=False)
    assert labels is None and (x_t != x_u).all()


def test_the_newest_replaces_the_oldest_when_it_is_due():
    """A new one of each sample in the first three steps, and then in every second."""
    pool, born = pool_of(), {}
    for step in range(10):
        before = pool.states.clone() if step else torch.zeros(3, TOTAL, 9, *SHAPE)
        draw(pool, step)
        changed = [slot for slot in range(3) if not torch.equal(pool.states[slot], before[slot])]
        if step in (0, 1, 2, 4, 6, 8):
            oldest = len(born) if len(born) < 3 else min(born, key=born.get)
            assert changed == [oldest]
            born[oldest] = step
            torch.testing.assert_close(pool.states[oldest, :, 0], images(step)[1] + 80 * images(step)[2])
            assert torch.equal(pool.labels[oldest], images(step)[0])
        else:
            assert changed == []


def run(splits, steps, pools=None, **options):
    """What the samples of each step are, drawn by one pool of each of `splits`, each a list of passes."""
    pools = pools or [pool_of(own, **options) for own in splits]
    drawn = []
    for step in steps:
        parts = [(own, draw(pool, step, own)) for pool, passes in zip(pools, splits) for own in passes]
        parts = [part for _, part in sorted(parts, key=lambda pair: pair[0].start)]
        times = [torch.cat([getattr(part[0], name) for part in parts]) for name in "tus"]
        drawn += [*times, *(torch.cat([part[index] for part in parts]) for index in (1, 2, 3))]
    return pools, drawn


def same(first, second):
    return all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


ONE, PASSES = [WHOLE], [(slice(0, 2), slice(2, 4))]
PROCESSES = [(slice(0, 2),), (slice(2, 4),)]
BOTH = [(slice(0, 1), slice(2, 3)), (slice(1, 2), slice(3, 4))]  # passes of two processes


@pytest.mark.parametrize("splits", [PASSES, PROCESSES, BOTH], ids=["passes", "processes", "both"])
def test_a_split_draws_the_same(splits):
    options = {"pool_from_data": 0.4}
    assert same(run(splits, range(9), **options)[1], run(ONE, range(9), **options)[1])


def whole_state(pools):
    """The state as each process writes it: a gather joins the rows of all, which are asked for in the same order."""
    asked = []
    pools[-1].state_dict(lambda rows: asked.append(rows) or rows)
    given = iter(asked)
    return pools[0].state_dict(lambda rows: torch.cat([rows, next(given)]) if len(pools) > 1 else rows)


@pytest.mark.parametrize("before", [ONE, PASSES, PROCESSES, BOTH], ids=["one", "passes", "processes", "both"])
@pytest.mark.parametrize("after", [ONE, BOTH], ids=["one", "both"])
@pytest.mark.parametrize("pause", [2, 5])
def test_a_saved_pool_goes_on_in_any_split(before, after, pause):
    """The pause is before the pool is full, or between two refreshes."""
    options = {"pool_from_data": 0.4}
    _, expected = run(ONE, range(pause + 5), **options)
    pools, drawn = run(before, range(pause), **options)
    state = whole_state(pools)
    resumed = [pool_of(own, **options) for own in after]
    for pool in resumed:
        pool.load_state_dict(state)
    assert same(drawn + run(after, range(pause, pause + 5), resumed)[1], expected)


def test_an_empty_pool_is_saved():
    pool = pool_of()
    pool.load_state_dict(pool_of().state_dict(lambda rows: rows))
    assert same(run(ONE, range(3), [pool])[1], run(ONE, range(3))[1])


def test_starts_from_data_have_their_level():
    """x_0 + t n of the newest trajectories: a share of them at levels below sigma_max, all levels but the last."""
    total, shape = 64, (1, 8, 8)
    pool = pool_of((slice(0, total),), total=total, pool_size=1, pool_refresh=1, pool_from_data=0.3)
    starts = []
    for step in range(60):
        draw(pool, step, slice(0, total), False, total=total, shape=shape)
        start = pool.starts[0].item()
        starts.append(start)
        level = SAMPLER.level(torch.tensor(start)).item()
        labels, x_0, _ = images(step, total, shape)
        noise = (pool.states[0, :, start] - x_0) / level
        assert noise.std().item() == pytest.approx(1, abs=0.06)
    assert sum(start > 0 for start in starts) == 18 and set(starts) <= set(range(8)) and len(set(starts)) > 5


def test_draws_are_independent_and_uniform():
    """Which of its trajectories a sample gets: uniform, and another sample's choice says nothing about it."""
    sampler = TimeSampler(2)
    pool = pool_of(sampler=sampler, pool_refresh=10**6)
    for step in range(3):
        draw(pool, step, sampler=sampler)
    counts = torch.zeros(3, 3)
    for step in range(10, 910):
        which = chosen(pool, step, sampler)
        counts[which[0], which[1]] += 1
    torch.testing.assert_close(counts / 900, torch.full((3, 3), 1 / 9), rtol=0, atol=0.04)


def chosen(pool, step, sampler):
    """Which trajectory each sample got, found by its first state."""
    _, x_t, _, _ = draw(pool, step, sampler=sampler)
    return (pool.states[:, :, 0] == x_t).flatten(2).all(2).int().argmax(0)
