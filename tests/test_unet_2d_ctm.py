# Copyright 2026 The diffusers-ctm authors. Licensed under the Apache License, Version 2.0.
"""CTMUNet2DModel against the UNet2DModel it grows from, and what diffusers offers for any model."""

import copy
import json
import math

import numpy as np
import pytest
import torch
from diffusers import AutoModel, UNet2DConditionModel, UNet2DModel
from diffusers.models.attention_processor import AttnProcessor, AttnProcessor2_0
from exact import GaussianData, randn
from torch import nn

from diffusers_ctm import CTMUNet2DModel
from diffusers_ctm.trajectory import Preconditioning, jump


SKIP = {"block_out_channels": (32, 64), "norm_num_groups": 32}
KINDS = {
    "positional": {},
    "sine first": {"flip_sin_to_cos": False, "freq_shift": 1, "time_embedding_dim": 24},
    "fourier": {"time_embedding_type": "fourier"},
    "classes": {"num_class_embeds": 7},
    "class_embed_type timestep": {"class_embed_type": "timestep"},
    "class_embed_type identity": {"class_embed_type": "identity"},
    "scale shift": {"resnet_time_scale_shift": "scale_shift", "num_class_embeds": 7},
    "resnet sampling": {"downsample_type": "resnet", "upsample_type": "resnet"},
    "resnet blocks": {
        "down_block_types": ("DownBlock2D", "ResnetDownsampleBlock2D"),
        "up_block_types": ("ResnetUpsampleBlock2D", "UpBlock2D"),
    },
    "skip": {"down_block_types": ("SkipDownBlock2D",) * 2, "up_block_types": ("SkipUpBlock2D",) * 2, **SKIP},
    "attention skip": {
        "down_block_types": ("AttnSkipDownBlock2D",) * 2,
        "up_block_types": ("AttnSkipUpBlock2D",) * 2,
        **SKIP,
    },
    "no middle": {"mid_block_type": None},
    "no attention": {"add_attention": False, "attention_head_dim": None},
    "centred": {"center_input_sample": True},
    "ADM": {
        "resnet_time_scale_shift": "scale_shift",
        "downsample_type": "resnet",
        "upsample_type": "resnet",
        "num_class_embeds": 7,
        "sample_size": (8, 16),
        "attn_norm_num_groups": 8,
    },
}
every_kind = pytest.mark.parametrize("changes", KINDS.values(), ids=KINDS.keys())


def close(actual, expected, rtol=1e-5, atol=1e-5):
    torch.testing.assert_close(actual, expected, rtol=rtol, atol=atol)


def inputs(unet, batch=3):
    """Sample, t, s and the labels that `unet` wants."""
    size = unet.config.sample_size
    height, width = (size, size) if isinstance(size, int) else size
    sample = randn(batch, unet.config.in_channels, height, width, dtype=torch.float32)
    t, s = torch.tensor([1.1, 0.3, 0.02])[:batch], torch.tensor([0.8, 0.01, 0.015])[:batch]
    condition = {}
    if unet.config.num_class_embeds is not None:
        condition["class_labels"] = torch.arange(batch)
    elif unet.config.class_embed_type == "timestep":
        condition["class_labels"] = torch.arange(batch) * 3.5
    elif unet.config.class_embed_type == "identity":
        condition["class_labels"] = randn(batch, unet.time_embedding.linear_2.out_features, seed=1, dtype=torch.float32)
    return sample, t, s, condition


def check_the_same(again, unet):
    """Equal weights, and equal outputs up to rounding, which depends on where in memory the weights lie."""
    for name, weight in unet.state_dict().items():
        assert torch.equal(again.state_dict()[name], weight), name
    sample, t, s, condition = inputs(unet)
    close(again(sample, t, s, **condition).sample, unet(sample, t, s, **condition).sample)


def blocks(unet):
    return [m for m in unet.modules() if getattr(m, "time_emb_proj", None) is not None]


# Growing from a teacher -----------------------------------------------------------------------------------------------


