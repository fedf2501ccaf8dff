# Copyright 2026 The diffusers-ctm authors. Licensed under the Apache License, Version 2.0.
"""EDMUNet2DModel: its options against formulas, and the programs and pipelines that it goes through."""

import math

import pytest
import torch
from diffusers import DiffusionPipeline, UNet2DModel
from diffusers.models.attention_processor import Attention
from diffusers.models.downsampling import FirDownsample2D
from diffusers.models.resnet import ResnetBlock2D
from torch import nn

from diffusers_ctm import CTMPipeline, CTMScheduler, CTMUNet2DModel, EDMHeunScheduler, EDMUNet2DModel
from diffusers_ctm.preconditioning import Preconditioning
from helpers.comparing import close
from helpers.exact import randn
from helpers.tiny_networks import EDM_KINDS, NCSNPP, inputs, make_edm, times
from training.networks.student import make_student, set_dropout


both_times = pytest.mark.parametrize("target_time", [False, True], ids=["one time", "two times"])


# Growing from a teacher -----------------------------------------------------------------------------------------------


def test_students_of_both_families(make_unet):
    teacher = make_edm(dropout=0.13, num_class_embeds=7)
    student = make_student(teacher)
    assert type(student) is EDMUNet2DModel and student.has_target_time
    other = make_student(make_unet(UNet2DModel))
    assert type(other) is CTMUNet2DModel and other.has_target_time
    set_dropout(student, 0.4)
    assert student.config.dropout == 0.4 and teacher.config.dropout == 0.13
    probabilities = [module.dropout.p for module in student.modules() if isinstance(module, ResnetBlock2D)]
    assert probabilities == [0.4] * 10
    built = make_student(make_edm(dropout=0.4))
    assert [module.dropout.p for module in built.modules() if isinstance(module, ResnetBlock2D)] == probabilities


# Teachers whose truth is known ----------------------------------------------------------------------------------------


def test_a_new_network_is_almost_the_exact_teacher():
    """EDM's start: the last layer has gain 1e-5."""
    unet = make_edm(random=False)
    sample, t, _, _ = inputs(unet)
    assert 0 < unet(sample, t).sample.abs().max() < 1e-3
    assert unet.conv_in.weight.abs().max() <= math.sqrt(6 / (9 * 3 + 9 * 8))  # Xavier uniform


def test_training_without_labels_reaches_every_weight():
    """Labels and augmentation left out leave no weight without gradient, as distributed training demands."""
    student = make_student(make_edm(num_class_embeds=7, augment_dim=9)).train()
    sample, t, s, _ = inputs(student)
    student(sample, t, s).sample.square().mean().backward()
    assert not [name for name, parameter in student.named_parameters() if parameter.grad is None]


# The second time, classes, augmentation -------------------------------------------------------------------------------


@pytest.mark.parametrize("changes", [EDM_KINDS["classes"], EDM_KINDS["NCSN++"]], ids=["DDPM++", "NCSN++"])
def test_equals_one_linear_layer_per_time_added(changes):
    """The authors' network: affine(emb) + affine_s(emb_s), both embeddings of one projection plus the same class."""
    student = make_edm(target_time=True, **changes)
    sample, t, s, condition = inputs(student)
    plain, second_half = make_edm(**changes), {}
    weights = {}
    for name, weight in student.state_dict().items():
        if name.endswith("time_emb_proj.weight"):
            weight, second_half[name.removesuffix(".weight")] = weight.chunk(2, dim=1)
        if not name.startswith("target_time_embedding."):
            weights[name] = weight
    plain.load_state_dict(weights)

    if student.config.time_embedding_type == "positional":
        frequencies = 10000.0 ** -(torch.arange(4) / 3)  # both ends of [1e-4, 1]
    else:
        frequencies = 2 * math.pi * student.time_proj.frequency_bits.view(torch.float32)
    angles = s[:, None] * frequencies
    emb_s = torch.cat([angles.sin(), angles.cos()], dim=1)
    one_hot = math.sqrt(7) * torch.eye(7)[condition["class_labels"]]
    emb_s = emb_s + one_hot @ student.class_embedding.weight.T + student.class_embedding.bias
    if "augment_labels" in condition:
        emb_s = emb_s + condition["augment_labels"] @ student.augment_embedding.weight.T
    for layer in (student.target_time_embedding.linear_1, student.target_time_embedding.linear_2):
        emb_s = nn.functional.silu(layer(emb_s))
    for name, extra in second_half.items():
        plain.get_submodule(name).register_forward_hook(
            lambda module, args, output, extra=extra: output + emb_s @ extra.T
        )
    assert len(second_half) == 10
    close(student(sample, t, s, **condition).sample, plain(sample, t, **condition).sample)


