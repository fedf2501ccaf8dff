# Copyright 2026 The diffusers-ctm authors. Licensed under the Apache License, Version 2.0.
"""Arguments checked, with a message that says what to pass."""

import itertools
import math
import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from diffusers.callbacks import MultiPipelineCallbacks, PipelineCallback


def is_integer(value: object) -> bool:
    """Whether `value` is an integer number, array or tensor, or a list that starts with one."""
    if isinstance(value, torch.Tensor):
        return not value.is_floating_point()
    if isinstance(value, np.ndarray):
        return value.dtype.kind in "iub"
    if isinstance(value, (list, tuple)):
        return len(value) > 0 and is_integer(value[0])
    return isinstance(value, (int, np.integer))


def as_float64(values: torch.Tensor | float | Sequence[float], name: str) -> torch.Tensor:
    """`values` as a float64 tensor on the CPU. Raises ValueError, naming the argument, if they are not numbers."""
    if isinstance(values, torch.Tensor):
        values = values.cpu()  # first: not every device has float64
    try:
        return torch.as_tensor(values, dtype=torch.float64, device="cpu")
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"{name} must be a number or a list of numbers, got {values!r}.") from error


def as_number(value: object) -> object:
    """A number of numpy or torch as a Python number; anything else unchanged, for the caller's check to name."""
    return value.item() if getattr(value, "ndim", None) == 0 else value


def check_count(**values: int) -> None:
    """Raise ValueError naming the first argument that is not a whole number >= 1, of Python, numpy or torch."""
    for name, value in values.items():
        try:
            is_count = operator.index(value) >= 1
        except TypeError:
            is_count = False
        if not is_count:
            raise ValueError(f"{name} must be a whole number >= 1, got {value!r}.")


def check_positive(**values: float) -> None:
    """Raise ValueError naming the first argument that is not a positive finite number."""
    for name, value in values.items():
        if not (isinstance(value, (int, float)) and math.isfinite(value) and value > 0):
            raise ValueError(f"{name} must be a positive number, got {value!r}.")


def check_choice(name: str, value: object, choices: Sequence) -> None:
    """Raise ValueError if `value` is not one of `choices`."""
    if value not in choices:
        raise ValueError(f"{name}={value!r} is not known; use one of {tuple(choices)}.")


def check_output_type(output_type: str) -> None:
    """Raise ValueError for an `output_type` that no pipeline knows."""
    if output_type not in ("pil", "np", "pt", "latent"):
        raise ValueError(f"output_type must be 'pil', 'np', 'pt' or 'latent', got {output_type!r}.")


def check_callback(callback: Callable | None, names: list[str] | None, allowed: Sequence[str]) -> None:
    """Raise ValueError if a pipeline's callback asks for a tensor that is not `allowed`."""
    asked, advice = "callback_on_step_end_tensor_inputs", ""
    if isinstance(callback, (PipelineCallback, MultiPipelineCallbacks)):
        asked, names = f"tensor_inputs of {type(callback).__name__}", callback.tensor_inputs
        advice = " To end guidance early, let a callback set `pipe._guidance_scale = 1.0`."
    if set(names or ()) - set(allowed):
        raise ValueError(f"{asked} may hold {allowed}, got {names}.{advice}")


def called_back(callback: Callable, pipe: Any, step: int, timestep: Any, latents: torch.Tensor) -> torch.Tensor:
    """The latents with which a run goes on after its callback, of the shape, dtype and device of `latents`.

    Raises ValueError for a callback that returns anything but None or a dict of such latents.
    """
    answer = callback(pipe, step, timestep, {"latents": latents})
    is_dict = isinstance(answer, Mapping)
    given = answer.get("latents", latents) if is_dict else latents if answer is None else None
    if is_dict and set(answer) - {"latents"} or not isinstance(given, torch.Tensor) or given.shape != latents.shape:
        shown = {name: tuple(getattr(value, "shape", ())) for name, value in answer.items()} if is_dict else None
        raise ValueError(
            f"callback_on_step_end must return None, or {{'latents': a tensor of shape {tuple(latents.shape)}}}; got "
            f"{f'a dict with the shapes {shown}' if is_dict else type(answer).__name__}."
        )
    return given.to(latents)


def check_differentiable(network: torch.nn.Module) -> None:
    """Raise ValueError for a network made in inference mode, whose weights autograd cannot keep."""
    if any(weight.is_inference() for weight in itertools.islice(network.parameters(), 1)):
        raise ValueError(
            "The network was made inside torch.inference_mode(), and its gradient is needed here. Load it outside, or "
            "inside torch.no_grad()."
        )


class NotFiniteError(ValueError):
    """The network gave NaN or infinite values; `where` says in which call, `level` the noise levels of that call."""

    def __init__(self, where: str, level: torch.Tensor | float, source: str = "The network"):
        low, high = (f"{value:.4g}" for value in torch.as_tensor(level).aminmax())
        levels = f"noise level {low}" if low == high else f"noise levels {low} to {high}"
        super().__init__(
            f"{source} gave NaN or infinite values {where}, at {levels}. In float16 the values of a network often "
            "overflow: load it with `dtype=torch.bfloat16` or `torch.float32`. If it is not float16, its weights "
            "are broken."
        )


def sum_of(x: torch.Tensor) -> torch.Tensor:
    """The sum of `x`, float32 or wider: a 0-d tensor, for `check_finite`.

    It is NaN or infinite if a value is, and costs a small part of `isfinite` on each.
    """
    return x.detach().sum()


def check_finite(
    sums: Sequence[torch.Tensor],
    levels: Sequence[torch.Tensor | float],
    unit: str = "step",
    source: str = "The network",
) -> None:
    """Raise NotFiniteError for the first step that gave NaN or infinite values. Waits for the device once.

    Args:
        sums: `sum_of` the values of each step, 0-d tensors on the device.
        levels: noise levels of each step, numbers or tensors.
    """
    finite = [math.isfinite(value) for value in torch.stack(list(sums)).tolist()] if sums else []
    if not all(finite):
        first = finite.index(False)
        raise NotFiniteError(f"in {unit} {first + 1} of {len(levels)}", levels[first], source)
