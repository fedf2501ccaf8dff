# Copyright 2026 The diffusers-ctm authors. Licensed under the Apache License, Version 2.0.
"""EDM2's training against its authors' code: loss, gradients, six steps with averages, and the schedules' numbers."""

import copy
import functools
import json
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from diffusers_ctm.preconditioning import edm_loss_weight
from helpers.comparing import close as close_to
from helpers.official_edm2 import oracle_network
from helpers.places import EDM2_ORACLE
from training.ema import reconstruction
from training.objective.jumps import noised
from training.objective.losses import dsm_loss, uncertainty_loss
from training.objective.times import draw_lognormal_sigma
from training.official import edm2
from training.run.averages import EMA, power_decay
from training.run.devices import make_lr_scheduler, make_optimizer


close = functools.partial(close_to, rtol=1e-4, atol=1e-4)


@pytest.fixture
def arrays(oracle):
    return {
        name: torch.from_numpy(value)
        for name, value in oracle(EDM2_ORACLE / "edm2_train.npz").items()
        if value.dtype.kind != "U"
    }


@pytest.fixture
def numbers():
    """Numbers that need no network."""
    path = EDM2_ORACLE / "edm2_numbers.json"
    if not path.exists():
        pytest.skip("the oracle folder is not here")
    return {name.partition(" ")[0]: value for name, value in json.loads(path.read_text()).items()}


def official(network, values=None):
    """The network's parameters by official names, or `values` of them by own ones."""
    other = copy.deepcopy(network)
    for name, parameter in other.named_parameters():
        parameter.data = parameter.data if values is None else values[name]
    return {name: tensor for name, tensor in edm2.to_official(other).items() if "_fourier" not in name}


def row_lengths(network, names):
    """The mean root mean square of the rows of each parameter; the absolute value of a gain."""
    weights = official(network)
    rows = [weights[name].reshape(math.prod(weights[name].shape[:1]), -1) for name in names]
    return torch.stack([row.square().mean(1).sqrt().mean() for row in rows])


def losses_of(network, preconditioning, images, labels, normal, noise, p_mean=-0.4, p_std=1.0):
    """(levels, denoised, uncertainty, loss of each image) as `train_edm` computes them."""
    sigma = draw_lognormal_sigma(normal, p_mean, p_std)
    denoised = preconditioning.denoise(network, noised(images, sigma, noise), sigma, class_labels=labels)
    u = network.log_variance(preconditioning.c_noise(sigma))
    return sigma, denoised, u, uncertainty_loss(dsm_loss(denoised, images, sigma, preconditioning.sigma_data), u)


def check_gradients(network, names, arrays, start, norms):
    gradients = official(network, {name: parameter.grad for name, parameter in network.named_parameters()})
    assert gradients.keys() == set(names) and len(names) == len(norms) == 155
    for name, norm in zip(names, norms, strict=True):
        assert (gradients[name].norm() - norm).abs() <= 1e-4 * norm + 1e-6 * norms.max(), name
    full = [name.removeprefix(start) for name in arrays if name.startswith(start)]
    for name in full:
        expected = arrays[start + name]
        assert (gradients[name] - expected).abs().max() <= 1e-4 * expected.abs().max(), name
    return len(full)


def test_loss_and_gradients(oracle, arrays):
    """First of the weights as they are, then of the normalized ones, with which each step of training begins."""
    names = oracle(EDM2_ORACLE / "edm2_train.npz")["param_names"].tolist()
    network, preconditioning, _ = oracle_network("edm2_latent32")
    given = [arrays[name] for name in ("images", "labels_int", "rnd_normal", "noise")]
    pixels = given[0][0].numel()
    close(row_lengths(network, names), arrays["rowrms_before_mean"])

    sigma, denoised, u, losses = losses_of(network, preconditioning, *given)
    close(sigma, arrays["sigma"])
    close(edm_loss_weight(sigma, 0.5), arrays["weight"])
    close(denoised, arrays["eval_denoised"])
    close(u, arrays["eval_logvar"])
    close(losses, arrays["eval_loss_mean"])
    (pixels * losses.mean()).backward()  # theirs is a sum over the pixels
    close(pixels * losses.mean(), arrays["eval_loss_sum_over_B"])
    assert check_gradients(network, names, arrays, "eval_grad__", arrays["eval_grad_norms"]) == 2

    network.zero_grad()
    network.normalize_weights_()
    close(row_lengths(network, names), arrays["rowrms_after_mean"], rtol=0, atol=2e-6)
    _, denoised, u, losses = losses_of(network.train(), preconditioning, *given)
    close(denoised[:1], arrays["train_denoised_first"])
    close(u, arrays["train_logvar"])
    close(losses, arrays["train_loss_mean"])
    (pixels * losses.mean()).backward()
    assert check_gradients(network, names, arrays, "train_grad__", arrays["grad_norms"]) == 11
    after = official(network)
    for name in [name for name in arrays if name.startswith("train_after__")]:
        close(after[name.removeprefix("train_after__")], arrays[name], rtol=0, atol=2e-6)


