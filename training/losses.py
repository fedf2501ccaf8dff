"""The losses of EDM and CTM, as named terms."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch

from diffusers_ctm.trajectory import Preconditioning, append_dims, edm_loss_weight, jump

from .time_sampling import Times


Solver = Callable[[torch.Tensor, torch.Tensor, int], torch.Tensor]
Distance = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


def l2_distance(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Mean squared difference of each sample, shape (B,)."""
    return (a - b).square().flatten(1).mean(1)


def pseudo_huber_distance(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """sqrt(|a - b|^2 + c^2) - c of each sample, shape (B,), c = 0.00054 sqrt(dimensions) (Song & Dhariwal 2024, Section 3.3)."""
    difference = (a - b).flatten(1)
    c = 0.00054 * difference.shape[1] ** 0.5
    return (difference.square().sum(1) + c**2).sqrt() - c


DISTANCES: dict[str, Distance] = {"l2": l2_distance, "pseudo_huber": pseudo_huber_distance}


def dsm_loss(denoised: torch.Tensor, x_0: torch.Tensor, sigma: torch.Tensor, sigma_data: float) -> torch.Tensor:
    """Denoising score matching with EDM's weight, shape (B,) (Karras et al. 2022, Eq. 2 and Table 1)."""
    return edm_loss_weight(sigma, sigma_data) * l2_distance(denoised, x_0)


def adaptive_weight(reference_gradient: torch.Tensor, gradient: torch.Tensor, largest: float = 1e4) -> torch.Tensor:
    """|reference_gradient| / |gradient|, at most `largest`: makes two losses pull equally at a layer (CTM, Eq. 12; VQGAN)."""
    return (reference_gradient.norm() / (gradient.norm() + 1e-4)).clamp(max=largest).detach()


@dataclass
class CTMLoss:
    """Named terms of a step. `backward` has the gradient of `trajectory + dsm_weight * dsm`, not its value."""

    trajectory: torch.Tensor
    dsm: torch.Tensor
    dsm_weight: torch.Tensor
    backward: torch.Tensor


def jump_where_needed(
    jump_network: Callable[..., torch.Tensor], x: torch.Tensor, needed: torch.Tensor, *per_sample: torch.Tensor | None
) -> torch.Tensor:
    """`jump_network(x[i], ...)` for the samples `needed` (indices), `x` unchanged for the others, for which the jump is the identity.

    `per_sample` tensors of shape (B, ...) are indexed alike, None stays None.
    """
    if len(needed) == 0:
        return x
    if len(needed) == len(x):
        return jump_network(x, *per_sample)
    rows = needed.to(x.device, non_blocking=True)
    jumped = jump_network(x[rows], *(None if value is None else value[rows] for value in per_sample))
    return x.index_copy(0, rows, jumped)


def ctm_loss(
    student: torch.nn.Module,
    student_ema: torch.nn.Module,
    solver: Solver,
    preconditioning: Preconditioning,
    grid: torch.Tensor,
    times: Times,
    x_0: torch.Tensor,
    noise: torch.Tensor,
    dsm_sigma: torch.Tensor,
    dsm_noise: torch.Tensor,
    last_weight: torch.Tensor,
    class_labels: torch.Tensor | None = None,
    distance: Distance = l2_distance,
    inner_target: str = "ema",
    dsm_weight: float = 1.0,
    dsm_adaptive: bool = True,
    reduce_gradient: Callable[[torch.Tensor], torch.Tensor] = lambda gradient: gradient,
) -> CTMLoss:
    """CTM's trajectory loss and denoising score matching (Kim et al. 2024, Eqs. 9, 10 and 12), with no avoidable network calls.

        estimate = G_ema(G_student(x_t, t, s), s, sigma_min)
        target   = G_ema(G_ema(Solver(x_t, t, u), u, s), s, sigma_min)

    Outer jumps from s = sigma_min and the inner target's from u = s are the identity and are not computed. The student sees both
    losses' inputs in one batch. The trajectory loss goes backward through the averaged network once: the gradient at the student's
    jump serves the adaptive weight and the update.

    Args:
        student: the network that learns, maybe wrapped for several processes.
        student_ema: its moving average, which gets no gradient.
        solver: `solver(x_t, index, k)` takes each sample k levels down the grid from its index along the teacher's trajectory. Called
            in inference mode.
        preconditioning: of student and average.
        grid: descending levels, shape (N,), on the device.
        times: indices into it.
        x_0: clean samples in [-1, 1], shape (B, C, H, W). noise, dsm_noise: standard normal, likewise.
        dsm_sigma: levels of score matching, shape (B,).
        last_weight: the weight at which gradients are compared.
        distance: of two batches, shape (B,).
        inner_target: "ema" (the paper) or "live" (the authors' code), the network of the jump from u to s.
        dsm_weight: times the adaptive weight if `dsm_adaptive`. 0 leaves score matching out.
        reduce_gradient: mean over processes, so that all use one adaptive weight.
    """
    batch = len(x_0)
    sigma_min_index = len(grid) - 1
    index = {name: getattr(times, name).to(grid.device, non_blocking=True) for name in "tus"}
    t, u, s = (grid[index[name]] for name in "tus")
    end = grid[-1].expand(batch)
    outer = (times.s < sigma_min_index).nonzero().flatten()
    inner = (times.u < times.s).nonzero().flatten()

    def condition(labels: torch.Tensor | None) -> dict[str, torch.Tensor]:
        return {} if labels is None else {"class_labels": labels}

    def ema_jump(x, t, s, labels):
        return preconditioning.jump(student_ema, x, t, s, **condition(labels))

    def inner_jump(x, t, s, labels):
        network = student_ema if inner_target == "ema" else student
        return preconditioning.jump(network, x, t, s, **condition(labels))

    # 1. The student, on both losses' inputs at once.
    x_t = x_0 + append_dims(t, x_0.ndim) * noise
    with_dsm = dsm_weight > 0
    if with_dsm:
        x_sigma = x_0 + append_dims(dsm_sigma, x_0.ndim) * dsm_noise
        labels = None if class_labels is None else class_labels.repeat(2)
        g = preconditioning.g(
            student,
            torch.cat([x_t, x_sigma]),
            torch.cat([t, dsm_sigma]),
            torch.cat([s, dsm_sigma]),
            **condition(labels),
        )
        g, denoised = g.split(batch)
    else:
        g = preconditioning.g(student, x_t, t, s, **condition(class_labels))
    x_s = jump(x_t, g, t, s)

    # 2. The target.
    with torch.inference_mode():
        x_u = solver(x_t, index["t"], times.solver_steps)
    x_u = x_u.clone()  # an ordinary tensor again, which autograd may save
    with torch.no_grad():
        target = jump_where_needed(inner_jump, x_u, inner, u, s, class_labels)
        target = jump_where_needed(ema_jump, target, outer, s, end, class_labels)

    # 3. The trajectory loss, and its gradient at the student's jump.
    x_s_leaf = x_s.detach().requires_grad_()
    estimate = jump_where_needed(ema_jump, x_s_leaf, outer, s, end, class_labels)
    trajectory = distance(estimate, target).mean()
    # Gradients of a mean over all pixels are too small for fp16 on their way through the network.
    magnify = 2.0 ** round(math.log2(x_0.numel()))
    (gradient,) = torch.autograd.grad(magnify * trajectory, x_s_leaf)
    gradient = gradient / magnify
    backward = (x_s * gradient).sum()
    if not with_dsm:
        zero = torch.zeros_like(trajectory)
        return CTMLoss(trajectory.detach(), zero, zero, backward)

    # 4. Score matching, weighted.
    dsm = (preconditioning.loss_weight(dsm_sigma) * l2_distance(denoised, x_0)).mean()
    weight = torch.full_like(dsm, dsm_weight)  # made on the device: nothing waits for it
    if dsm_adaptive:
        (trajectory_gradient,) = torch.autograd.grad(x_s, last_weight, magnify * gradient, retain_graph=True)
        (dsm_gradient,) = torch.autograd.grad(magnify * dsm, last_weight, retain_graph=True)
        gradients = [reduce_gradient(value / magnify) for value in (trajectory_gradient, dsm_gradient)]
        weight = weight * adaptive_weight(*gradients)
    return CTMLoss(trajectory.detach(), dsm.detach(), weight, backward + weight * dsm)
