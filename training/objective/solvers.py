"""The teacher's solvers from t to u, each with its name, its evaluations and its function in one record."""

from collections.abc import Callable

import torch

from diffusers_ctm.trajectory import append_dims, heun_step, jump


Denoiser = Callable[..., torch.Tensor]


def heun_solve(
    denoiser: Denoiser,
    x: torch.Tensor,
    levels: torch.Tensor,
    steps: torch.Tensor,
    class_labels: torch.Tensor | None = None,
) -> list[torch.Tensor]:
    """Heun's method down `levels`, two evaluations a step (Karras et al. 2022, Algorithm 1).

    Args:
        denoiser: D(x, sigma) or, with labels, D(x, sigma, class_labels), sigma of shape (B,).
        x: states at levels[0], shape (B, ...).
        levels: shape (K + 1, B), descending along the first dimension, none of them 0; on the device of `x`.
        steps: number of steps of each sample, shape (B,), int64 on the CPU, from 1 to K. Samples that are done cost nothing.
        class_labels: shape (B,).

    Returns the states at each row of `levels`, K + 1 tensors like `x`; a sample stays at its last.
    """

    def step(state, x, t, t_next, labels):
        return None, heun_step(lambda x, sigma: denoiser(x, sigma, *labels), x, t, t_next)

    return _solve(step, x, levels, steps, class_labels)


def dpm_solve(
    denoiser: Denoiser,
    x: torch.Tensor,
    levels: torch.Tensor,
    steps: torch.Tensor,
    class_labels: torch.Tensor | None = None,
) -> list[torch.Tensor]:
    """DPM-Solver++(2M) down `levels`, one evaluation a step (Lu et al. 2022, Algorithm 2).

    Order 2 from the second step on: D along a step is extrapolated from the last two evaluations, linearly in ln(level). The first step
    is the jump with D. Arguments and result as of `heun_solve`.
    """

    def step(state, x, t, t_next, labels):
        denoised, log_step = denoiser(x, t, *labels), (t / t_next).log()
        estimate = denoised
        if state is not None:
            before, log_step_before = (value[: len(x)] for value in state)
            ratio = append_dims(log_step / (2 * log_step_before), x.ndim)
            estimate = denoised + ratio * (denoised - before)
        return (denoised, log_step), jump(x, estimate, t, t_next)

    return _solve(step, x, levels, steps, class_labels)


def unipc_solve(
    denoiser: Denoiser,
    x: torch.Tensor,
    levels: torch.Tensor,
    steps: torch.Tensor,
    class_labels: torch.Tensor | None = None,
) -> list[torch.Tensor]:
    """UniPC down `levels`: order 3, one evaluation a step and one more (Zhao et al. 2023, Algorithm 1), started by Heun's method.

    A step is predicted as by `dpm_solve`, D is evaluated at the prediction, and the step is done once more with D interpolated through it. That
    evaluation is the next step's too. The first step is Heun's, so that one step alone is what `heun_solve` gives: students of UniPC's own first
    step, which errs the other way on a coarse grid, were worse in several steps (README). Arguments and result as of `heun_solve`.
    """

    def step(state, x, t, t_next, labels):
        log_step = (t / t_next).log()
        if state is None:
            seen = []

            def denoise(x, sigma):
                seen.append(denoiser(x, sigma, *labels))
                return seen[-1]

            x_next = heun_step(denoise, x, t, t_next)
            denoised, after = seen
            return (after, denoised, log_step), x_next
        denoised, before, log_step_before = (value[: len(x)] for value in state)
        ratio = append_dims(log_step_before / log_step, x.ndim)
        predicted = jump(x, denoised + (denoised - before) / (2 * ratio), t, t_next)
        after = denoiser(predicted, t_next, *labels)

        # Weights of y and y (y - 1) in the integral of e^(h (y - 1)) h dy over the step, y from 0 to 1.
        h = append_dims(log_step, x.ndim)
        linear = 1 + torch.expm1(-h) / h
        square = 1 - 2 * linear / h
        bend = (before - denoised + ratio * (after - denoised)) / (ratio * (ratio + 1))
        change = linear * (after - denoised) + (square - linear) * bend
        return (after, denoised, log_step), jump(x, denoised, t, t_next) + change

    return _solve(step, x, levels, steps, class_labels)


def _solve(step, x, levels, steps, class_labels):
    """Take each sample its number of steps; those with the most come first, so that the ones still going are a leading part."""
    order = None
    if (steps != steps[0]).any():
        order = steps.argsort(descending=True, stable=True)
        back = order.argsort().to(x.device, non_blocking=True)
        steps, order = steps[order], order.to(x.device, non_blocking=True)
        x, levels = x[order], levels[:, order]
        class_labels = None if class_labels is None else class_labels[order]
    labels = () if class_labels is None else (class_labels,)
    states, state = [x], None
    for row in range(int(steps[0])):
        going = int((steps > row).sum())
        x, t, t_next = states[-1][:going], levels[row, :going], levels[row + 1, :going]
        state, x = step(state, x, t, t_next, tuple(value[:going] for value in labels))
        states.append(torch.cat([x, states[-1][going:]]) if going < len(steps) else x)
    return states if order is None else [x[back] for x in states]


SOLVERS = {"heun": heun_solve, "dpm": dpm_solve, "unipc": unipc_solve}


def evaluations(solver: str, steps: torch.Tensor) -> torch.Tensor:
    """Evaluations of the denoiser that `steps` of a solver take, in the shape of `steps`."""
    return {"heun": 2 * steps, "dpm": steps, "unipc": steps + 1}[solver]
