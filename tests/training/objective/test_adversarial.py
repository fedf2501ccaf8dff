# Copyright 2026 The diffusers-ctm authors. Licensed under the Apache License, Version 2.0.
"""DiffAugment, discriminators and their losses: closed forms, the authors' numbers, what a step may change."""

import copy
import dataclasses
import itertools
import json
import re

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from helpers.comparing import seeded
from helpers.places import ORACLE
from helpers.stub_gan import augment_of, stub_discriminator
from training.cli.errors import UserError
from training.objective import adversarial
from training.objective.adversarial import (
    DiscriminatorOptions,
    MultiScaleDiscriminator,
    ProjectedDiscriminator,
    RandomProjection,
    discriminator_hinge_loss,
    discriminator_loss,
    discriminator_optimizer,
    generator_hinge_loss,
    generator_loss,
    generator_weight,
    is_discriminator_step,
    make_discriminator,
    update_spectral_norm,
)
from training.objective.diffaugment import DiffAugmentParameters, diff_augment, draw_diff_augment
from training.run.batch import StepRandom


FULL_SIZE = ([64, 64, 128, 256], [112, 56, 28, 14])


class TinyBackbone(nn.Module):
    """A frozen network with four feature maps and batch norm, which shows whether it is in eval mode."""

    def __init__(self, resolution=32, seed=0):
        super().__init__()
        self.resolution, self.num_channels = resolution, [4, 6, 8, 10]
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.stages = nn.ModuleList(
                nn.Sequential(nn.Conv2d(n, m, 3, stride=2, padding=1), nn.BatchNorm2d(m), nn.Tanh())
                for n, m in itertools.pairwise([3, *self.num_channels])
            )

    def forward(self, images):
        x = images.expand(-1, 3, -1, -1)
        x = F.interpolate(x, (self.resolution, self.resolution), mode="bilinear", align_corners=False)
        features = []
        for stage in self.stages:
            x = stage(x)
            features.append(x)
        return features


def make(seed=0, names=("a", "b"), **settings):
    backbones = {name: TinyBackbone(seed=index) for index, name in enumerate(names)}
    return ProjectedDiscriminator(backbones, seed, **{"channels": 4, **settings})


def images(batch=4, channels=3, height=16, width=16, seed=0, dtype=torch.float32):
    return torch.rand(batch, channels, height, width, generator=seeded(seed), dtype=dtype) * 2 - 1


def uniform(batch=4, seed=0):
    generator = seeded(seed)
    return lambda: torch.rand(batch, generator=generator)


def unchanged(batch, **changes):
    """Parameters that do nothing but cut a box around (0, 0) out."""
    zero, one = torch.zeros(batch), torch.ones(batch)
    values = dict(brightness=zero, saturation=one, contrast=one)
    values |= dict.fromkeys(("shift_rows", "shift_columns", "cutout_row", "cutout_column"), zero.long())
    return DiffAugmentParameters(**values | {name: torch.as_tensor(value) for name, value in changes.items()})


def state(module):
    return {name: value.clone() for name, value in module.state_dict().items()}


