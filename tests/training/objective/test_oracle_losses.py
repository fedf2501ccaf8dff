# Copyright 2026 The diffusers-ctm authors. Licensed under the Apache License, Version 2.0.
"""CTM's loss against one training step of the authors' code: targets, losses, adaptive weight and all gradients.

A case is a network family and a distance. To add one: an entry of `CASES`.
"""

import copy
import functools
import json
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

from diffusers_ctm.preconditioning import Preconditioning, condition
from diffusers_ctm.trajectory import karras_sigma
from helpers.exact import grid_times
from helpers.places import ORACLE
from helpers.stub_gan import augment_of, stub_discriminator
from training.frozen.backbone import IMAGENET_MEAN, IMAGENET_STD, Backbone
from training.objective.adversarial import generator_loss, generator_weight
from training.objective.ctm import ctm
from training.objective.distances import PerceptualDistance, l2_distance
from training.objective.jumps import Jumps, noised
from training.objective.losses import Adversary, ScoreMatching, training_loss
from training.objective.solvers import SOLVERS, TargetOptions
from training.official import adm as convert_adm
from training.official import song as convert_edm


TOLERANCE = 1e-4  # relative


def resized(x):
    """What the authors' perceptual distance sees: 224x224 pixels in [0, 1]."""
    return (F.interpolate(x, size=224, mode="bilinear", align_corners=False) + 1) / 2


def resized_l2(a, b):
    return l2_distance(resized(a), resized(b))


class OracleStub(Backbone):
    """The network that stands in for LPIPS's in the authors' numbers."""

    def __init__(self):
        super().__init__(224, IMAGENET_MEAN, IMAGENET_STD, {})
        arrays = np.load(ORACLE / "stub_tinyperceptual.npz")
        self.weights = {name: torch.from_numpy(value) for name, value in arrays.items()}
        self.freeze()

    def maps(self, x):
        maps = []
        for layer in ("c1", "c2"):
            x = F.conv2d(x, self.weights[f"{layer}.weight"], self.weights[f"{layer}.bias"], stride=2).relu()
            maps.append(x)
        return maps


def tiny_perceptual(a, b):
    """LPIPS with that network and equal heads."""
    backbone = OracleStub()
    return PerceptualDistance(backbone, [torch.ones(channels) for channels in backbone.num_channels])(a, b)


