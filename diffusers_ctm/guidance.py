# Copyright 2026 The diffusers-ctm authors. Licensed under the Apache License, Version 2.0.
"""Guidance by a loss, classifier-free guidance, a network told no class (ClassAverage)."""

import math
from collections.abc import Callable, Sequence
from contextvars import ContextVar
from numbers import Real
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from .checks import NotFiniteError, as_number, check_choice, check_differentiable, sum_of
from .preconditioning import condition
from .scheduling_karras import preconditioning_of


GUIDANCE_INPUTS = ("prediction", "image", "noisy")

# The number of classes of the network that is guided now. Threads may share a guidance, and pipelines too.
_NUM_CLASSES: ContextVar[int | None] = ContextVar("_NUM_CLASSES", default=None)


class Guidance:
    """Base of guidance by a loss: subclass it, write `loss`, and pass an instance as `pipe(..., guidance=...)`.

    What the loss sees, and what a network call of the sampler then costs besides the loss itself:

    - `on="prediction"`: g(x_t, t, s), which the sampler computes anyway: the denoiser's output D in `EDMHeunScheduler`,
      in `CTMScheduler` the clean sample that the jump from t to s moves towards. 1 evaluation with backward pass.
    - `on="image"`: the jump to sigma_min, a sharp image also early on; a CTM only. 2 evaluations, one of them with
      backward pass; where the sampler jumps to sigma_min itself it is "prediction".
    - `on="noisy"`: x_t itself, for losses that know noise: exact, if the loss is -log p(y | x_t). 1 evaluation, no
      backward pass.

    The first two replace the mean of p(y | x_0) over x_0 given x_t by its value at an estimate of x_0 (as Chung et al.
    2023 do). That is exact for a linear loss and normal data. A curved loss is overstated the more the noise; it may
    allow for that by `sigma` (docs/guidance.md says how, with measurements). "image" keeps a bias at gamma = 0 however
    short the steps.

    A loss may not use tensors made inside `torch.inference_mode()`, which autograd refuses; the pipeline's own may be.
    A loss without a gradient is an error. If the gradient is 0 for all images at all steps, the pipeline warns that
    nothing was guided. Gradients are per sample and reach x_t alone, never the parameters of a network
    (`pipe.unet.requires_grad_(False)` saves their memory).

    Args:
        scale: of the loss; 0 is no guidance, 1 the posterior if the loss is -log p(y | x_0), more sharpens it.
        on: what the loss sees.
    """

    scale: float = 1.0  # also of a subclass that has its own `__init__`
    on: str = "prediction"

    def __init__(self, scale: float = 1.0, on: str = "prediction"):
        scale = as_number(scale)
        if not isinstance(scale, (int, float)) or not math.isfinite(scale):
            raise ValueError(f"scale must be a finite number, got {scale!r}.")
        check_choice("on", on, GUIDANCE_INPUTS)
        self.scale, self.on = scale, on

    def prepare(self, num_classes: int | None) -> None:
        """Called by the pipeline before the first step, with its network's number of classes, None without classes."""

    def loss(self, x_0: torch.Tensor, sigma: torch.Tensor, class_labels: torch.Tensor | None) -> torch.Tensor:
        """How far each sample is from what is wanted, -log p(y | x_0) up to a constant; shape (B,), differentiable.

        Args:
            x_0: estimate of the clean sample, decoded if the pipeline has a `vae` (x_t if `on="noisy"`), float32 of
                shape (B, C, H, W), images in [-1, 1].
            sigma: noise level of x_t, shape (B,).
            class_labels: what the network is conditioned on, shape (B,); None if it is unconditional.
        """
        raise NotImplementedError("A subclass of Guidance writes `loss`.")