@every_kind
def test_a_new_student_is_its_teacher_at_every_target(make_unet, changes):
    teacher = make_unet(UNet2DModel, **changes)
    student = CTMUNet2DModel.from_unet(teacher)
    sample, t, s, condition = inputs(teacher)
    expected = teacher(sample, t, **condition).sample
    assert expected.abs().mean() > 1e-2
    for target in (s, t, 0.1 * s, None, torch.tensor(0.5)):
        close(student(sample, t, target, **condition).sample, expected)


@every_kind
def test_every_weight_of_the_teacher_keeps_its_name(make_unet, changes):
    teacher = make_unet(UNet2DModel, **changes)
    student = CTMUNet2DModel.from_unet(teacher)
    old, new = teacher.state_dict(), student.state_dict()
    added = {name for name in old if name.startswith("time_embedding.")}
    assert set(new) - set(old) == {f"target_{name}" for name in added} and not set(old) - set(new)
    for name, weight in old.items():
        if name.endswith("time_emb_proj.weight"):
            width = weight.shape[1]
            assert torch.equal(new[name][:, :width], weight)
            assert torch.equal(new[name][:, width:], torch.zeros_like(weight))
        else:
            assert torch.equal(new[name], weight)
    for name in added:
        assert torch.equal(new[f"target_{name}"], old[name])
    assert {k: v for k, v in student.config.items() if not k.startswith("_")} == {
        k: v for k, v in teacher.config.items() if not k.startswith("_")
    }


def test_student_shares_no_storage_with_its_teacher(make_unet):
    teacher = make_unet(UNet2DModel, num_class_embeds=7)
    student = CTMUNet2DModel.from_unet(teacher)
    sample, t, s, condition = inputs(teacher)
    before = student(sample, t, s, **condition).sample
    assert not {p.data_ptr() for p in student.parameters()} & {p.data_ptr() for p in teacher.parameters()}
    assert len({p.data_ptr() for p in student.parameters()}) == len(list(student.parameters()))
    for parameter in teacher.parameters():
        parameter.data.zero_()
    assert torch.equal(student(sample, t, s, **condition).sample, before)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_student_has_the_dtype_and_mode_of_its_teacher(make_unet, dtype):
    teacher = make_unet(UNet2DModel).to(dtype)
    student = CTMUNet2DModel.from_unet(teacher)
    assert {p.dtype for p in student.parameters()} == {dtype} and not student.training
    assert CTMUNet2DModel.from_unet(teacher.train()).training


def test_untrained_student_is_an_euler_step_of_its_teacher(exact_teacher):
    teacher = exact_teacher()
    student, preconditioning = CTMUNet2DModel.from_unet(teacher), Preconditioning(0.5, 1000.0)
    x, t, s = 3 * randn(2, 3, 8, 8, dtype=torch.float32), torch.tensor([3.0, 0.5]), torch.tensor([0.5, 0.002])
    euler = jump(x, GaussianData(0.5).denoiser(x, t), t, s)
    close(preconditioning.jump(student, x, t, s), euler)
    close(preconditioning.denoise(student, x, t), preconditioning.denoise(teacher, x, t))


@pytest.mark.parametrize("wrong", [CTMUNet2DModel, UNet2DConditionModel, nn.Linear])
def test_from_unet_of_something_else(make_unet, wrong):
    unet = nn.Linear(1, 1) if wrong is nn.Linear else make_unet() if wrong is CTMUNet2DModel else wrong.__new__(wrong)
    with pytest.raises(ValueError, match=f"starts from a diffusers UNet2DModel, not from {wrong.__name__}"):
        CTMUNet2DModel.from_unet(unet)


# The second time ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("changes", [KINDS["classes"], KINDS["ADM"]], ids=["classes", "ADM"])
def test_equals_one_linear_layer_per_time_added(make_unet, changes):
    """The authors' network: emb_layers(emb) + emb_layers_s(emb_s) in every block, the class in emb alone."""
    student = make_unet(**changes)
    sample, t, s, condition = inputs(student)

    # diffusers' UNet2DModel with the first half of the columns; the second half is added by hand
    plain = make_unet(UNet2DModel, **changes)
    weights, second_half = {}, {}
    for name, weight in student.state_dict().items():
        if name.endswith("time_emb_proj.weight"):
            weight, second_half[name.removesuffix(".weight")] = weight.chunk(2, dim=1)
        if not name.startswith("target_time_embedding."):
            weights[name] = weight
    plain.load_state_dict(weights)

    half = student.config.block_out_channels[0] // 2
    angles = s[:, None] * torch.exp(-math.log(10000) * torch.arange(half) / half)
    linear_1, linear_2 = student.target_time_embedding.linear_1, student.target_time_embedding.linear_2
    emb_s = linear_2(nn.functional.silu(linear_1(torch.cat([angles.cos(), angles.sin()], dim=1))))
    for name, extra in second_half.items():
        plain.get_submodule(name).register_forward_hook(
            lambda module, args, output, extra=extra: output + nn.functional.silu(emb_s) @ extra.T
        )
    assert len(second_half) == len(blocks(student)) > 4
    close(student(sample, t, s, **condition).sample, plain(sample, t, **condition).sample)