def adm_teacher(student: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The stand-in for a teacher of the authors' fixture: the student without target time, weights times 0.9."""
    shared = {name: tensor for name, tensor in student.items() if "_s." not in name}
    return {name: 0.9 * tensor if tensor.ndim >= 2 else tensor for name, tensor in shared.items()}


def gradients_of(network: torch.nn.Module, to_official: Callable) -> dict[str, torch.Tensor]:
    """Gradients of `network` by official name. The two biases that are one here have its gradient both."""
    gradients = copy.deepcopy(network)
    for parameter, own in zip(gradients.parameters(), network.parameters(), strict=True):
        parameter.data = own.grad
    official = {name: value for name, value in to_official(gradients).items() if not name.endswith("resample_filter")}
    for name in official:
        if ("emb_layers_s." in name or "affine_s." in name) and name.endswith("bias"):
            official[name] = official[name.replace("layers_s.", "layers.").replace("affine_s.", "affine.")]
    return official


@dataclass
class Case:
    """One step of the authors' code.

    Args:
        weights: file of the student.
        convert: official state dict -> network.
        to_official: network -> official state dict.
        teacher: state dict of the student -> that of the teacher.
        order: names of the parameters, file and, if it holds several lists, the key.
        timestep_scale, num_levels: of the family.
        last_weight: the weight at which gradients are compared, by its own name.
        distance: what the fixture used.
        adversarial: whether the step has the generator's loss, of stand-in networks. Its arrays begin with "g_".
    """

    weights: str
    convert: Callable
    to_official: Callable
    teacher: Callable
    order: tuple[str, str | None]
    timestep_scale: float
    num_levels: int
    last_weight: str
    distance: Callable
    adversarial: bool = False


CASES = {
    "loss_adm64_k3": Case(
        weights="ctm_adm64_cond.safetensors",
        convert=lambda weights: convert_adm.to_diffusers(weights, attention_head_dim=16),
        to_official=convert_adm.to_official,
        teacher=adm_teacher,
        order=("loss_adm64_param_order.json", None),
        timestep_scale=1000.0,
        num_levels=40,
        last_weight="up_blocks.3.resnets.3.conv2.weight",  # output_blocks.15.0.out_layers.3
        distance=resized_l2,
    ),
    **{
        name: Case(
            weights="ctm_cifar_uncond.safetensors",
            convert=lambda weights: convert_edm.to_diffusers(weights, dropout=0.0),
            to_official=convert_edm.to_official,
            teacher=lambda student: load_file(ORACLE / "edm_ddpmpp_uncond.safetensors"),
            order=("loss_param_order.json", "uncond"),
            timestep_scale=1.0,
            num_levels=18,
            last_weight="conv_out.weight",  # dec.32x32_aux_conv
            distance=distance,
            **more,
        )
        for name, distance, more in (
            ("loss_k5_l2", resized_l2, {}),
            ("loss_k5_tiny", tiny_perceptual, {}),
            ("loss_gan", resized_l2, {"adversarial": True}),
        )
    },
}


def close(ours, theirs, tolerance=TOLERANCE):
    """Whether two tensors differ by less than `tolerance` times the largest entry."""
    theirs = torch.as_tensor(theirs)
    return (ours - theirs).abs().max() <= tolerance * theirs.abs().max()


@pytest.fixture(scope="module", params=CASES)
def step(request):
    """(case, the authors' arrays, what `training_loss` did with the same inputs, the student with gradients)."""
    case, file = CASES[request.param], ORACLE / f"{request.param}.npz"
    if not file.exists():
        pytest.skip("the oracle folder is not here")
    prefix = "g_" if case.adversarial else ""
    arrays = {
        name.removeprefix(prefix): torch.from_numpy(value)
        for name, value in np.load(file).items()
        if name.startswith(prefix)
    }
    weights = load_file(ORACLE / case.weights)
    student = case.convert(weights)
    kept = [name for name, weight in weights.items() if weight.ndim < 2 or name.endswith("resample_filter")]
    average = case.convert({name: weight if name in kept else 0.95 * weight for name, weight in weights.items()})
    teacher = case.convert(case.teacher(weights))
    average.requires_grad_(False)
    teacher.requires_grad_(False)

    preconditioning = Preconditioning(0.5, case.timestep_scale)
    # In float32, and with the authors' very numbers: the network is shown 250 ln(level), where the last digit of a
    # level tells.
    grid = karras_sigma(torch.linspace(0, 1, case.num_levels))
    grid[-1] = 0.002
    k = int(arrays["num_heun_step"])
    index_t, index_s = arrays["index_t"], arrays["index_s"]
    recorded = (("t", index_t), ("u", index_t + k), ("s", index_s))
    for name, index in [pair for pair in recorded if pair[0] in arrays]:
        assert close(grid[index], arrays[name], 1e-6)
        grid[index] = arrays[name]
    labels = arrays.get("y")
    seen = {"gradients": []}

    def solver(x, levels, labels):
        seen["x_u"] = SOLVERS["heun"].solve(
            lambda x, sigma: preconditioning.denoise(teacher, x, sigma, **condition(labels)), x, levels
        )
        return seen["x_u"]

    def distance(estimate, target):
        seen["estimate"], seen["target"] = estimate.detach(), target
        seen["distance"] = case.distance(estimate, target)
        return seen["distance"]

    def reduce_gradient(gradient):
        seen["gradients"].append(gradient)
        return gradient

    adversary = None
    if case.adversarial:
        judge = stub_discriminator(np.load(ORACLE / "stub_gan_nets.npz"))
        augment = [augment_of(arrays, f"aug{index}_") for index in range(2)]
        adversary = Adversary(lambda estimate: generator_loss(judge, estimate, augment), generator_weight)
    times = grid_times(grid, index_t, index_t + k, index_s)
    x_0, sigma = arrays["x_start"], arrays["dsm_sigmas"]
    x_t, x_sigma = noised(x_0, times.t, arrays["noise"]), noised(x_0, sigma, arrays["dsm_noise"])
    loss = training_loss(
        functools.partial(ctm, options=TargetOptions(inner_target="live")),
        Jumps(student, average, preconditioning, times, x_t, labels, solver, distance=distance),
        lambda: student.get_parameter(case.last_weight),
        ScoreMatching(x_sigma, sigma, x_0, labels),
        adversary,
        reduce_gradient=reduce_gradient,
    )
    loss.total.backward()
    return case, arrays, loss, seen, student


def test_solver_target_and_estimate(step):
    _, arrays, _, seen, _ = step
    for name in ("x_u", "target", "estimate"):
        assert name not in arrays or close(seen[name], arrays[name]), name
    assert "target" in arrays and "estimate" in arrays


def test_losses_and_adaptive_weights(step):
    case, arrays, loss, seen, _ = step
    assert close(seen["distance"].detach(), arrays["consistency_loss"])
    terms = loss.terms
    assert close(terms["trajectory_loss"], arrays["consistency_loss"].mean())
    names = ("adapt_gan_num", "adapt_gan_den") if case.adversarial else ("adapt_dsm_num", "adapt_dsm_den")
    for gradient, name in zip(seen["gradients"], names):
        assert close(gradient.norm(), arrays[name]), name
    assert close(terms["dsm_weight"], arrays["adapt_dsm_w_raw"])
    assert close(terms["dsm_weight"] * terms["dsm_loss"], arrays["denoising_loss"].mean())
    if case.adversarial:
        assert close(terms["generator_weight"], arrays["adapt_gan_w_raw"].clamp(0.01, 10))
        assert close(terms["generator_weight"] * terms["generator_loss"], arrays["d_loss"])
    else:
        assert close(terms["dsm_loss"], arrays["dsm_loss_raw"].mean())
    assert close(loss.total.detach(), arrays["total_loss"])


def test_gradients(step):
    case, arrays, _, _, student = step
    file, key = case.order
    names = json.loads((ORACLE / file).read_text())
    names = names if key is None else names[key]
    gradients = gradients_of(student, case.to_official)
    assert set(gradients) == set(names) and len(names) == len(arrays["grad_norms"])
    largest = arrays["grad_norms"].max()
    for name, norm in zip(names, arrays["grad_norms"], strict=True):
        # Gradients that are zero but for rounding (biases before a norm) have no relative accuracy.
        assert (gradients[name].norm() - norm).abs() <= TOLERANCE * norm + 1e-6 * largest, name
    full = [name.removeprefix("grad__") for name in arrays if name.startswith("grad__")]
    assert len(full) >= 5
    for name in full:
        assert close(gradients[name], arrays[f"grad__{name}"]), name
