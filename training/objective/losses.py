"""CTM's loss as named terms; the gradient at the jump in a small class of its own."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch

from diffusers_ctm.preconditioning import Preconditioning, edm_loss_weight
from diffusers_ctm.trajectory import append_dims, jump

from .times import Times


Solver = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None], list[torch.Tensor]]

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
    """Named terms of a step. `backward` has the gradient of `trajectory + generator_weight * generator + dsm_weight * dsm`, not its value.

    `dsm_samples`, shape (B,), are the losses of which `dsm` is the mean; None without score matching.
    """

    trajectory: torch.Tensor
    dsm: torch.Tensor
    dsm_weight: torch.Tensor
    generator: torch.Tensor
    generator_weight: torch.Tensor
    backward: torch.Tensor
    dsm_samples: torch.Tensor | None = None


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


@dataclass
class Jumps:
    """The jumps of a step's samples: student and average with their conditions.

    Args:
        student: the network that learns, maybe wrapped for several processes.
        student_ema: its moving average, which gets no gradient.
        preconditioning: of both.
        times: of the samples.
        t, u, s: its levels like the samples, shape (B,), on their device.
        class_labels: shape (B,), or None.
    """

    student: torch.nn.Module
    student_ema: torch.nn.Module
    preconditioning: Preconditioning
    times: Times
    t: torch.Tensor
    u: torch.Tensor
    s: torch.Tensor
    class_labels: torch.Tensor | None

    def by(self, network: torch.nn.Module) -> Callable[..., torch.Tensor]:
        """`jump(x, t, s, class_labels)` by `network`."""
        return lambda x, t, s, labels: self.preconditioning.jump(network, x, t, s, **condition(labels))

    def to_end(self, x_s: torch.Tensor) -> torch.Tensor:
        """G_ema(x_s, s, sigma_min), where that is not the identity."""
        end = torch.full_like(self.s, self.times.end)
        return jump_where_needed(self.by(self.student_ema), x_s, self.times.outer, self.s, end, self.class_labels)

    def target(self, x_u: torch.Tensor, inner_target: str) -> torch.Tensor:
        """G_ema(G(x_u, u, s), s, sigma_min) without gradient, G by the average ("ema") or the student ("live")."""
        network = self.student_ema if inner_target == "ema" else self.student
        with torch.no_grad():
            x_s = jump_where_needed(self.by(network), x_u, self.times.inner, self.u, self.s, self.class_labels)
            return self.to_end(x_s)


def condition(labels: torch.Tensor | None) -> dict[str, torch.Tensor]:
    """Keyword arguments of a network."""
    return {} if labels is None else {"class_labels": labels}


def make_jumps(
    student: torch.nn.Module,
    student_ema: torch.nn.Module,
    preconditioning: Preconditioning,
    times: Times,
    like: torch.Tensor,
    class_labels: torch.Tensor | None,
) -> Jumps:
    """`Jumps` with levels in dtype and device of `like`, and each sample with the label of the image that its path starts from."""
    t, u, s = torch.stack([times.t, times.u, times.s]).to(like.dtype).to(like.device, non_blocking=True)
    if class_labels is not None and times.per_path > 1:
        class_labels = class_labels[:: times.per_path].repeat_interleave(times.per_path)
    return Jumps(student, student_ema, preconditioning, times, t, u, s, class_labels)


def solve_paths(
    solver: Solver, times: Times, x_0: torch.Tensor, noise: torch.Tensor, class_labels: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """(x_t, x_u): each path starts from the noisy image of its first sample and is solved once for all its samples.

    Without sharing, x_t = x_0 + t noise. No gradient.
    """
    shared = times.per_path
    path = times.path.to(x_0.dtype).to(x_0.device, non_blocking=True)
    x = x_0[::shared] + append_dims(path[0], x_0.ndim) * noise[::shared]
    labels = None if class_labels is None else class_labels[::shared]
    with torch.inference_mode():
        states = solver(x, path, times.steps, labels)
        if shared == 1:
            x_u = states[-1]
        else:
            states = torch.stack(states)
            of_path = torch.arange(len(x_0), device=x_0.device) // shared
            x, x_u = (states[rows.to(x_0.device, non_blocking=True), of_path] for rows in (times.first, times.last))
            x = x.clone()
    return x, x_u.clone()  # ordinary tensors again, which autograd may save


def ctm_estimate(jumps: Jumps, x_0: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
    """G_ema(G_student(x_t, t, s), s, sigma_min) without gradient: what the discriminator's step is shown as fake.

    x_t = x_0 + t noise; the samples of one path have image and noise of its first, as in `solve_paths`, but no solver is asked.
    """
    shared = jumps.times.per_path
    if shared > 1:
        x_0, noise = (value[::shared].repeat_interleave(shared, dim=0) for value in (x_0, noise))
    with torch.no_grad():
        x_t = x_0 + append_dims(jumps.t, x_0.ndim) * noise
        return jumps.to_end(jumps.by(jumps.student)(x_t, jumps.t, jumps.s, jumps.class_labels))


def ctm_loss(
    student: torch.nn.Module,
    student_ema: torch.nn.Module,
    solver: Solver,
    preconditioning: Preconditioning,
    times: Times,
    x_0: torch.Tensor,
    noise: torch.Tensor,
    dsm_sigma: torch.Tensor,
    dsm_noise: torch.Tensor,
    last_weight: torch.Tensor | Callable[[], torch.Tensor],
    class_labels: torch.Tensor | None = None,
    distance: Distance = l2_distance,
    inner_target: str = "ema",
    dsm_weight: float = 1.0,
    dsm_adaptive: bool = True,
    generator_loss: Callable[[torch.Tensor], torch.Tensor] | None = None,
    generator_weight: Callable[[torch.Tensor, torch.Tensor], torch.Tensor] = adaptive_weight,
    reduce_gradient: Callable[[torch.Tensor], torch.Tensor] = lambda gradient: gradient,
) -> CTMLoss:
    """CTM's loss: trajectory, score matching, adversarial (Kim et al. 2024, Eqs. 9 to 12), with no avoidable network calls.

        estimate = G_ema(G_student(x_t, t, s), s, sigma_min)
        target   = G_ema(G_ema(Solver(x_t, t, u), u, s), s, sigma_min)

    Outer jumps from s = sigma_min and the inner target's from u = s are the identity and are not computed. The student sees both
    losses' inputs in one batch. Each loss on the estimate goes backward through the averaged network once: its gradient at the student's
    jump serves the adaptive weight and the update.

    Args:
        student: the network that learns, maybe wrapped for several processes.
        student_ema: its moving average, which gets no gradient.
        solver: `solver(x, levels, steps, class_labels)` gives the states of the teacher's trajectories, as those of `training.solver`.
            Called in inference mode.
        preconditioning: of student and average.
        times: of each sample.
        x_0: clean samples in [-1, 1], shape (B, C, H, W). noise, dsm_noise: standard normal, likewise.
        dsm_sigma: levels of score matching, shape (B,).
        last_weight: the weight at which gradients are compared. A function is asked for it after the student's pass: a network that is spread
            over processes has it whole only then.
        distance: of two batches, shape (B,).
        inner_target: "ema" (the paper) or "live" (the authors' code), the network of the jump from u to s.
        dsm_weight: times the adaptive weight if `dsm_adaptive`. 0 leaves score matching out.
        generator_loss: of the estimate, the adversarial term; None leaves it out.
        generator_weight: of the gradients of the trajectory loss and of `generator_loss` at `last_weight`.
        reduce_gradient: mean over processes, so that all use one adaptive weight.
    """
    batch = len(x_0)
    jumps = make_jumps(student, student_ema, preconditioning, times, x_0, class_labels)
    t, s = jumps.t, jumps.s
    x_t, x_u = solve_paths(solver, times, x_0, noise, class_labels)

    # 1. The student, on both losses' inputs at once.
    with_dsm = dsm_weight > 0
    if with_dsm:
        x_sigma = x_0 + append_dims(dsm_sigma, x_0.ndim) * dsm_noise
        labels = None if class_labels is None else torch.cat([jumps.class_labels, class_labels])
        g = preconditioning.g(
            student,
            torch.cat([x_t, x_sigma]),
            torch.cat([t, dsm_sigma]),
            torch.cat([s, dsm_sigma]),
            **condition(labels),
        )
        g, denoised = g.split(batch)
    else:
        g = preconditioning.g(student, x_t, t, s, **condition(jumps.class_labels))
    x_s = jump(x_t, g, t, s)
    last_weight = last_weight() if callable(last_weight) else last_weight

    # 2. The losses at time 0, and their gradients at the student's jump.
    target = jumps.target(x_u, inner_target)
    x_s_leaf = x_s.detach().requires_grad_()
    estimate = jumps.to_end(x_s_leaf)
    # Gradients of a mean over all pixels are too small for fp16 on their way through the network.
    magnify = 2.0 ** round(math.log2(x_0.numel()))

    def at_jump(loss: torch.Tensor, last: bool) -> torch.Tensor:
        (gradient,) = torch.autograd.grad(magnify * loss, estimate)  # frees the graph of the loss
        (gradient,) = torch.autograd.grad(estimate, x_s_leaf, gradient, retain_graph=not last)
        return gradient / magnify

    def at_last_layer(output: torch.Tensor, gradient: torch.Tensor) -> torch.Tensor:
        (gradient,) = torch.autograd.grad(output, last_weight, magnify * gradient, retain_graph=True)
        return reduce_gradient(gradient / magnify)

    trajectory = distance(estimate, target).mean()
    gradient = at_jump(trajectory, last=generator_loss is None)
    compares = generator_loss is not None or (with_dsm and dsm_adaptive)
    trajectory_gradient = at_last_layer(x_s, gradient) if compares else None

    zero = torch.zeros_like(trajectory)
    generator, weight_of_generator = zero, zero
    if generator_loss is not None:
        generator = generator_loss(estimate)
        of_generator = at_jump(generator, last=True)
        weight_of_generator = generator_weight(trajectory_gradient, at_last_layer(x_s, of_generator))
        gradient = gradient + weight_of_generator * of_generator
    backward = (x_s * gradient).sum()

    # 3. Score matching.
    dsm, weight_of_dsm, dsm_samples = zero, zero, None
    if with_dsm:
        dsm_samples = preconditioning.loss_weight(dsm_sigma) * l2_distance(denoised, x_0)
        dsm = dsm_samples.mean()
        dsm_samples = dsm_samples.detach()
        weight_of_dsm = torch.full_like(dsm, dsm_weight)  # made on the device: nothing waits for it
        if dsm_adaptive:
            weight_of_dsm = weight_of_dsm * adaptive_weight(
                trajectory_gradient, at_last_layer(dsm, torch.ones_like(dsm))
            )
        backward = backward + weight_of_dsm * dsm
    terms = (trajectory, dsm, weight_of_dsm, generator, weight_of_generator)
    return CTMLoss(*(term.detach() for term in terms), backward, dsm_samples)
