# Copyright 2026 The diffusers-ctm authors. Licensed under the Apache License, Version 2.0.
"""Functions that both networks of two times share."""

import math

import torch
from torch import nn


def input_weight(network: nn.Module) -> torch.Tensor | None:
    """The weight of the layer that a sample enters, which says at once where and in which dtype a sample is expected.

    None if a hook moves or casts the weights, or if the network names no layer so. Then diffusers knows, by a walk
    through all modules.
    """
    layer = getattr(network, "conv_in", None)
    hooks = ("_diffusers_hook", "_hf_hook")  # diffusers' and accelerate's
    hooked = any(hasattr(module, hook) for module in (network, layer) for hook in hooks)
    return None if hooked else getattr(layer, "weight", None)


def input_dtype(network: nn.Module) -> torch.dtype:
    """The dtype of the samples that `network` takes."""
    weight = input_weight(network)
    return network.dtype if weight is None else weight.dtype


def float_time(timestep: torch.Tensor | float, sample: torch.Tensor, name: str) -> torch.Tensor:
    """`timestep` as a float tensor of shape (B,) on the device of `sample`. Raises ValueError if it is an integer."""
    timestep = torch.as_tensor(timestep, device=sample.device)
    if not timestep.is_floating_point():
        raise ValueError(
            f"{name} must be a float, the c_noise of a noise level (`scheduler.timesteps` holds them), not an integer."
        )
    return timestep.expand(sample.shape[0])


def both_times(
    network: nn.Module,
    sample: torch.Tensor,
    timestep: torch.Tensor | float,
    target_timestep: torch.Tensor | float | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Time and target time as `float_time` makes them; without a target both are the time.

    Raises ValueError also for a target that `network` does not have.
    """
    timestep = float_time(timestep, sample, "timestep")
    if target_timestep is None:
        return timestep, timestep
    if not network.has_target_time:
        raise ValueError("target_timestep was given, but this network has no target time (target_time=False)")
    return timestep, float_time(target_timestep, sample, "target_timestep")


def class_vector(network: nn.Module, class_labels: torch.Tensor | None, timestep: torch.Tensor) -> torch.Tensor:
    """Input of EDM's class embeddings, (B, num_class_embeds): sqrt(num_class_embeds) * one-hot, zero for no class.

    `class_labels` are (B,) integers, floats of the result's shape, or None. In training some are left out, as the
    config's `label_dropout` says. Raises ValueError for another shape.
    """
    batch_size, count = timestep.shape[0], network.config.num_class_embeds
    if class_labels is None:
        vector = torch.zeros(batch_size, count, device=timestep.device)
    elif class_labels.is_floating_point():
        vector = class_labels
    else:
        vector = nn.functional.one_hot(class_labels.long(), count)
    if vector.shape != (batch_size, count):
        raise ValueError(
            f"class_labels must be {batch_size} class numbers or floats of shape {(batch_size, count)}, "
            f"got shape {tuple(class_labels.shape)}."
        )
    if network.training and network.config.label_dropout:
        vector = vector * (torch.rand(batch_size, 1, device=vector.device) >= network.config.label_dropout)
    return vector * math.sqrt(count)


def config_of(network: nn.Module) -> dict:
    """The config of a network made from `network`: without the place that it was loaded from."""
    return {name: value for name, value in network.config.items() if name != "_name_or_path"}


def placed_as(student: nn.Module, teacher: nn.Module) -> nn.Module:
    """`student` on the device, in the dtype and mode of `teacher`."""
    # Not by ModelMixin.to, which warns that an empty list of modules "should be kept in float32".
    return nn.Module.to(student, device=teacher.device, dtype=teacher.dtype).train(teacher.training)


def start_as(student: nn.Module, teacher: nn.Module) -> nn.Module:
    """Make `student`, the same network with a target time, equal `teacher` at every target, and return it.

    It comes on the teacher's device, in its dtype and mode. The target's embedding becomes a copy of the time's, and
    the columns that read it zero.
    """
    student, weights = placed_as(student, teacher), dict(teacher.state_dict())
    for name in student.state_dict():
        if name.startswith("target_time_embedding."):
            weights[name] = weights[name.removeprefix("target_")]
        elif name.endswith("time_emb_proj.weight"):
            weights[name] = torch.cat([weights[name], torch.zeros_like(weights[name])], dim=1)
    student.load_state_dict(weights)
    return student


def widened(linear: nn.Linear) -> nn.Linear:
    """`linear` with as many input features again, whose weights are zero."""
    wide = nn.Linear(
        2 * linear.in_features, linear.out_features, device=linear.weight.device, dtype=linear.weight.dtype
    )
    with torch.no_grad():
        wide.weight.copy_(torch.cat([linear.weight, torch.zeros_like(linear.weight)], dim=1))
        wide.bias.copy_(linear.bias)
    return wide


def image_size(network: nn.Module) -> tuple[int, int] | None:
    """Height and width in pixels of the images of a network, None if its config does not say."""
    size = network.config.sample_size
    return (size, size) if isinstance(size, int) else size and tuple(size)