class LossGuidance(Guidance):
    """Guidance by a function of the clean image.

    Args:
        fn: called as `fn(x_0)` with images in [-1, 1] of shape (B, C, H, W); returns one differentiable loss each,
            shape (B,).
        scale, on: see `Guidance`.
    """

    def __init__(self, fn: Callable[[torch.Tensor], torch.Tensor], scale: float = 1.0, on: str = "prediction"):
        super().__init__(scale, on)
        self.fn = fn

    def loss(self, x_0: torch.Tensor, sigma: torch.Tensor, class_labels: torch.Tensor | None) -> torch.Tensor:
        return self.fn(x_0)


class ClassifierGuidance(Guidance):
    """Guidance towards a class: the loss is the cross entropy of a classifier (Dhariwal & Nichol 2021).

    Args:
        classifier: in evaluation mode, called as `classifier(x_0)` with images in [-1, 1], or as
            `classifier(x_t, sigma)`, sigma of shape (B,), if `on="noisy"`: a classifier of noisy images. Returns
            logits of shape (B, classes), or an object with `logits`.
        target: class of each image by the classifier's numbers, one for all or one each. None: the pipeline's
            `class_labels`, for a classifier of as many classes as the network has.
        scale, on: see `Guidance`.
    """

    def __init__(
        self,
        classifier: Callable[..., torch.Tensor],
        target: int | Sequence[int] | torch.Tensor | None = None,
        scale: float = 1.0,
        on: str = "prediction",
    ):
        super().__init__(scale, on)
        self.classifier = classifier
        with torch.inference_mode(False):  # autograd keeps no tensor that was made in inference mode
            self.target = None if target is None else torch.as_tensor(target, device="cpu").clone()

    def loss(self, x_0: torch.Tensor, sigma: torch.Tensor, class_labels: torch.Tensor | None) -> torch.Tensor:
        logits = classifier_logits(self.classifier, x_0, *([sigma] if self.on == "noisy" else []))
        target = class_labels if self.target is None else self.target
        if target is None:
            raise ValueError(
                "ClassifierGuidance needs a `target`: the network is unconditional, there are no class_labels."
            )
        if self.target is None:
            check_same_classes(logits, _NUM_CLASSES.get(), "Pass `target` in the classifier's own numbers")
        target = check_classes(target, len(x_0), logits.shape[1]).to(logits.device)
        return F.cross_entropy(logits, target, reduction="none")


def classifier_logits(classifier: Callable[..., Any], x: torch.Tensor, *sigma: torch.Tensor) -> torch.Tensor:
    """Logits of shape (B, classes), float32 or wider; ValueError if the classifier returns something else."""
    logits = classifier(x, *sigma)
    logits = getattr(logits, "logits", logits)
    if not torch.is_tensor(logits) or logits.ndim != 2 or len(logits) != len(x) or not logits.is_floating_point():
        got = f"{logits.dtype} of shape {tuple(logits.shape)}" if torch.is_tensor(logits) else type(logits).__name__
        raise ValueError(f"The classifier must return logits, floats of shape ({len(x)}, classes), got {got}.")
    return logits.float() if logits.dtype in (torch.float16, torch.bfloat16) else logits


def check_same_classes(logits: torch.Tensor, num_classes: int | None, remedy: str) -> None:
    """Raise ValueError if `logits` (B, classes) have another number of classes than the network."""
    if num_classes is not None and logits.shape[1] != num_classes:
        raise ValueError(
            f"The classifier knows {logits.shape[1]} classes and the network {num_classes}, so that a number means "
            f"another class to each. {remedy}, or a classifier of the network's classes."
        )


def check_classes(target: torch.Tensor, batch_size: int, num_classes: int) -> torch.Tensor:
    """`target`, one class or one each, as int64 of shape (B,). Raises ValueError if the classifier does not know it."""
    if target.is_floating_point() or target.dtype == torch.bool:
        raise ValueError(f"The classes to guide towards must be whole numbers, got {target.dtype}.")
    if target.ndim > 1 or (target.ndim == 1 and len(target) not in (1, batch_size)):
        raise ValueError(
            f"The classes to guide towards have shape {tuple(target.shape)} for {batch_size} images; pass one or "
            f"{batch_size}."
        )
    wrong = target[(target < 0) | (target >= num_classes)]
    if len(wrong):
        raise ValueError(
            f"The classifier knows classes 0 to {num_classes - 1}, and {wrong[0].item()} was asked. Pass `target` in "
            "the classifier's own numbers, or a classifier of the checkpoint's classes."
        )
    return target.long().expand(batch_size)