@every_kind
def test_the_target_matters_once_its_columns_are_not_zero(make_unet, changes):
    unet = make_unet(**changes)
    sample, t, s, condition = inputs(unet)
    output = unet(sample, t, s, **condition).sample
    assert (output - unet(sample, t, 0.5 * s, **condition).sample).abs().max() > 1e-3
    assert (output - unet(sample, s, t, **condition).sample).abs().max() > 1e-3  # they are not interchangeable
    # None is s = t
    assert torch.equal(unet(sample, t, **condition).sample, unet(sample, t, t, **condition).sample)
    for i in range(3):  # each sample has its own pair
        alone = {name: value[i : i + 1] for name, value in condition.items()}
        close(unet(sample[i : i + 1], t[i], s[i], **alone).sample, output[i : i + 1], atol=1e-4)


@every_kind
def test_before_training_the_target_does_not_matter(make_unet, changes):
    unet = make_unet(random=False, **changes)
    sample, t, s, condition = inputs(unet)
    assert torch.equal(unet(sample, t, s, **condition).sample, unet(sample, t, **condition).sample)
    for block in blocks(unet):
        old, new = block.time_emb_proj.weight.chunk(2, dim=1)
        assert (old != 0).all() and (new == 0).all()


def test_gradient_reaches_the_new_columns(make_unet):
    student = CTMUNet2DModel.from_unet(make_unet(UNet2DModel))
    sample, t, s, _ = inputs(student)
    optimizer = torch.optim.SGD(student.parameters(), lr=1.0)
    for step in range(2):
        optimizer.zero_grad()
        student(sample, t, s).sample.square().mean().backward()
        for block in blocks(student):
            old, new = block.time_emb_proj.weight.grad.chunk(2, dim=1)
            assert old.abs().max() > 0 and new.abs().max() > 0
        # through columns of zero, nothing reaches the embedding of s at first
        for parameter in student.target_time_embedding.parameters():
            assert (parameter.grad.abs().max() > 0) == (step > 0)
        optimizer.step()
    assert (student(sample, t, s).sample - student(sample, t, t).sample).abs().max() > 1e-6


def test_forms_of_a_time(make_unet):
    unet = make_unet()
    sample, _, _, _ = inputs(unet)
    expected = unet(sample, torch.full((3,), 0.7), torch.full((3,), -1.5)).sample
    for form in (
        float,
        np.float32,
        torch.tensor,
        lambda v: [v] * 3,
        lambda v: torch.tensor([v]),
        lambda v: torch.tensor(v, dtype=torch.float64),
    ):
        close(unet(sample, form(0.7), form(-1.5)).sample, expected)
    assert torch.equal(unet(sample, 0.7, -1.5, return_dict=False)[0], unet(sample, 0.7, -1.5).sample)


@pytest.mark.parametrize("time", [3, np.int64(3), [3, 3, 3], torch.tensor(3), torch.tensor([3, 3, 3])])
def test_integer_times(make_unet, time):
    unet = make_unet(num_class_embeds=7)
    sample, t, _, condition = inputs(unet)
    with pytest.raises(ValueError, match="^timestep must be a float"):
        unet(sample, time, t, **condition)
    with pytest.raises(ValueError, match="target_timestep must be a float"):
        unet(sample, t, time, **condition)  # also where a UNet2DModel takes its labels


