# Copyright 2026 The diffusers-ctm authors. Licensed under the Apache License, Version 2.0.
"""CTMDiTTransformer2DModel against diffusers' DiT, where its second time enters, and the pipelines it goes through."""

import pytest
import torch
from diffusers import DiffusionPipeline, DiTTransformer2DModel
from torch import nn
from torch._dynamo.testing import CompileCounter

from diffusers_ctm import CTMDiTTransformer2DModel, CTMPipeline, CTMScheduler, EDMHeunScheduler
from helpers.comparing import close
from helpers.exact import randn
from helpers.tiny_networks import DIT_TINY, fill, inputs, make_dit
from training.networks.student import make_student


TIMESTEPS = torch.tensor([0, 500, 999])


def make_theirs(**changes):
    """diffusers' own network at tiny size, of 6 classes and with variances, every weight random."""
    options = {**DIT_TINY, "out_channels": 6, "num_embeds_ada_norm": 6, **changes}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return fill(DiTTransformer2DModel(**options)).eval()


def sample_of(network, batch=3):
    config = network.config
    return randn(batch, config.in_channels, config.sample_size, config.sample_size, dtype=torch.float32)


# Growing from a teacher -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"patch_size": 4, "in_channels": 2, "out_channels": 4},
        {"patch_size": 1, "sample_size": 4, "norm_elementwise_affine": True, "attention_bias": False},
        {"out_channels": None, "upcast_attention": True, "norm_eps": 1e-2},
    ],
    ids=["patches of 2", "patches of 4", "pixels", "no variances"],
)
def test_it_equals_diffusers_without_the_variances(changes):
    theirs = make_theirs(**changes)
    ours = CTMDiTTransformer2DModel.from_unet(theirs, target_time=False)
    sample, labels = sample_of(theirs), torch.tensor([0, 5, 6])  # the last is diffusers' "no class"
    channels = theirs.config.in_channels
    expected = theirs(sample, TIMESTEPS, labels).sample[:, :channels]
    assert expected.abs().mean() > 0.1 and (expected[:, 0] - expected[:, -1]).abs().mean() > 0.1
    close(ours(sample, TIMESTEPS.float(), class_labels=labels).sample, expected, rtol=1e-6, atol=1e-6)

    assert ours.config.in_channels == ours.config.out_channels == channels and ours.config.num_class_embeds == 7
    assert not ours.has_target_time and not ours.training
    for name, weight in theirs.state_dict().items():
        if not name.startswith("proj_out_2."):
            assert torch.equal(ours.state_dict()[name], weight), name
    assert ours.state_dict().keys() == theirs.state_dict().keys()


def test_a_student_is_its_teacher_to_the_last_bit():
    theirs = make_theirs()
    teacher = CTMDiTTransformer2DModel.from_unet(theirs, target_time=False)
    sample, labels, t = sample_of(theirs), torch.tensor([0, 5, 6]), TIMESTEPS.float()
    expected = teacher(sample, t, class_labels=labels).sample
    for student in (CTMDiTTransformer2DModel.from_unet(theirs), make_student(teacher)):
        for target in (0.5 * t, t, None, torch.tensor(-3.0)):
            assert torch.equal(student(sample, t, target, labels).sample, expected)
        weights = student.state_dict()
        added = {name.removeprefix("target_time_embedding."): weights[name] for name in weights if "target" in name}
        assert len(added) == 4 and len(weights) == 4 + len(teacher.state_dict())
        first = teacher.transformer_blocks[0].norm1.emb.timestep_embedder.linear_1
        assert torch.equal(added["linear_1.weight"], first.weight) and torch.equal(added["linear_1.bias"], first.bias)
        assert not added["linear_2.weight"].any() and not added["linear_2.bias"].any()


def test_a_network_of_other_channels_is_no_teacher():
    with pytest.raises(ValueError, match="channels as it takes, 3, or twice as many, with variances; this one gives 4"):
        CTMDiTTransformer2DModel.from_unet(make_theirs(out_channels=4))


def test_diffusers_folder_is_not_loaded_without_its_classes(tmp_path):
    make_theirs().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="config of a DiTTransformer2DModel. Load it as one, and pass .*from_unet"):
        CTMDiTTransformer2DModel.from_pretrained(tmp_path)


def test_a_pipeline_says_how_diffusers_network_becomes_ours():
    theirs = make_theirs()
    scheduler = EDMHeunScheduler(prediction_type="epsilon", beta_schedule="linear", sigma_min=0.02)
    with pytest.raises(ValueError, match="predicts variances and takes whole timesteps only. Pass `CTMDiT.*Heun"):
        CTMPipeline(theirs, scheduler)
    pipe = CTMPipeline(CTMDiTTransformer2DModel.from_unet(theirs, target_time=False), scheduler, null_class=6)
    assert pipe(class_labels=2, num_inference_steps=2, output_type="pt").images.shape == (1, 3, 8, 8)