def guidance_weight(t: float, s: float, estimate: float, sigma_data: float) -> float:
    """Weight w of the shift in g, g' = g + w grad_x log p(y | x_0), for a jump from t to s.

    The gradient is taken through x_0 = g(x_t, t, estimate): `estimate` is s for the sampler's own g, sigma_min for the
    image, and t for the denoiser and for x_t itself. With r(b) = sqrt((sigma_data^2 + b^2) / (sigma_data^2 + t^2)),

        w = t (t + s) (r(estimate) t + estimate) / ((1 + r(s)) (t + estimate)).

    It follows from the guided ODE dx/du = (x - D)/u - u grad_x log p(y | x_u): to first order in the guidance its
    solution differs from the jump by the integral of J(u -> s) u grad_x log p(y | x_u) from s to t, J the Jacobian of
    the jump. For data N(m, sigma_data^2) and a linear loss that is exact whatever the length of the jump, and gives w.
    Short jumps have w = t^2, whatever the data, for estimates at s or t: D + t^2 grad_x log p(y | x_t).
    """

    def ratio(level: float) -> float:
        return math.sqrt((sigma_data**2 + level**2) / (sigma_data**2 + t**2))

    return t * (t + s) * (ratio(estimate) * t + estimate) / ((1 + ratio(s)) * (t + estimate))


def check_guidance(guidance: Any, pipe: Any) -> None:
    """Raise ValueError if `guidance` is not a guidance, or not one for this pipeline's scheduler and network."""
    can_guide = all(callable(getattr(guidance, name, None)) for name in ("loss", "prepare"))
    if not can_guide or getattr(guidance, "on", None) not in GUIDANCE_INPUTS:
        raise ValueError(f"guidance must be an object of a subclass of Guidance, got {type(guidance).__name__}.")
    if preconditioning_of(pipe.scheduler) is None:
        raise ValueError(f"{type(pipe.scheduler).__name__} takes no `guidance`; CTMScheduler and EDMHeunScheduler do.")
    check_differentiable(pipe.unet)
    if pipe.vae is not None and guidance.on != "noisy":
        check_differentiable(pipe.vae)
    if guidance.on == "image" and not getattr(pipe.unet, "has_target_time", False):
        raise ValueError(
            f'guidance on the "image" needs a network that jumps, a CTM, and this is a {type(pipe.unet).__name__}. Use '
            'on="prediction".'
        )


def check_guidance_scale(guidance_scale: float, pipe: Any) -> float:
    """The scale of classifier-free guidance as a Python number. Raises ValueError if the network cannot do it."""
    guidance_scale = as_number(guidance_scale)
    if not isinstance(guidance_scale, Real) or not math.isfinite(guidance_scale):
        raise ValueError(f"guidance_scale must be a finite number, got {guidance_scale!r}.")
    if guidance_scale != 1 and pipe.num_classes is None:
        raise ValueError("guidance_scale was given, but this network is unconditional.")
    if guidance_scale != 1 and not pipe.knows_no_class:
        raise ValueError(
            "guidance_scale needs a network trained with label dropout, and this checkpoint names no `null_class`. "
            "Guide it by a classifier: `guidance=ClassifierGuidance(...)`."
        )
    return guidance_scale