def test_labels_missing_or_not_expected(make_unet):
    sample, t, s, _ = inputs(make_unet())
    for changes in (KINDS["classes"], KINDS["class_embed_type timestep"], KINDS["class_embed_type identity"]):
        with pytest.raises(ValueError, match="class_labels should be provided"):
            make_unet(**changes)(sample, t, s)
    with pytest.raises(ValueError, match="class_labels were given"):
        make_unet()(sample, t, s, torch.tensor([1, 2, 3]))


def test_learned_embedding_is_refused(make_unet):
    changes = {"time_embedding_type": "learned", "num_train_timesteps": 10}
    with pytest.raises(ValueError, match="knows whole timesteps only"):
        make_unet(**changes)
    with pytest.raises(ValueError, match="knows whole timesteps only"):
        CTMUNet2DModel.from_unet(make_unet(UNet2DModel, **changes))


# Saving and loading ---------------------------------------------------------------------------------------------------


@every_kind
def test_saved_and_loaded_it_is_the_same(make_unet, changes, tmp_path):
    unet = make_unet(**changes)
    unet.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["_class_name"] == "CTMUNet2DModel"
    for name, value in changes.items():
        assert config[name] == (list(value) if isinstance(value, tuple) else value)
    again = CTMUNet2DModel.from_pretrained(tmp_path)
    check_the_same(again, unet)
    assert again.config.num_class_embeds == changes.get("num_class_embeds")


@pytest.mark.parametrize(
    "options", [{"variant": "ema"}, {"max_shard_size": "60KB"}, {"variant": "ema", "max_shard_size": "60KB"}]
)
@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
def test_variants_and_shards(make_unet, options, low_cpu_mem_usage, tmp_path):
    unet = make_unet(num_class_embeds=7)
    unet.save_pretrained(tmp_path, **options)
    files = {path.name for path in tmp_path.glob("*.safetensors")}
    assert (len(files) > 1) == ("max_shard_size" in options) and all(
        ("ema" in f) == ("variant" in options) for f in files
    )
    again = CTMUNet2DModel.from_pretrained(
        tmp_path, variant=options.get("variant"), low_cpu_mem_usage=low_cpu_mem_usage
    )
    check_the_same(again, unet)


def test_auto_model_finds_the_class(make_unet, tmp_path):
    unet = make_unet(num_class_embeds=7)
    unet.save_pretrained(tmp_path / "unet")
    folder = str(tmp_path)  # AutoModel takes no Path
    for again in (AutoModel.from_pretrained(folder + "/unet"), AutoModel.from_pretrained(folder, subfolder="unet")):
        assert type(again) is CTMUNet2DModel
        check_the_same(again, unet)


def test_a_copy_is_independent(make_unet):
    unet = make_unet()
    sample, t, s, _ = inputs(unet)
    twin = copy.deepcopy(unet)
    assert torch.equal(twin(sample, t, s).sample, unet(sample, t, s).sample)
    twin.target_time_embedding.linear_2.weight.data.add_(1.0)
    assert (twin(sample, t, s).sample - unet(sample, t, s).sample).abs().max() > 1e-3


# Precision, memory, speed ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype, tolerance", [(torch.bfloat16, 0.05), (torch.float16, 0.01)])
@pytest.mark.parametrize("kind", ["classes", "class_embed_type timestep", "ADM", "attention skip"])
def test_half_precision(make_unet, dtype, tolerance, kind, tmp_path):
    unet = make_unet(**KINDS[kind])
    sample, t, s, condition = inputs(unet)
    expected = unet(sample, t, s, **condition).sample
    unet.save_pretrained(tmp_path)
    for low in (CTMUNet2DModel.from_pretrained(tmp_path, dtype=dtype), unet.to(dtype)):
        actual = low(sample.to(dtype), t, s, **condition).sample  # times stay float32
        assert low.dtype == actual.dtype == dtype
        assert (actual.float() - expected).abs().max() < tolerance * expected.abs().max()


def test_times_are_embedded_in_float32(make_unet):
    # 250 ln t needs more digits than bfloat16 has: -1553.65 and -1553.0 are one number there
    unet = make_unet().to(torch.bfloat16)
    sample = randn(1, 3, 8, 8).to(torch.bfloat16)
    near, far = torch.tensor(-1553.65), torch.tensor(-1553.0)
    assert near.bfloat16() == far.bfloat16()
    assert not torch.equal(unet(sample, near).sample, unet(sample, far).sample)