def test_a_new_network_is_the_exact_teacher():
    """DiT's start: the output is zero, and training can leave it."""
    network = make_dit(random=False, num_class_embeds=7)
    sample, t, _, condition = inputs(network)
    optimizer = torch.optim.Adam(network.parameters(), lr=0.1)
    assert not network(sample, t, **condition).sample.any()
    for _ in range(3):  # each step reaches what the layers behind it had kept at zero
        optimizer.zero_grad()
        (network(sample, t, **condition).sample - sample).square().mean().backward()
        optimizer.step()
    still = [name for name, parameter in network.named_parameters() if not parameter.grad.any()]
    assert still == []


# The second time ------------------------------------------------------------------------------------------------------


def test_the_target_adds_to_the_embedding_of_every_block():
    """linear_2(silu(linear_1(cos and sin of s))), as if the time's embedding had a larger bias, in the output too."""
    student = make_dit(target_time=True, num_class_embeds=7)
    sample, t, _, condition = inputs(student)
    angles = 0.37 * 10000.0 ** -(torch.arange(128) / 127)
    layers = student.target_time_embedding
    shared = layers.linear_2(nn.functional.silu(layers.linear_1(torch.cat([angles.cos(), angles.sin()]))))

    plain = make_dit(num_class_embeds=7)
    plain.load_state_dict({name: w for name, w in student.state_dict().items() if name in plain.state_dict()})
    expected = student(sample, t, 0.37, **condition).sample
    for block in reversed(plain.transformer_blocks):
        assert (plain(sample, t, **condition).sample - expected).abs().max() > 1e-2
        block.norm1.emb.timestep_embedder.linear_2.bias.data += shared
    close(plain(sample, t, **condition).sample, expected, rtol=1e-4, atol=1e-4)


def test_the_output_layer_reads_the_target():
    student = make_dit(target_time=True)
    sample, t, s, _ = inputs(student)
    for block in student.transformer_blocks:  # blocks that change nothing
        for parameter in block.norm1.linear.parameters():
            parameter.data.zero_()
    assert (student(sample, t, s).sample - student(sample, t, 0.5 * s).sample).abs().max() > 1e-2


def test_training_reaches_every_weight_of_a_student():
    student = make_student(make_dit(num_class_embeds=7)).train()
    sample, t, s, condition = inputs(student)
    optimizer = torch.optim.SGD(student.parameters(), lr=0.1)
    for step in range(2):
        optimizer.zero_grad()
        student(sample, t, s, **condition).sample.square().mean().backward()
        assert not [name for name, parameter in student.named_parameters() if parameter.grad is None]
        layers = student.target_time_embedding
        assert layers.linear_2.weight.grad.abs().max() > 0
        # through weights of zero, nothing reaches what is before them
        assert (layers.linear_1.weight.grad.abs().max() > 0) == (step > 0)
        optimizer.step()
    assert (student(sample, t, s, **condition).sample - student(sample, t, t, **condition).sample).abs().max() > 1e-6


def test_times_between_whole_timesteps():
    """The network is smooth in them: half a timestep is close to the mean of its neighbors, and to neither."""
    network = CTMDiTTransformer2DModel.from_unet(make_theirs(), target_time=False)
    sample, labels = sample_of(network), torch.tensor([0, 5, 6])
    low, between, high = (network(sample, time, class_labels=labels).sample for time in (500.0, 500.1, 500.2))
    step = (high - low).abs().max()
    assert step > 1e-3 and (between - (low + high) / 2).abs().max() < 0.1 * step


# Classes --------------------------------------------------------------------------------------------------------------


def test_no_label_is_dropped_in_training():
    """diffusers' network drops labels by itself, those of each block by another draw."""
    theirs = make_theirs()
    ours = CTMDiTTransformer2DModel.from_unet(theirs, target_time=False)
    sample, labels, t = sample_of(theirs, 32), torch.arange(32) % 6, torch.full((32,), 300)
    expected = ours(sample, t.float(), class_labels=labels).sample
    theirs.train(), ours.train()
    assert torch.equal(ours(sample, t.float(), class_labels=labels).sample, expected)
    assert (theirs(sample, t, labels).sample[:, :3] - expected).abs().max() > 1e-2


def test_dropout_is_in_training_only():
    network = make_dit(dropout=0.5)
    sample, t, _, _ = inputs(network)
    assert torch.equal(network(sample, t).sample, make_dit()(sample, t).sample)
    network.train()
    assert not torch.equal(network(sample, t).sample, network(sample, t).sample)
    student = make_student(network, dropout=0.25)
    assert student.config.dropout == 0.25
    assert [module.p for module in student.modules() if isinstance(module, nn.Dropout) and module.p] == [0.25] * 2