def test_six_steps(oracle, arrays):
    """Weights normalized before the first step and after each, when the averages have seen what the optimizer left."""
    names = oracle(EDM2_ORACLE / "edm2_train.npz")["param_names"].tolist()
    network, preconditioning, _ = oracle_network("edm2_latent32")
    images, labels = arrays["images"], arrays["labels_int"]
    learning_rate, decay_after, rise = arrays["trace_lr_args"].tolist()
    options = SimpleNamespace(optimizer="adam", learning_rate=learning_rate, adam_beta2=0.99, adam_epsilon=1e-8)
    options.adam_weight_decay, options.lr_scheduler = 0.0, "inverse_sqrt"
    options.lr_decay_after, options.lr_warmup_steps = decay_after, rise * 1e6 / len(images)
    optimizer = make_optimizer(options, network)
    scheduler = make_lr_scheduler(options, optimizer)
    averages = {std: EMA(network, power_decay(std)) for std in arrays["trace_stds"].tolist()}
    network.train().normalize_weights_()
    for step, seed in enumerate(arrays["trace_noise_seeds"].tolist()):
        torch.manual_seed(seed)
        normal, noise = torch.randn(len(images), 1, 1, 1).flatten(), torch.randn_like(images)
        assert torch.equal(normal, arrays["trace_rnd_normal"][step])
        assert torch.equal(noise.flatten()[:4], arrays["trace_noise_first4"][step])
        assert scheduler.get_last_lr() == [pytest.approx(arrays["trace_lr"][step].item(), rel=1e-9)]
        losses = losses_of(network, preconditioning, images, labels, normal, noise)[-1]
        close(losses, arrays["trace_loss_mean"][step])
        optimizer.zero_grad()
        (images[0].numel() * losses.mean()).backward()
        optimizer.step()
        scheduler.step()
        for (std, average), beta in zip(averages.items(), arrays["trace_betas"][step].tolist(), strict=True):
            average.step(network)
            assert power_decay(std)(step + 1) == pytest.approx(beta, rel=1e-9)
        left = copy.deepcopy(network)
        network.normalize_weights_()

    count = 0
    trained = {"trace_net__": left, **{f"trace_ema-{std:.3f}__": average.module for std, average in averages.items()}}
    for start, module in trained.items():
        weights = official(module)
        for name in [name for name in arrays if name.startswith(start)]:
            close(weights[name.removeprefix(start)], arrays[name])
            count += 1
        lengths = start.removesuffix("__").removesuffix("_net") + "_rowrms_mean"
        close(row_lengths(module, names), arrays[lengths])
    assert count == 5 + 4 + 4


# Numbers --------------------------------------------------------------------------------------------------------------


def test_decays_of_the_averages(numbers):
    for std, exponent in numbers["std_to_exp"]:
        assert -math.log2(power_decay(std)(2)) - 1 == pytest.approx(exponent, rel=1e-9)
    for std, images, batch, beta in numbers["power_function_beta"]:
        assert power_decay(std)(images / batch) == pytest.approx(beta, rel=1e-9)


def test_learning_rates(numbers):
    for images, batch, peak, decay_after, rise, expected in numbers["learning_rate_schedule"]:
        options = SimpleNamespace(lr_scheduler="inverse_sqrt", lr_warmup_steps=rise * 1e6 / batch, max_train_steps=1)
        options.lr_decay_after = decay_after or math.inf
        optimizer = torch.optim.Adam([torch.zeros(1, requires_grad=True)], lr=peak)
        factor = make_lr_scheduler(options, optimizer).lr_lambdas[0]
        assert peak * factor(images / batch) == pytest.approx(expected, rel=1e-9)


def test_weights_of_averages_that_were_not_kept(numbers):
    for case in numbers["solve_posthoc_coefficients"]:
        for column, std in enumerate(case["out_std"]):
            weights, _ = reconstruction(case["in_std"], case["in_ofs"], std, case["out_ofs"])
            expected = np.array(case["coefs_in_by_out"])[:, column]
            np.testing.assert_allclose(weights, expected, rtol=0, atol=1e-9)


def test_averages_of_a_known_sequence(numbers):
    toy = numbers["ema_toy"]
    layer = torch.nn.Linear(1, 1, bias=False).double()
    averages = {std: EMA(layer, power_decay(std)) for std in dict.fromkeys(toy["in_std"] + toy["out_std"])}
    kept = []
    for step in range(1, toy["n"] + 1):
        layer.weight.data.fill_(math.sin(0.3 * step) + 0.05 * step)
        for average in averages.values():
            average.step(layer)
        if step % (toy["n"] // 4) == 0:
            kept += [averages[std].module.weight.item() for std in (0.05, 0.10)]
    assert kept == pytest.approx(toy["snapshots"], rel=1e-9)
    for std, reconstructed, direct in zip(toy["out_std"], toy["reconstructed"], toy["tracked_directly"], strict=True):
        weights, _ = reconstruction(toy["in_std"], toy["in_ofs"], std, toy["in_ofs"][-1])
        average = weights @ torch.tensor(kept, dtype=torch.float64)
        assert average.item() == pytest.approx(reconstructed, rel=1e-9)
        assert averages[std].module.weight.item() == pytest.approx(direct, rel=1e-9)