def equal(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


# DiffAugment


@pytest.mark.parametrize("prefix", ["r32_", "r64_"])
def test_diff_augment_equals_the_authors(oracle, prefix):
    arrays = oracle("diffaug.npz")
    augmented = diff_augment(torch.from_numpy(arrays[prefix + "x"]), augment_of(arrays, prefix))
    torch.testing.assert_close(augmented, torch.from_numpy(arrays[prefix + "y"]), atol=1e-5, rtol=0)


def test_color_changes_have_their_closed_form_and_order():
    x = images(3, height=20, width=15)
    rest = (slice(None), slice(None), slice(2, None), slice(2, None))  # outside of the box
    b = torch.tensor([0.3, -0.5, 0.0])
    brighter = diff_augment(x, unchanged(3, brightness=b))
    torch.testing.assert_close(brighter[rest], x[rest] + b[:, None, None, None])
    gray = diff_augment(x, unchanged(3, saturation=[0.0, 1.0, 2.0]))
    torch.testing.assert_close(gray[0][:, 2:, 2:], x[0].mean(0)[None, 2:, 2:].expand(3, -1, -1))
    torch.testing.assert_close(gray[1][:, 2:, 2:], x[1][:, 2:, 2:])
    torch.testing.assert_close(gray[2].mean(0)[2:, 2:], x[2].mean(0)[2:, 2:])
    torch.testing.assert_close(gray[2].var(0)[2:, 2:], 4 * x[2].var(0)[2:, 2:])
    flat = diff_augment(x, unchanged(3, contrast=[0.0, 1.0, 1.5]))
    torch.testing.assert_close(flat[0][:, 2:, 2:], x[0].mean().expand(3, 18, 13))
    torch.testing.assert_close(flat[2][:, 2:, 2:], (x[2] + 0.5 * (x[2] - x[2].mean()))[:, 2:, 2:])
    # Their order: contrast is about the mean of the brighter image, so brightness moves the result by just itself.
    changed = diff_augment(x, unchanged(3, brightness=[0.25] * 3, saturation=[0.5] * 3, contrast=[1.5] * 3))
    half_gray, mean = 0.5 * (x + x.mean(1, keepdim=True)), x.mean((1, 2, 3), keepdim=True)
    torch.testing.assert_close(changed[rest], (mean + 1.5 * (half_gray - mean) + 0.25)[rest])


def test_translation_is_a_shift_of_the_padded_image():
    x = images(5, height=16, width=24)
    rows, columns = [-2, 0, 2, 1, -1], [3, -3, 0, 1, -1]
    moved = diff_augment(x, unchanged(5, shift_rows=rows, shift_columns=columns, cutout_row=[16] * 5))
    padded = F.pad(x, (3, 3, 2, 2))
    for image, source, i, j in zip(moved, padded, rows, columns):
        expected = source[:, 2 + i : 18 + i, 3 + j : 27 + j].clone()
        expected[:, 15:, :2] = 0  # the box around (16, 0): rows 15 to 17, columns -2 to 2
        expected[:, 15:, 2] = 0
        torch.testing.assert_close(image, expected)


@pytest.mark.parametrize("side, size", [(8, 2), (16, 3), (28, 6), (32, 6), (33, 7), (64, 13)])
def test_cutout_is_a_box_of_a_fifth(side, size):
    ones = torch.ones(3, 1, side, side)
    middle, last = side // 2, side - size % 2
    cut = diff_augment(ones, unchanged(3, cutout_row=[middle, 0, last], cutout_column=[middle, middle, last])) == 0
    at_end = size - size // 2 if size % 2 == 0 else size // 2 + 1
    assert cut.sum((1, 2, 3)).tolist() == [size**2, (size - size // 2) * size, at_end**2]
    assert cut[0, 0, middle - size // 2 :, middle - size // 2 :][:size, :size].all()


def test_drawn_parameters_have_the_ranges_of_the_authors():
    drawn = draw_diff_augment(uniform(20000), 32, 64)
    for name, low, high in (("brightness", -0.5, 0.5), ("saturation", 0, 2), ("contrast", 0.5, 1.5)):
        values = getattr(drawn, name)
        assert low <= values.min() < low + 0.01 and high - 0.01 < values.max() <= high
        assert values.mean().item() == pytest.approx((low + high) / 2, abs=0.02)
    ranges = dict(
        shift_rows=(-4, 4), shift_columns=(-8, 8), cutout_row=(0, 32), cutout_column=(0, 63)
    )  # 6 even, 13 odd
    for name, (low, high) in ranges.items():
        values = getattr(drawn, name)
        counts = torch.bincount(values - low) / len(values)
        assert values.dtype == torch.int64 and values.min() == low and values.max() == high
        torch.testing.assert_close(counts, torch.full_like(counts, 1 / (high - low + 1)), atol=0.006, rtol=0)
    numbers = torch.stack([getattr(drawn, field.name).double() for field in dataclasses.fields(drawn)])
    assert (torch.corrcoef(numbers) - torch.eye(7)).abs().max() < 0.03
    largest = draw_diff_augment(lambda: torch.tensor([1 - 2**-24]), 32, 64)  # the last number below 1
    assert (largest.shift_rows, largest.shift_columns, largest.cutout_row, largest.cutout_column) == (4, 8, 32, 63)


def test_drawing_does_not_depend_on_how_the_batch_is_split():
    def draw(own):
        return draw_diff_augment(StepRandom(3, 7, 6, own, torch.device("cpu")).uniform, 16, 16, parts=2)

    whole, first, last = draw(slice(0, 6)), draw(slice(0, 2)), draw(slice(2, 6))
    for field in dataclasses.fields(whole):
        values = [getattr(part, field.name) for part in (whole, first, last)]
        assert len(values[0]) == 12 and not torch.equal(values[0][:6], values[0][6:])
        for part in range(2):
            pieces = [value.chunk(2)[part] for value in values]
            assert torch.equal(pieces[0], torch.cat(pieces[1:]))


def test_diff_augment_is_differentiable_and_leaves_its_input():
    x = images(2, height=7, width=5, dtype=torch.float64).requires_grad_()
    drawn = draw_diff_augment(lambda: torch.rand(2, generator=seeded(1), dtype=torch.float64), 7, 5)
    before = x.detach().clone()
    assert torch.autograd.gradcheck(lambda x: diff_augment(x, drawn), x)
    assert torch.equal(before, x)


def test_diff_augment_reads_no_value_on_the_host():
    # A tensor without data would raise.
    drawn = draw_diff_augment(lambda: torch.empty(2, device="meta"), 9, 13)
    assert diff_augment(torch.empty(2, 3, 9, 13, device="meta"), drawn).shape == (2, 3, 9, 13)


# Projections and heads


def test_projection_mixes_all_channels_and_from_coarse_to_fine():
    torch.manual_seed(0)
    sizes = [(17, 9), (8, 5), (5, 3), (1, 2)]
    projection = RandomProjection([3, 5, 4, 6], sizes, channels=2)
    features = [torch.randn(1, n, *size, requires_grad=True) for n, size in zip([3, 5, 4, 6], sizes)]
    mixed = projection(features)
    assert [x.shape[1] for x in mixed] == projection.channels == [2, 2, 4, 8]
    assert [tuple(x.shape[2:]) for x in mixed] == [(34, 18), *sizes[:-1]]
    for index, output in enumerate(mixed):
        gradients = torch.autograd.grad(output.abs().sum(), features, allow_unused=True, retain_graph=True)
        seen = [gradient is not None and gradient.abs().sum((0, 2, 3)).min().item() > 0 for gradient in gradients]
        assert seen == [other >= index for other in range(4)]  # itself and all that is coarser, every channel
    # It is affine: no nonlinearity hides anything from the heads.
    with torch.no_grad():
        one, two, middle = (projection([c * x for x in features]) for c in (1.0, 2.0, 1.5))
    for a, b, c in zip(one, two, middle):
        torch.testing.assert_close((a + b) / 2, c, atol=1e-5, rtol=1e-5)
    assert not any(parameter.requires_grad for parameter in projection.parameters())


def test_maps_of_one_size_become_a_pyramid():
    torch.manual_seed(0)
    projection = RandomProjection([5] * 4, [(3, 2)] * 4, channels=2)
    features = [torch.randn(1, 5, 3, 2) for _ in range(4)]
    assert [tuple(x.shape[2:]) for x in projection(features)] == [(24, 16), (12, 8), (6, 4), (3, 2)]
    # One patch of the first map becomes 4x4 pixels.
    first = projection.across_channels[0]
    features[0].requires_grad_()
    (seen,) = torch.autograd.grad(first(features[0])[0, :, 4:8, :4].abs().sum(), features[0])
    assert (seen[0, :, 1, 0] != 0).all() and seen.count_nonzero() == 5
    # Of one map there is no pyramid.
    assert RandomProjection([5], [(3, 2)], channels=2)(features[:1])[0].shape == (1, 2, 6, 4)


# Maps of networks shown 224x224 pixels, as EfficientNet-Lite0's and a vision transformer's.
@pytest.mark.parametrize(
    "maps", [[(24, 56), (40, 28), (112, 14), (320, 7)], [(768, 14)] * 4], ids=["pyramid", "transformer"]
)
def test_full_size_is_that_of_the_authors(maps):
    with torch.device("meta"):
        projection = RandomProjection([n for n, _ in maps], [(size, size) for _, size in maps])
        maps = projection([torch.empty(2, n, size, size) for n, size in maps])
        assert ([x.shape[1] for x in maps], [x.shape[2] for x in maps]) == FULL_SIZE
        network = MultiScaleDiscriminator(*FULL_SIZE)
    assert sum(parameter.numel() for parameter in network.parameters()) == 10_331_328
    assert network(maps).shape == (2, 64)


def test_tensors_are_those_of_the_authors():
    file = ORACLE / "keys_discriminator_multiscale.json"
    if not file.exists():
        pytest.skip("the oracle folder is not here")
    theirs = json.loads(file.read_text())
    with torch.device("meta"):
        ours = MultiScaleDiscriminator(*FULL_SIZE)

    def to_official(name):
        name = name.replace("parametrizations.weight.original", "weight_orig")
        name = name.replace("parametrizations.weight.0._", "weight_")
        name = re.sub(r"^heads\.(\d)\.(\d)\.(\d)\.", r"mini_discs.\1.main.\2.main.\3.", name)
        return re.sub(r"^heads\.(\d)\.(\d)\.", r"mini_discs.\1.main.\2.", name)

    found = {
        to_official(name): [list(value.shape), str(value.dtype).removeprefix("torch.")]
        for name, value in ours.state_dict().items()
    }
    assert found == {name: [shape, dtype] for name, shape, dtype in theirs["state_dict"]}
    assert [to_official(name) for name, _ in ours.named_parameters()] == theirs["parameters_in_order"]


@pytest.mark.parametrize("size, logits", [(2, 1), (3, 1), (4, 1), (8, 1), (9, 1), (12, 9), (16, 25), (100, 9)])
def test_heads_fit_maps_of_any_size(size, logits):
    network = MultiScaleDiscriminator([3], [size], channels=2)
    assert network([torch.randn(2, 3, size, size)]).shape == (2, logits)


def test_head_is_convolutions_batch_norm_and_leaky_relu():
    torch.manual_seed(0)
    network = MultiScaleDiscriminator([3], [32], channels=4)
    norms = [module for module in network.modules() if isinstance(module, nn.BatchNorm2d)]
    for norm in norms:
        nn.init.normal_(norm.weight)
        nn.init.normal_(norm.bias)
    image = x = torch.randn(4, 3, 32, 32)
    convolutions = [module for module in network.modules() if isinstance(module, nn.Conv2d)]
    for conv, norm in zip(convolutions, norms):
        x = F.conv2d(x, conv.weight, conv.bias, stride=2, padding=1)
        x = (x - x.mean((0, 2, 3), keepdim=True)) / (x.var((0, 2, 3), keepdim=True, correction=0) + 1e-5).sqrt()
        x = norm.weight.view(-1, 1, 1) * x + norm.bias.view(-1, 1, 1)
        x = x.clamp(min=0) + 0.2 * x.clamp(max=0)
    torch.testing.assert_close(network([image]), F.conv2d(x, convolutions[-1].weight).flatten(1), atol=1e-5, rtol=1e-5)
    assert [conv.out_channels for conv in convolutions] == [16, 32, 1] and x.shape[2:] == (8, 8)


def test_spectral_norm_follows_the_weights_and_forward_passes_do_not_move_it():
    torch.manual_seed(0)
    network = MultiScaleDiscriminator([3, 4], [32, 16], channels=4)
    maps = [torch.randn(4, 3, 32, 32), torch.randn(4, 4, 16, 16)]
    convolutions = [module for module in network.modules() if isinstance(module, nn.Conv2d)]
    assert len(convolutions) == 5

    def largest():
        return torch.stack([torch.linalg.matrix_norm(conv.weight.detach().flatten(1), 2) for conv in convolutions])

    for _ in range(20):
        update_spectral_norm(network)
    torch.testing.assert_close(largest(), torch.ones(5), atol=0.02, rtol=0)
    with torch.no_grad():
        for conv in convolutions:
            conv.parametrizations.weight.original.add_(torch.randn_like(conv.weight), alpha=0.05)
    before = (largest() - 1).abs().max()
    first, again = network.train()(maps), network.train()(maps)
    assert torch.equal(first, again)
    weight = convolutions[0].parametrizations.weight.original.detach().flatten(1)
    v = convolutions[0].parametrizations.weight[0]._v
    for _ in range(3):
        u = F.normalize(weight @ v, dim=0)
        v = F.normalize(weight.T @ u, dim=0)
    update_spectral_norm(network)
    torch.testing.assert_close(convolutions[0].weight.detach().flatten(1), weight / (u @ weight @ v))
    for _ in range(20):
        update_spectral_norm(network)
    assert (largest() - 1).abs().max() < 0.02 < before
    assert not torch.equal(first, network(maps))


# The discriminator


def test_seed_decides_and_the_global_random_state_is_left_alone():
    torch.manual_seed(5)
    before = torch.get_rng_state()
    one, same, other = make(0), make(0), make(1)
    assert torch.equal(before, torch.get_rng_state())
    assert equal(state(one), state(same))
    for name, value in one.state_dict().items():
        if name.endswith(("weight", "original")) and value.ndim == 4:
            assert not torch.equal(value, other.state_dict()[name]), name
    # Both backbones have their own.
    assert not torch.equal(one.projections[0].across_channels[0].weight, one.projections[1].across_channels[0].weight)


def test_other_features_than_at_saving_are_an_error():
    saved, other = make(0).state_dict(), make(0)
    with torch.no_grad():
        other.backbones["b"].stages[0][0].weight[0, 0, 0, 0] += 1e-6
    other = ProjectedDiscriminator(other.backbones, 0, channels=4)
    with pytest.raises(UserError, match="The feature network b .*--discriminator_backbones"):
        other.load_state_dict(saved)
    wrapped = nn.ModuleDict({"module": other})  # as DistributedDataParallel names it
    with pytest.raises(UserError, match="b"):
        wrapped.load_state_dict({f"module.{name}": value for name, value in saved.items()})
    with pytest.raises(RuntimeError, match="fingerprints"):
        make(names="a").load_state_dict(saved)
    larger = ProjectedDiscriminator({"a": TinyBackbone(resolution=34), "b": TinyBackbone(seed=1)}, 0, channels=4)
    with pytest.raises(UserError, match="The feature network a .*--discriminator_resolution"):
        larger.load_state_dict(saved)


def test_features_are_frozen_in_eval_mode_and_follow_the_device():
    discriminator = make().train()
    backbone = discriminator.backbones["a"]
    assert not any(module.training for module in backbone.modules())
    assert not any(parameter.requires_grad for parameter in backbone.parameters())
    learn = {name for name, parameter in discriminator.named_parameters() if parameter.requires_grad}
    assert learn == {name for name, _ in discriminator.named_parameters() if name.startswith("discriminators.")}
    discriminator.to(torch.float64)
    assert {value.dtype for value in backbone.parameters()} == {torch.float64}
    discriminator.to("meta")
    assert backbone.stages[0][0].weight.is_meta and discriminator.fingerprints.is_meta


def test_logits_are_of_augmented_images_and_each_part_has_its_own_statistics():
    discriminator, x = make(), images(6)
    augment = discriminator.draw_augment(uniform(3), 16, 16, parts=2)
    assert not torch.equal(augment[0].brightness, augment[1].brightness)
    both = discriminator(x, augment, parts=2)
    for index, backbone in enumerate(discriminator.backbones.values()):
        shown = diff_augment(x, augment[index])
        maps = discriminator.projections[index](backbone(shown))
        for logits, part in zip(both[index].chunk(2), (slice(0, 3), slice(3, 6))):
            expected = discriminator.discriminators[index]([m[part] for m in maps])
            torch.testing.assert_close(logits, expected, atol=1e-6, rtol=1e-6)
    assert not torch.allclose(both[0], discriminator(x, augment)[0], atol=1e-3)
    assert make(augment=False).draw_augment(uniform(3), 16, 16) is None


def test_the_generators_step_changes_nothing_and_has_the_gradient_of_the_images():
    discriminator, x = make(), images().requires_grad_()
    before = state(discriminator)
    loss = generator_loss(discriminator, x)
    loss.backward()
    assert equal(before, state(discriminator))
    assert all(parameter.grad is None for parameter in discriminator.parameters())
    gradient = x.grad.clone()
    assert (gradient.flatten(1).norm(dim=1) > 0).all()
    # It is the same function as in the discriminator's step.
    assert torch.equal(loss, generator_hinge_loss(discriminator(x)))
    assert not equal(before, state(discriminator))  # there the running averages move
    # The gradient is right: a step along it moves the loss as it says.
    direction = gradient / gradient.norm()
    with torch.no_grad():
        up, down = (generator_loss(discriminator, x + sign * 2e-3 * direction) for sign in (1, -1))
    assert ((up - down) / 4e-3).item() == pytest.approx(gradient.norm().item(), rel=0.05)
    with pytest.raises(RuntimeError, match="inside"), discriminator.frozen():
        raise RuntimeError("inside")
    assert all(parameter.requires_grad for parameter in discriminator.discriminators.parameters())


def test_the_discriminators_step_is_the_loss_of_both_batches_and_reaches_the_heads_only():
    discriminator = make()
    fake, real = images(seed=1).requires_grad_(), images(seed=2)
    augment = discriminator.draw_augment(uniform(), 16, 16, parts=2)
    loss = discriminator_loss(discriminator, real, fake, augment)

    def part(rows):
        return [
            DiffAugmentParameters(**{name: value[rows] for name, value in vars(parameters).items()})
            for parameters in augment
        ]

    fake_logits = discriminator(fake, part(slice(0, 4)))
    real_logits = discriminator(real, part(slice(4, 8)))
    torch.testing.assert_close(loss, discriminator_hinge_loss(real_logits, fake_logits), atol=1e-5, rtol=1e-5)
    loss.backward()
    assert fake.grad is None
    for name, parameter in discriminator.named_parameters():
        assert (parameter.grad is not None) == name.startswith("discriminators."), name


def test_training_separates_two_distributions():
    options = DiscriminatorOptions(discriminator_weight=1)
    discriminator = make(names="a", channels=8)
    optimizer = discriminator_optimizer(options, discriminator)
    wave = torch.linspace(0, 6, 8).sin()

    def batch(seed):  # stripes along one axis or the other, in noise
        noise = 0.25 * images(16, height=8, width=8, seed=seed)
        return 0.5 * wave[:, None] + noise, 0.5 * wave[None, :] + noise.flip(0)

    losses = []
    for step in range(50):
        real, fake = batch(step)
        augment = discriminator.draw_augment(uniform(16, seed=step), 8, 8, parts=2)
        loss = discriminator_loss(discriminator, real, fake, augment)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[0] > 1.5 and sum(losses[-5:]) / 5 < 0.6
    real, fake = batch(1000)
    with torch.no_grad(), discriminator.frozen():
        assert (discriminator(real)[0].mean(1) > 0).all() and (discriminator(fake)[0].mean(1) < 0).all()


def test_optimizer_updates_the_spectral_norm():
    discriminator = make(names="a")
    optimizer = discriminator_optimizer(DiscriminatorOptions(discriminator_learning_rate=0.1), discriminator)
    assert isinstance(optimizer, torch.optim.RAdam)
    assert (optimizer.defaults["lr"], optimizer.defaults["betas"]) == (0.1, (0.5, 0.9))
    other = copy.deepcopy(discriminator)
    for parameter in discriminator.discriminators.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    assert not equal(state(discriminator), state(other))
    with torch.no_grad():
        for ours, theirs in zip(discriminator.parameters(), other.parameters()):
            theirs.copy_(ours)
    assert not equal(state(discriminator), state(other))
    update_spectral_norm(other)
    assert equal(state(discriminator), state(other))


@pytest.mark.parametrize("channels, height, width", [(1, 8, 8), (3, 13, 29), (1, 3, 2)])
def test_gray_images_and_odd_sizes(channels, height, width):
    discriminator = make(image_channels=channels)
    x = images(4, channels, height, width)
    logits = discriminator(x, discriminator.draw_augment(uniform(), height, width))
    assert len(logits) == 2 and all(value.isfinite().all() and value.std() > 0 for value in logits)
    if channels == 1:  # saturation has nothing to act on
        dull, bright = (diff_augment(x, unchanged(4, saturation=[value] * 4)) for value in (0.0, 2.0))
        torch.testing.assert_close(dull, bright)


def test_all_of_it_runs_in_float32_under_autocast():
    discriminator, x = make(), images(8)
    exact = discriminator(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert discriminator.backbones["a"](x)[0].dtype == torch.bfloat16
        again = discriminator(x)
        rounded = discriminator(x.bfloat16())
    for a, b, c in zip(exact, again, rounded):
        assert torch.equal(a, b) and c.dtype == torch.float32 and (a - c).norm() < 0.1 * a.norm()


# Losses


def test_hinge_losses_and_their_gradients():
    real = [torch.tensor([[2.0, 0.5], [-1.0, 1.0]], requires_grad=True), torch.tensor([[0.0], [3.0]])]
    fake = [torch.tensor([[-2.0, -0.5], [1.0, 0.0]], requires_grad=True), torch.tensor([[0.0], [-3.0]])]
    # real: (0 + .5 + 2 + 0) / 4 and (1 + 0) / 2; fake: (0 + .5 + 2 + 1) / 4 and (1 + 0) / 2
    loss = discriminator_hinge_loss(real, fake)
    assert loss.item() == pytest.approx((2.5 / 4 + 3.5 / 4 + 0.5 + 0.5) / 2)
    loss.backward()
    assert real[0].grad.tolist()[0] == [0, -0.125] and real[0].grad[1, 0] == -0.125
    assert fake[0].grad.tolist() == [[0, 0.125], [0.125, 0.125]]
    fake[0].grad = None
    loss = generator_hinge_loss(fake)
    assert loss.item() == pytest.approx((1.5 / 4 + 1.5) / 2)
    loss.backward()
    assert fake[0].grad.unique().tolist() == [-0.125]
    zeros = [torch.zeros(3, 5)]
    assert discriminator_hinge_loss(zeros, zeros) == 2 and generator_hinge_loss(zeros) == 0


def test_weight_of_the_generators_loss():
    gradient = torch.tensor([3.0, 4.0])
    assert generator_weight(gradient, gradient).item() == pytest.approx(1, abs=1e-4)
    assert generator_weight(gradient, 5 * gradient).item() == pytest.approx(0.2, abs=1e-4)
    assert generator_weight(0 * gradient, gradient).item() == pytest.approx(0.01)
    assert generator_weight(gradient, 0 * gradient).item() == 10


# The authors' step


def test_discriminator_step_equals_the_authors(oracle):
    arrays = {name: torch.from_numpy(value) for name, value in oracle("loss_gan.npz").items()}
    discriminator = stub_discriminator(oracle("stub_gan_nets.npz"))
    augment = []
    for index in range(2):
        fake, real = (augment_of(arrays, f"d_aug{2 * index + part}_") for part in range(2))
        augment.append(
            DiffAugmentParameters(*(torch.cat(pair) for pair in zip(vars(fake).values(), vars(real).values())))
        )
    seen = []
    discriminator.register_forward_hook(lambda module, inputs, outputs: seen.extend(outputs))
    loss = discriminator_loss(discriminator, arrays["d_x_start"], arrays["d_estimate"], augment)
    for index, logits in enumerate(part for both in seen for part in both.chunk(2)):
        torch.testing.assert_close(logits, arrays[f"d_logits{index}"], atol=1e-4, rtol=1e-5)
    torch.testing.assert_close(loss, arrays["d_d_loss"], atol=0, rtol=1e-4)
    loss.backward()
    compared = 0
    for name in (name for name in arrays if name.startswith("d_grad__")):
        _, backbone, layer = name.removeprefix("d_grad__").split(".", 2)
        gradient = discriminator.discriminators["ab".index(backbone)].get_parameter(layer).grad
        scale = arrays[name].abs().max().item()
        torch.testing.assert_close(gradient, arrays[name], atol=1e-4 * scale, rtol=0)
        compared += 1
    assert compared == 8


# Options


@pytest.mark.parametrize(
    "name, value",
    [
        ("discriminator_weight", -1.0),
        ("discriminator_period", 1),
        ("discriminator_backbones", []),
        ("discriminator_backbones", ["a", "a"]),
        ("discriminator_resolution", 0),
    ],
)
def test_impossible_options_are_named(name, value):
    with pytest.raises(UserError, match=f"--{name} must be"):
        DiscriminatorOptions(**{name: value})


def test_turns():
    options = DiscriminatorOptions(discriminator_weight=1, discriminator_start=3, discriminator_period=2)
    assert [step for step in range(9) if is_discriminator_step(options, step)] == [4, 6, 8]
    options = DiscriminatorOptions(discriminator_weight=1, discriminator_period=3)
    assert [step for step in range(9) if is_discriminator_step(options, step)] == [2, 5, 8]
    assert not any(is_discriminator_step(DiscriminatorOptions(), step) for step in range(9))


def test_options_make_the_discriminator(monkeypatch):
    asked = []

    def load_backbone(name, resolution=None):
        asked.append((name, resolution))
        return TinyBackbone(resolution or 32)

    monkeypatch.setattr(adversarial, "load_backbone", load_backbone)
    options = DiscriminatorOptions(
        discriminator_backbones=["one", "two"],
        discriminator_resolution=48,
        discriminator_channels=4,
        discriminator_augment=False,
    )
    discriminator = make_discriminator(options, 1, 3)
    assert asked == [("one", 48), ("two", 48)] and list(discriminator.backbones) == ["one", "two"]
    backbones = {name: TinyBackbone(48) for name in ("one", "two")}
    assert equal(state(discriminator), state(ProjectedDiscriminator(backbones, 3, 1, channels=4)))
    assert discriminator.draw_augment(uniform(), 8, 8) is None
    with pytest.raises(UserError, match="4 channels"):
        make_discriminator(options, 4, 3)