def guided_output(
    guidance: Guidance,
    network: Callable[..., tuple[torch.Tensor]],
    scheduler: Any,
    x_t: torch.Tensor,
    timestep: torch.Tensor,
    times: tuple[torch.Tensor, ...],
    class_labels: torch.Tensor | None,
    dtype: torch.dtype,
    num_classes: int | None = None,
    decode: Callable[[torch.Tensor], torch.Tensor] = lambda states: states,
) -> tuple[torch.Tensor, bool]:
    """The network's output F for `scheduler.step`, moved so that g moves along the gradient; and whether it moved.

    Args:
        guidance: its loss is minimized.
        network: F, called as in `Preconditioning.g`.
        scheduler: `CTMScheduler` or `EDMHeunScheduler`, in the middle of a run.
        x_t: samples, shape (B, C, H, W).
        timestep: the current one of `scheduler.timesteps`.
        times: what the network is shown: it, and with `CTMScheduler` the target timestep.
        class_labels: shape (B,) or None.
        dtype: of the network's input.
        num_classes: classes of the network, for a `ClassifierGuidance` without a target.
        decode: gives the images of estimates of x_0, differentiably.

    Raises:
        ValueError: the loss has no gradient, another shape than (B,), or is not finite.
        NotFiniteError: a network that gives NaN or infinite values.
    """
    preconditioning = scheduler.preconditioning
    with torch.inference_mode(False), torch.enable_grad():
        x = x_t.detach().clone().requires_grad_()  # an ordinary tensor also where the caller is in inference mode
        times = tuple(time.clone() for time in times)
        labels = None if class_labels is None else class_labels.clone()
        t, s = scheduler.levels_of_call(timestep)
        end = min(t, scheduler.config.sigma_min)
        image_costs_more = guidance.on == "image" and s > end * (1 + 1e-4)  # float32 levels

        with torch.set_grad_enabled(not image_costs_more and guidance.on != "noisy"):
            model_input = scheduler.scale_model_input(x, timestep).to(dtype)
            model_output = network(model_input, *times, **condition(labels), return_dict=False)[0].to(x.dtype)
        level = torch.tensor(t, dtype=torch.float64, device="cpu")
        if guidance.on == "noisy":
            seen, estimate = x, t
        elif image_costs_more:
            end_time = scheduler.sigma_to_t(torch.tensor(end, dtype=torch.float64, device="cpu")).to(times[0])
            model_input = scheduler.scale_model_input(x, timestep).to(dtype)
            output = network(model_input, times[0], end_time, **condition(labels), return_dict=False)
            seen, estimate = preconditioning.g_of_output(output[0], x, level), end
        else:
            seen, estimate = preconditioning.g_of_output(model_output, x, level), max(s, end)

        token = _NUM_CLASSES.set(num_classes)
        try:
            image = seen if seen is x else decode(seen)
            loss = guidance.loss(image, torch.full((len(x),), t, dtype=x.dtype, device=x.device), labels)
        finally:
            _NUM_CLASSES.reset(token)
        network_finite = (sum_of(model_output) + sum_of(seen)).isfinite()
        weight = guidance.scale * guidance_weight(t, s, estimate, scheduler.config.sigma_data)
        weight /= float(preconditioning.scalings(level)[1])
        shift, moved = _shift(loss, weight, seen, x, t, network_finite, scheduler)
    return model_output.detach() - shift, moved