def test_what_the_network_does_not_have():
    unet = make_edm()
    sample, t, s, _ = inputs(unet)
    with pytest.raises(ValueError, match="target_timestep was given.*no target time"):
        unet(sample, t, s)
    with pytest.raises(ValueError, match="class_labels were given"):
        unet(sample, t, class_labels=torch.arange(3))
    with pytest.raises(ValueError, match="augment_labels were given"):
        unet(sample, t, augment_labels=torch.zeros(3, 9))


@pytest.mark.parametrize(
    "name, value",
    [
        ("time_embedding_type", "learned"),
        ("encoder_type", "dense"),
        ("decoder_type", "residual"),
        ("resample_filter", (1, 2, 1)),
    ],
)
def test_options_that_do_not_exist(name, value):
    with pytest.raises(ValueError, match=f"^{name}=.*is not known; use one of"):
        make_edm(**{name: value})


@both_times
def test_classes(target_time):
    unet = make_edm(num_class_embeds=7, target_time=target_time)
    sample, t, s, condition = inputs(unet)
    pair = times(unet, t, s)
    numbers = condition["class_labels"]
    output = unet(sample, *pair, class_labels=numbers).sample
    close(unet(sample, *pair, class_labels=torch.eye(7)[numbers]).sample, output)
    nothing = unet(sample, *pair).sample
    close(unet(sample, *pair, class_labels=torch.zeros(3, 7)).sample, nothing)
    assert (output - nothing).abs().max() > 1e-3
    assert (output - unet(sample, *pair, class_labels=numbers + 1).sample).abs().max() > 1e-3
    with pytest.raises(ValueError, match=r"class_labels must be 3 class numbers or floats of shape \(3, 7\)"):
        unet(sample, *pair, class_labels=torch.zeros(3, 6))
    with pytest.raises(ValueError, match="class_labels must be"):
        unet(sample, *pair, class_labels=torch.zeros(2, dtype=torch.long))


def test_label_dropout_leaves_the_class_out_in_training_only():
    unet = make_edm(target_time=True, num_class_embeds=7, label_dropout=0.5)
    sample = randn(1, 3, 8, 8, dtype=torch.float32).repeat(64, 1, 1, 1)
    labels = torch.full((64,), 2)
    with torch.no_grad():
        with_class, without = unet(sample, 0.1, -1.0, labels).sample, unet(sample, 0.1, -1.0).sample
        torch.manual_seed(0)
        trained = unet.train()(sample, 0.1, -1.0, labels).sample
    dropped = (trained - without).abs().amax((1, 2, 3)) < 1e-5
    kept = (trained - with_class).abs().amax((1, 2, 3)) < 1e-5
    assert (dropped ^ kept).all() and 16 <= dropped.sum() <= 48


@both_times
def test_augment_labels(target_time):
    unet = make_edm(augment_dim=9, target_time=target_time)
    sample, t, s, condition = inputs(unet)
    output = unet(sample, *times(unet, t, s), **condition).sample
    plain = unet(sample, *times(unet, t, s)).sample
    assert torch.equal(plain, unet(sample, *times(unet, t, s), augment_labels=torch.zeros(3, 9)).sample)
    assert (output - plain).abs().max() > 1e-3


# Ways of the image through the network --------------------------------------------------------------------------------