@pytest.mark.parametrize("kind", ["classes", "ADM"])
def test_gradient_checkpointing_gives_the_same_gradients(make_unet, kind):
    unet, calls = make_unet(**KINDS[kind]).train(), []
    sample, t, s, condition = inputs(unet)

    def gradients():
        unet.zero_grad()
        unet(sample, t, s, **condition).sample.square().mean().backward()
        return {name: parameter.grad.clone() for name, parameter in unet.named_parameters()}

    plain = gradients()
    assert not unet.is_gradient_checkpointing

    def counted(function, *args):
        calls.append(function)
        return torch.utils.checkpoint.checkpoint(function, *args, use_reentrant=False)

    unet.enable_gradient_checkpointing(counted)
    for name, gradient in gradients().items():
        close(gradient, plain[name], rtol=1e-5, atol=1e-7)
    assert unet.is_gradient_checkpointing and len(calls) > 4


def test_compiles_in_one_graph(make_unet):
    small = {"block_out_channels": (8,), "down_block_types": ("AttnDownBlock2D",), "up_block_types": ("UpBlock2D",)}
    unet = make_unet(num_class_embeds=7, **small)
    sample, t, s, condition = inputs(unet)
    compiled = torch.compile(unet, backend="eager", fullgraph=True)
    with torch.no_grad():
        close(compiled(sample, t, s, **condition).sample, unet(sample, t, s, **condition).sample)


# Adapters and attention -----------------------------------------------------------------------------------------------


def test_lora(make_unet, tmp_path):
    peft = pytest.importorskip("peft")
    unet, fresh = make_unet(num_class_embeds=7), make_unet(num_class_embeds=7)
    sample, t, s, condition = inputs(unet)
    before = unet(sample, t, s, **condition).sample
    unet.requires_grad_(False)
    unet.add_adapter(peft.LoraConfig(r=2, lora_alpha=2, target_modules=["to_q", "to_v", "time_emb_proj", "linear_1"]))
    assert torch.equal(unet(sample, t, s, **condition).sample, before)  # an untrained adapter changes nothing

    trained = [p for p in unet.parameters() if p.requires_grad]
    assert trained and all("lora" in name for name, p in unet.named_parameters() if p.requires_grad)
    optimizer = torch.optim.SGD(trained, lr=5.0)
    for _ in range(2):
        unet(sample, t, s, **condition).sample.square().mean().backward()
        optimizer.step()
    after = unet(sample, t, s, **condition).sample
    assert (after - before).abs().max() > 1e-3

    unet.save_lora_adapter(tmp_path)
    assert torch.equal(fresh(sample, t, s, **condition).sample, before)
    fresh.load_lora_adapter(tmp_path, prefix=None, weight_name="pytorch_lora_weights.safetensors")
    close(fresh(sample, t, s, **condition).sample, after)
    fresh.disable_adapters()
    close(fresh(sample, t, s, **condition).sample, before)
    # the pair reaches the columns of both times
    lora = {name: p for name, p in unet.named_parameters() if "time_emb_proj.lora_A" in name}
    assert len(lora) == len(blocks(unet)) and all(p.shape[1] == 2 * 64 for p in lora.values())


def test_attention_processors(make_unet):
    unet, calls = make_unet(), []
    sample, t, s, _ = inputs(unet)
    expected = unet(sample, t, s).sample

    class Counted(AttnProcessor):
        def __call__(self, *args, **kwargs):
            calls.append(1)
            return super().__call__(*args, **kwargs)

    count = len(unet.attn_processors)
    assert count == 4 and all(isinstance(p, AttnProcessor2_0) for p in unet.attn_processors.values())  # torch's SDPA
    unet.set_attn_processor(Counted())
    close(unet(sample, t, s).sample, expected)  # the same attention, written out
    assert len(calls) == count
    unet.set_attn_processor({name: AttnProcessor2_0() for name in unet.attn_processors})
    assert torch.equal(unet(sample, t, s).sample, expected)
    unet.fuse_qkv_projections()
    close(unet(sample, t, s).sample, expected)
    unet.unfuse_qkv_projections()
    assert torch.equal(unet(sample, t, s).sample, expected)