def _shift(
    loss, weight: float, seen, x, sigma: float, network_finite: torch.Tensor, scheduler
) -> tuple[torch.Tensor, bool]:
    """`weight` times the gradient of each sample's loss with respect to `x`, through its argument `seen`.

    And if any gradient is not 0.
    """
    if not torch.is_tensor(loss) or loss.shape != (len(x),):
        got = f"shape {tuple(loss.shape)}" if torch.is_tensor(loss) else type(loss).__name__
        raise ValueError(
            f"The guidance loss must return one value per sample, a tensor of shape ({len(x)},), got {got}."
        )
    slope = torch.autograd.grad(loss.sum(), seen, allow_unused=True)[0] if loss.requires_grad else None
    if slope is None:
        raise ValueError(
            "The guidance loss has no gradient with respect to its image. Compute it from its argument by "
            "differentiable operations, without no_grad, detach, argmax, rounding or numpy."
        )
    if seen is not x:
        # A mean over all pixels has a gradient too small for fp16 on its way through the network.
        largest = slope.flatten(1).abs().amax(1).clamp(min=1e-30).reshape(-1, *[1] * (x.ndim - 1))
        slope = torch.autograd.grad(seen, x, slope / largest)[0] * largest
    shift = weight * slope
    finite = loss.isfinite().all() & shift.isfinite().all()
    sound, finite, moved = torch.stack([network_finite, finite, slope.any()]).tolist()  # one transfer
    if not sound:
        raise NotFiniteError(f"in step {scheduler.step_index + 1} of {len(scheduler.timesteps)}", sigma)
    if not finite:
        raise ValueError(
            f"The guidance loss or its gradient is NaN or infinite at noise level {sigma:g}. Make the loss smooth "
            "where it is singular (such as the root of 0 or log of 0), or lower the scale."
        )
    return shift, moved


class ClassifierFreeNetwork:
    """Classifier-free guidance (Ho & Salimans 2022): F_null + scale (F_y - F_null), in one call with doubled batch.

    g is affine in F, so it is g_null + scale (g_y - g_null) at the same t and s. For s = t that is the guided denoiser,
    exactly. It is not the jump of the guided ODE, from which it differs in second order of t - s: with more steps at
    gamma = 0 the samples converge to those of the guided ODE. Scale 0 is unconditional, for a single batch; 1 would be
    the network itself.

    Args:
        network: F, with `class_labels`.
        scale: w, diffusers' `guidance_scale`.
        null: `null(class_labels)` returns (class_labels, labels of "no class"), alike in shape and dtype.
    """

    def __init__(
        self,
        network: Callable[..., tuple[torch.Tensor]],
        scale: float,
        null: Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor]],
    ):
        self.network, self.scale, self.null = network, scale, null

    def __call__(
        self, sample: torch.Tensor, *times: torch.Tensor, class_labels: torch.Tensor, return_dict: bool = False
    ) -> tuple[torch.Tensor]:
        labels, null = self.null(class_labels)
        if self.scale == 0:
            return self.network(sample, *times, class_labels=null, return_dict=False)
        times = tuple(time.repeat(2) if time.ndim and len(time) > 1 else time for time in times)
        both = self.network(
            sample.repeat(2, 1, 1, 1), *times, class_labels=torch.cat([labels, null]), return_dict=False
        )[0]
        conditional, unconditional = both.chunk(2)
        return (unconditional + self.scale * (conditional - unconditional),)


class ClassAverage(nn.Module):
    """F averaged over classes, for a pipeline that names no class: the denoiser of their densities' geometric mean.

    A conditional network has no other output that does not depend on the class, unless it was trained with label
    dropout.

    Args:
        network: class-conditional.
        classes: the numbers of those to average over, such as `pipe.classes`; None is all.
    """

    def __init__(self, network: nn.Module, classes: Sequence[int] | None = None):
        super().__init__()
        self.network = network
        classes = range(network.config.num_class_embeds) if classes is None else classes
        self.register_buffer("classes", torch.tensor(list(classes), device=network.device), persistent=False)
        self.config = SimpleNamespace(**{**network.config, "num_class_embeds": None})
        self.has_target_time = getattr(network, "has_target_time", False)

    @property
    def dtype(self) -> torch.dtype:
        return self.network.dtype

    @property
    def device(self) -> torch.device:
        return self.network.device

    def forward(self, sample: torch.Tensor, *times: torch.Tensor, return_dict: bool = False) -> tuple[torch.Tensor]:
        count = len(self.classes)
        labels = self.classes.repeat_interleave(len(sample))
        output = self.network(sample.repeat(count, 1, 1, 1), *times, class_labels=labels, return_dict=False)[0]
        return (output.unflatten(0, (count, len(sample))).mean(0),)