@pytest.mark.parametrize("taps", [(1, 1), (1, 3, 3, 1)])
def test_the_residual_encoder_filters_what_its_convolution_gives(taps):
    """EDM's fused layer: the image padded once, the convolution, then the filter with stride 2."""
    block = make_edm(encoder_type="residual", resample_filter=taps).down_blocks[1]
    layer, image = block.image_downsample.Conv2d_0, randn(2, 3, 8, 8, dtype=torch.float32)
    kernel = torch.tensor(taps, dtype=torch.float32) / sum(taps)
    kernel = torch.outer(kernel, kernel)[None, None].repeat(8, 1, 1, 1)
    convolved = nn.functional.conv2d(image, layer.weight, layer.bias, padding=1 + (len(taps) - 1) // 2)
    close(block.image_downsample(image), nn.functional.conv2d(convolved, kernel, stride=2, groups=8))
    theirs = FirDownsample2D(3, 8, use_conv=True, fir_kernel=taps)
    theirs.load_state_dict(block.image_downsample.state_dict())
    close(block.image_downsample(image), theirs(image))


@pytest.mark.parametrize(
    "part, kind", [("encoder_type", "skip"), ("encoder_type", "residual"), ("decoder_type", "skip")]
)
@both_times
def test_other_encoders_and_decoders_are_the_standard_one_and_more(part, kind, target_time):
    """They keep every standard weight. Without their own (and sqrt(1/2) of "residual") they are the standard one."""
    standard = make_edm(target_time=target_time)
    other = make_edm(target_time=target_time, **{part: kind})
    missing, unexpected = other.load_state_dict(standard.state_dict(), strict=False)
    assert missing and not unexpected
    sample, t, s, _ = inputs(standard)
    pair = times(standard, t, s)
    expected = standard(sample, *pair).sample
    assert (other(sample, *pair).sample - expected).abs().max() > 1e-2
    for name in missing:
        other.get_parameter(name).data.zero_()
    if kind == "residual":
        other.down_blocks[1].resnets[0].output_scale_factor /= math.sqrt(2)
    close(other(sample, *pair).sample, expected)


def test_a_residual_block_is_that_of_the_paper():
    """(x + conv(silu(norm(conv(silu(norm(x))) + linear(silu(emb)))))) / sqrt(2), groups of 4 channels, 32 at most."""
    block = make_edm().down_blocks[1].resnets[1]
    x, emb = randn(2, 8, 4, 4, dtype=torch.float32), randn(2, 32, seed=1, dtype=torch.float32)
    silu, norm = nn.functional.silu, nn.functional.group_norm
    h = block.conv1(silu(norm(x, 2, block.norm1.weight, block.norm1.bias, 1e-6)))
    h = h + block.time_emb_proj(silu(emb))[:, :, None, None]
    h = block.conv2(silu(norm(h, 4, block.norm2.weight, block.norm2.bias, 1e-6)))
    close(block(x, emb), (block.conv_shortcut(x) + h) / math.sqrt(2))
    wide = make_edm(model_channels=256, block_out_channels=(256,), attention_levels=())
    assert wide.down_blocks[0].resnets[0].norm1.num_groups == wide.conv_norm_out.num_groups == 32


def test_where_attention_is():
    def attended(unet):
        return {name for name, module in unet.named_modules() if isinstance(module, Attention)}

    middle = "mid_block.attentions.0"
    assert attended(make_edm(attention_levels=())) == {middle}
    assert attended(make_edm()) == {middle, "down_blocks.1.attentions.1", "up_blocks.0.attentions.1"}
    found = attended(make_edm(attention_levels=(0,), layers_per_block=2))
    assert found == {middle, "down_blocks.0.attentions.0", "down_blocks.0.attentions.1", "up_blocks.1.attentions.3"}


# Saving, loading, sampling --------------------------------------------------------------------------------------------


@both_times
def test_pipelines_save_load_and_sample(target_time, tmp_path):
    unet = make_edm(target_time=target_time, num_class_embeds=3)
    scheduler = CTMScheduler(timestep_scale=1.0) if target_time else EDMHeunScheduler(timestep_scale=1.0)
    CTMPipeline(unet, scheduler, id2label={0: "ant", 1: "bee", 2: "cow"}).save_pretrained(tmp_path)
    pipe = DiffusionPipeline.from_pretrained(tmp_path)
    pipe.set_progress_bar_config(disable=True)
    assert type(pipe) is CTMPipeline and type(pipe.unet) is EDMUNet2DModel and type(pipe.scheduler) is type(scheduler)

    start = randn(2, 3, 8, 8, dtype=torch.float32)
    options = {"class_labels": ["cow", "ant"], "latents": start, "output_type": "latent"}
    images = pipe(num_inference_steps=1, **options).images
    condition, preconditioning = {"class_labels": torch.tensor([2, 0])}, Preconditioning(0.5, 1.0)
    if target_time:
        expected = preconditioning.jump(unet, 80 * start, torch.tensor(80.0), torch.tensor(0.002), **condition)
        assert pipe(num_inference_steps=2, gamma=0.5, **options).images.isfinite().all()
    else:
        expected = preconditioning.denoise(unet, 80 * start, torch.tensor(80.0), **condition)  # one step: to D
    close(images, expected.detach(), atol=1e-4)


def test_a_ctm_scheduler_needs_the_target_time():
    with pytest.raises(ValueError, match="CTMScheduler needs a network with two times, and EDMUNet2DModel has one"):
        CTMPipeline(make_edm(), CTMScheduler(timestep_scale=1.0))


# Precision, memory, speed ---------------------------------------------------------------------------------------------


def test_random_frequencies_are_not_rounded(tmp_path):
    unet = make_edm(target_time=True, **NCSNPP)
    frequencies = unet.time_proj.frequency_bits.view(torch.float32).clone()
    assert not torch.equal(frequencies.bfloat16().float(), frequencies)
    unet.save_pretrained(tmp_path)
    loaded = EDMUNet2DModel.from_pretrained(tmp_path, dtype=torch.bfloat16)
    for low in (unet.to(torch.bfloat16), loaded, EDMUNet2DModel.from_unet(make_edm(**NCSNPP).half())):
        assert torch.equal(low.time_proj.frequency_bits.view(torch.float32), frequencies)
    close(loaded.time_proj(torch.tensor([0.7]))[0, :8], (2 * math.pi * 0.7 * frequencies).sin())