def test_pipelines_save_load_and_guide(tmp_path):
    network = make_dit(target_time=True, num_class_embeds=4)
    names = {0: "ant", 1: "bee", 2: "cow"}
    scheduler = CTMScheduler(prediction_type="epsilon", beta_schedule="linear", sigma_min=0.02)
    CTMPipeline(network, scheduler, id2label=names, null_class=3).save_pretrained(tmp_path)
    pipe = DiffusionPipeline.from_pretrained(tmp_path)
    pipe.set_progress_bar_config(disable=True)
    assert type(pipe) is CTMPipeline and type(pipe.unet) is CTMDiTTransformer2DModel and pipe.num_classes == 3
    start = randn(1, 3, 8, 8, dtype=torch.float32)
    options = {"class_labels": "cow", "latents": start, "output_type": "latent", "num_inference_steps": 1}
    images = {scale: pipe(guidance_scale=scale, **options).images for scale in (0.0, 1.0, 3.0)}
    sigmas = torch.tensor(scheduler.config.sigma_max), torch.tensor(scheduler.config.sigma_min)
    for scale, label in ((0.0, 3), (1.0, 2)):
        labels = torch.tensor([label])
        expected = scheduler.preconditioning.jump(network, sigmas[0] * start, *sigmas, class_labels=labels)
        close(images[scale], expected, rtol=1e-4, atol=1e-3)
    assert (images[0.0] - images[1.0]).abs().max() > 1
    close(images[3.0], images[0.0] + 3 * (images[1.0] - images[0.0]), rtol=1e-4, atol=1e-2)


def test_what_the_network_does_not_have():
    network, conditional = make_dit(), make_dit(num_class_embeds=7)
    sample, t, s, _ = inputs(network)
    with pytest.raises(ValueError, match="target_timestep was given.*no target time"):
        network(sample, t, s)
    with pytest.raises(ValueError, match="class_labels were given"):
        network(sample, t, class_labels=torch.arange(3))
    with pytest.raises(ValueError, match="class_labels should be provided"):
        conditional(sample, t)


def test_its_blocks_are_compiled_once_for_all():
    network, counter = make_dit(target_time=True, num_class_embeds=7, num_layers=5), CompileCounter()
    sample, t, s, condition = inputs(network)
    expected = network(sample, t, s, **condition).sample
    network.compile_repeated_blocks(backend=counter, fullgraph=True)
    close(network(sample, t, s, **condition).sample, expected)
    assert counter.frame_count == 1


# Sizes ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [(8, 16), (8, 4)])
def test_positions_of_samples_that_are_not_square(size):
    """A network of their size, and one of squares that is shown them, have the same positions."""
    own, square = make_dit(sample_size=size), make_dit(sample_size=8)
    sample = randn(2, 3, *size, dtype=torch.float32)
    close(own(sample, 0.3).sample, square(sample, 0.3).sample)
    positions = own.pos_embed.pos_embed[0]
    assert len(positions) == size[0] * size[1] // 4 and torch.cdist(positions, positions).fill_diagonal_(9).min() > 0.1


def test_patches_come_out_where_they_came_in():
    """Without positions and attention each patch is alone: a mosaic gives the mosaic of outputs."""
    network = make_dit(sample_size=(4, 6))
    network.pos_embed.pos_embed.zero_()
    for block in network.transformer_blocks:
        for parameter in block.attn1.to_out.parameters():
            parameter.data.zero_()
    sample = randn(1, 3, 4, 6, dtype=torch.float32)
    output = network(sample, 0.3).sample
    for row in range(0, 4, 2):
        for column in range(0, 6, 2):
            part = (..., slice(row, row + 2), slice(column, column + 2))
            mosaic = sample[part].repeat(1, 1, 2, 3)
            close(network(mosaic, 0.3).sample, output[part].repeat(1, 1, 2, 3))
    assert (output[..., :2] - output[..., 2:4]).abs().min() > 1e-4


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_positions_do_not_depend_on_where_a_network_was_cast(dtype):
    """They are float32, as those of a size that the network was not made for."""
    own, square = (make_dit(sample_size=size).to(dtype) for size in ((8, 16), 8))
    expected = make_dit(sample_size=(8, 16)).pos_embed.pos_embed
    assert torch.equal(own.pos_embed.pos_embed, expected) and torch.equal(own.float().pos_embed.pos_embed, expected)
    sample = randn(2, 3, 8, 16, dtype=torch.float32).to(dtype)
    assert torch.equal(own.to(dtype)(sample, 0.3).sample, square(sample, 0.3).sample)
    assert own.to("meta").pos_embed.pos_embed.is_meta


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"num_attention_heads": 3, "attention_head_dim": 6}, "must be a multiple of 4"),
        ({"sample_size": 9}, "Samples of 9x9 are no whole patches of patch_size=2"),
        ({"sample_size": (8, 6), "patch_size": 4}, "8x6 are no whole patches of patch_size=4"),
    ],
)
def test_sizes_that_do_not_fit(changes, message):
    with pytest.raises(ValueError, match=message):
        make_dit(**changes)


def test_a_sample_of_no_whole_patches():
    with pytest.raises(ValueError, match="Samples of 8x7 are no whole patches"):
        make_dit()(torch.zeros(1, 3, 8, 7), 0.3)
