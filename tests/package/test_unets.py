# Copyright 2026 The diffusers-ctm authors. Licensed under the Apache License, Version 2.0.
"""Every network of two times: growing from a teacher, the second time, and what diffusers offers for any model."""

import copy
import json

import numpy as np
import pytest
import torch
from accelerate import cpu_offload
from diffusers import UNet2DConditionModel, UNet2DModel
from diffusers.models.attention_processor import Attention, AttnProcessor
from torch import nn

from diffusers_ctm import CTMDiTTransformer2DModel, CTMUNet2DModel, EDM2UNet2DModel, EDMUNet2DModel
from diffusers_ctm.preconditioning import Preconditioning
from diffusers_ctm.trajectory import jump
from diffusers_ctm.unet_edm2 import EDM2Attention, normalize
from helpers.comparing import close
from helpers.exact import GaussianData, randn
from helpers.tiny_networks import (
    FAMILIES,
    blocks,
    check_the_same,
    inputs,
    make_dit,
    make_edm,
    make_edm2,
    make_unet_2d,
    times,
)


# One layer of a block reads both times.
WIDENED = {name: FAMILIES[name] for name in ("CTMUNet2DModel", "EDMUNet2DModel")}

# The teacher is of the student's class.
ONE_CLASS = {name: family for name, family in FAMILIES.items() if name != "CTMUNet2DModel"}


def kinds(*names, families=FAMILIES):
    """Pairs (family, changes): every kind of the families, or those of `names` that a family has."""
    return pytest.mark.parametrize(
        "family, changes",
        [
            pytest.param(family, changes, id=f"{name}-{kind}")
            for name, family in families.items()
            for kind, changes in family.kinds.items()
            if not names or kind in names
        ],
    )


every_kind = kinds()
every_family = pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES.keys())
every_widened_family = pytest.mark.parametrize("family", WIDENED.values(), ids=WIDENED.keys())


# Growing from a teacher -----------------------------------------------------------------------------------------------


@every_kind
def test_a_new_student_is_its_teacher_at_every_target(family, changes):
    teacher = family.make_teacher(**changes)
    student = family.student_class.from_unet(teacher)
    sample, t, s, condition = inputs(teacher)
    expected = teacher(sample, t, **condition).sample
    assert expected.abs().mean() > 1e-2
    for target in (s, t, 0.1 * s, None, torch.tensor(0.5)):
        close(student(sample, t, target, **condition).sample, expected, atol=1e-4)  # "fourier" divides by t
    assert student.has_target_time and not getattr(teacher, "has_target_time", False)


@kinds(families=WIDENED)
def test_every_weight_of_the_teacher_keeps_its_name(family, changes):
    teacher = family.make_teacher(**changes)
    student = family.student_class.from_unet(teacher)
    old, new = teacher.state_dict(), student.state_dict()
    added = {name for name in old if name.startswith("time_embedding.")}
    assert set(new) - set(old) == {f"target_{name}" for name in added} and not set(old) - set(new)
    for name, weight in old.items():
        if name.endswith("time_emb_proj.weight"):
            first, second = new[name].chunk(2, dim=1)
            assert torch.equal(first, weight) and torch.equal(second, torch.zeros_like(weight))
        else:
            assert torch.equal(new[name], weight)
    for name in added:
        assert torch.equal(new[f"target_{name}"], old[name])

    public = {name: value for name, value in student.config.items() if not name.startswith("_")}
    expected = {name: value for name, value in teacher.config.items() if not name.startswith("_")}
    assert public == ({**expected, "target_time": True} if "target_time" in expected else expected)
    assert family.student_class.from_config(student.config).has_target_time


@every_family
def test_student_shares_no_storage_with_its_teacher(family):
    teacher = family.make_teacher(num_class_embeds=7)
    student = family.student_class.from_unet(teacher)
    sample, t, s, condition = inputs(teacher)
    before = student(sample, t, s, **condition).sample
    assert not {p.data_ptr() for p in student.parameters()} & {p.data_ptr() for p in teacher.parameters()}
    assert len({p.data_ptr() for p in student.parameters()}) == len(list(student.parameters()))
    for parameter in teacher.parameters():
        parameter.data.zero_()
    assert torch.equal(student(sample, t, s, **condition).sample, before)


@every_family
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_student_has_the_dtype_and_mode_of_its_teacher(family, dtype):
    teacher = family.make_teacher().to(dtype)
    student = family.student_class.from_unet(teacher)
    assert {p.dtype for p in student.parameters()} == {dtype} and not student.training
    assert family.student_class.from_unet(teacher.train()).training


@every_family
def test_untrained_student_is_an_euler_step_of_its_exact_teacher(family):
    """F = 0 is the denoiser of N(0, sigma_data^2)."""
    teacher = family.make_teacher()
    for parameter in teacher.get_submodule(family.last_layer).parameters():
        nn.init.zeros_(parameter)
    student = family.student_class.from_unet(teacher)
    preconditioning = Preconditioning(0.5, family.timestep_scale)
    x, t, s = 3 * randn(2, 3, 8, 8, dtype=torch.float32), torch.tensor([3.0, 0.5]), torch.tensor([0.5, 0.002])
    denoised = GaussianData(0.5).denoiser(x, t)
    close(preconditioning.denoise(teacher, x, t), denoised)
    close(preconditioning.denoise(student, x, t), denoised)
    close(preconditioning.jump(student, x, t, s), jump(x, denoised, t, s))


@pytest.mark.parametrize(
    "student_class, wrong, message",
    [
        (CTMUNet2DModel, make_unet_2d, "starts from a diffusers UNet2DModel, not from CTMUNet2DModel"),
        (CTMUNet2DModel, lambda: nn.Linear(1, 1), "not from Linear"),
        (CTMUNet2DModel, lambda: UNet2DConditionModel.__new__(UNet2DConditionModel), "not from UNet2DConditionModel"),
        (EDMUNet2DModel, lambda: make_edm(target_time=True), "has it already"),
        (EDMUNet2DModel, lambda: nn.Linear(1, 1), "not from Linear"),
        (EDMUNet2DModel, lambda: UNet2DModel.__new__(UNet2DModel), "not from UNet2DModel"),
        (EDM2UNet2DModel, lambda: make_edm2(target_time=True), "has it already"),
        (EDM2UNet2DModel, make_edm, "starts from an EDM2UNet2DModel, not from EDMUNet2DModel"),
        (CTMDiTTransformer2DModel, lambda: make_dit(target_time=True), "has it already"),
        (CTMDiTTransformer2DModel, make_unet_2d, "or CTMDiTTransformer2DModel, not from CTMUNet2DModel"),
    ],
)
def test_from_unet_of_something_else(student_class, wrong, message):
    with pytest.raises(ValueError, match=message):
        student_class.from_unet(wrong())


# The second time ------------------------------------------------------------------------------------------------------


@every_kind
def test_the_target_matters_once_its_columns_are_not_zero(family, changes):
    unet = family.make_student(**changes)
    sample, t, s, condition = inputs(unet)
    output = unet(sample, t, s, **condition).sample
    assert (output - unet(sample, t, 0.5 * s, **condition).sample).abs().max() > 1e-3
    assert (output - unet(sample, s, t, **condition).sample).abs().max() > 1e-3  # they are not interchangeable
    # None is s = t
    assert torch.equal(unet(sample, t, **condition).sample, unet(sample, t, t, **condition).sample)
    for i in range(3):  # each sample has its own pair
        alone = {name: value[i : i + 1] for name, value in condition.items()}
        close(unet(sample[i : i + 1], t[i], s[i], **alone).sample, output[i : i + 1], atol=1e-4)


@every_widened_family
def test_training_reaches_every_weight_of_a_student(family):
    """No weight is without gradient, as distributed training demands."""
    student = family.student_class.from_unet(family.make_teacher()).train()
    sample, t, s, _ = inputs(student)
    optimizer = torch.optim.SGD(student.parameters(), lr=1.0)
    for step in range(2):
        optimizer.zero_grad()
        student(sample, t, s).sample.square().mean().backward()
        assert not [name for name, parameter in student.named_parameters() if parameter.grad is None]
        for block in blocks(student):
            old, new = block.time_emb_proj.weight.grad.chunk(2, dim=1)
            assert old.abs().max() > 0 and new.abs().max() > 0
        # through columns of zero, nothing reaches the embedding of s at first
        for parameter in student.target_time_embedding.parameters():
            assert (parameter.grad.abs().max() > 0) == (step > 0)
        optimizer.step()
    assert (student(sample, t, s).sample - student(sample, t, t).sample).abs().max() > 1e-6


@pytest.mark.parametrize(
    "make",
    [family.make_student for family in FAMILIES.values()] + [make_edm, make_edm2, make_dit],
    ids=[*FAMILIES, *(f"{name}, one time" for name in ONE_CLASS)],
)
def test_forms_of_a_time(make):
    unet = make()
    sample, _, _, _ = inputs(unet)
    expected = unet(sample, *times(unet, torch.full((3,), 0.7), torch.full((3,), -1.5))).sample
    for form in (
        float,
        np.float32,
        torch.tensor,
        lambda v: [v] * 3,
        lambda v: torch.tensor([v]),
        lambda v: torch.tensor(v, dtype=torch.float64),
    ):
        close(unet(sample, *times(unet, form(0.7), form(-1.5))).sample, expected)
    pair = times(unet, 0.7, -1.5)
    assert torch.equal(unet(sample, *pair, return_dict=False)[0], unet(sample, *pair).sample)


@every_family
@pytest.mark.parametrize("time", [3, np.int64(3), [3, 3, 3], torch.tensor(3), torch.tensor([3, 3, 3])])
def test_integer_times(family, time):
    unet = family.make_student(num_class_embeds=7)
    sample, t, _, condition = inputs(unet)
    with pytest.raises(ValueError, match="^timestep must be a float"):
        unet(sample, time, t, **condition)
    with pytest.raises(ValueError, match="target_timestep must be a float"):
        unet(sample, t, time, **condition)  # also where a UNet2DModel takes its labels


@every_family
def test_times_are_embedded_in_float32(family):
    # 250 ln t needs more digits than bfloat16 has: -1553.65 and -1553.0 are one number there
    unet = family.make_student().to(torch.bfloat16)
    sample = randn(1, 3, 8, 8).to(torch.bfloat16)
    near, far = torch.tensor(-1553.65), torch.tensor(-1553.0)
    assert near.bfloat16() == far.bfloat16()
    assert not torch.equal(unet(sample, near).sample, unet(sample, far).sample)


# Saving and loading ---------------------------------------------------------------------------------------------------


def check_saved_and_loaded(unet, changes, folder):
    unet.save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    assert config["_class_name"] == type(unet).__name__
    for name, value in changes.items():
        assert config[name] == (list(value) if isinstance(value, tuple) else value)
    again = type(unet).from_pretrained(folder)
    check_the_same(again, unet)
    assert again.config.num_class_embeds == changes.get("num_class_embeds")
    assert again.has_target_time == unet.has_target_time


@every_kind
def test_saved_and_loaded_it_is_the_same(family, changes, tmp_path):
    check_saved_and_loaded(family.make_student(**changes), changes, tmp_path)


@kinds(families=ONE_CLASS)
def test_a_teacher_saved_and_loaded_is_the_same(family, changes, tmp_path):
    check_saved_and_loaded(family.make_teacher(**changes), changes, tmp_path)


@every_family
@pytest.mark.parametrize("variant", [None, "fp16"])
def test_weights_in_several_files_and_of_a_variant(family, variant, tmp_path):
    unet = family.make_student(num_class_embeds=7)
    unet.save_pretrained(tmp_path, variant=variant, max_shard_size="20KB")
    (index,) = tmp_path.glob("*.index*.json")
    files = json.loads(index.read_text())["weight_map"]
    assert files.keys() == unet.state_dict().keys() and len(set(files.values())) > 1
    assert all((f".{variant}-" in file) == (variant is not None) for file in files.values())
    check_the_same(family.student_class.from_pretrained(tmp_path, variant=variant), unet)
    if variant is not None:
        with pytest.raises(OSError, match="no file named"):
            family.student_class.from_pretrained(tmp_path)


# Precision, memory, speed ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype, tolerance", [(torch.bfloat16, 0.05), (torch.float16, 0.01)])
@kinds("classes", "class_embed_type timestep", "ADM", "attention skip", "NCSN++", "skip", "every option")
def test_half_precision(dtype, tolerance, family, changes, tmp_path):
    unet = family.make_student(**changes)
    sample, t, s, condition = inputs(unet)
    expected = unet(sample, t, s, **condition).sample
    unet.save_pretrained(tmp_path)
    outputs = []
    for low in (family.student_class.from_pretrained(tmp_path, dtype=dtype), unet.to(dtype)):
        outputs.append(low(sample.to(dtype), t, s, **condition).sample)  # times stay float32
        assert low.dtype == outputs[-1].dtype == dtype
        assert (outputs[-1].float() - expected).abs().max() < tolerance * expected.abs().max()
    assert torch.equal(*outputs)


@kinds("classes", "ADM", "NCSN++", "every option")
def test_channels_last_and_autocast(family, changes):
    unet = family.make_student(**changes)
    sample, t, s, condition = inputs(unet)
    expected = unet(sample, t, s, **condition).sample
    unet = unet.to(memory_format=torch.channels_last)
    close(unet(sample.to(memory_format=torch.channels_last), t, s, **condition).sample, expected)
    with torch.autocast("cpu", torch.bfloat16):
        low = unet(sample, t, s, **condition).sample
    assert 0 < (low.float() - expected).abs().max() < 0.05 * expected.abs().max()


@kinds("classes", "ADM", "NCSN++", "skip, filtered", "three levels")
def test_gradient_checkpointing_gives_the_same_gradients(family, changes):
    unet, calls = family.make_student(**changes).train(), []
    sample, t, s, condition = inputs(unet)

    def gradients():
        unet.zero_grad()
        unet(sample, t, s, **condition).sample.square().mean().backward()
        return {
            name: parameter.grad.clone() for name, parameter in unet.named_parameters() if parameter.grad is not None
        }

    plain = gradients()
    assert not unet.is_gradient_checkpointing

    def counted(function, *args):
        calls.append(function)
        return torch.utils.checkpoint.checkpoint(function, *args, use_reentrant=False)

    unet.enable_gradient_checkpointing(counted)
    again = gradients()
    assert set(again) == set(plain) and len(plain) > 50
    for name, gradient in again.items():
        close(gradient, plain[name], rtol=1e-5, atol=1e-7)
    assert unet.is_gradient_checkpointing and len(calls) == len(set(calls)) > 4
    if family.checkpointed is not None:
        assert set(calls) == {module for module in unet.modules() if isinstance(module, family.checkpointed)}


@kinds("classes", "ADM", "NCSN++", "skip, filtered", "attention skip", "every option")
def test_weights_that_are_brought_or_cast_when_they_are_needed(family, changes):
    unet = family.make_student(**changes)
    sample, t, s, condition = inputs(unet)
    expected = unet(sample, t, s, **condition).sample
    cast = copy.deepcopy(unet)
    cast.enable_layerwise_casting(storage_dtype=torch.float16, compute_dtype=torch.float32)
    assert cast.get_submodule(family.last_layer).weight.dtype == torch.float16
    close(cast(sample, t, s, **condition).sample, expected, rtol=0.03, atol=0.03)
    offloaded = cpu_offload(unet, execution_device=torch.device("cpu"))  # as `enable_sequential_cpu_offload`
    assert offloaded.get_submodule(family.last_layer).weight.device.type == "meta"
    close(offloaded(sample, t, s, **condition).sample, expected)


@every_family
def test_compiles_in_one_graph(family):
    unet = family.make_student(**family.small)
    sample, t, s, condition = inputs(unet)
    compiled = torch.compile(unet, backend="eager", fullgraph=True)
    with torch.no_grad():
        close(compiled(sample, t, s, **condition).sample, unet(sample, t, s, **condition).sample)


# Adapters and attention -----------------------------------------------------------------------------------------------


@every_family
def test_lora(family, tmp_path):
    peft = pytest.importorskip("peft")
    unet, fresh = family.make_student(num_class_embeds=7), family.make_student(num_class_embeds=7)
    sample, t, s, condition = inputs(unet)
    before = unet(sample, t, s, **condition).sample
    unet.requires_grad_(False)
    adapted = [name for name, _ in unet.named_modules() if name.rpartition(".")[2] in family.adapted]
    unet.add_adapter(peft.LoraConfig(r=2, lora_alpha=2, target_modules=list(family.adapted)))
    assert torch.equal(unet(sample, t, s, **condition).sample, before)  # an untrained adapter changes nothing

    trained = [parameter for parameter in unet.parameters() if parameter.requires_grad]
    assert all("lora" in name for name, parameter in unet.named_parameters() if parameter.requires_grad)
    assert len(trained) == 2 * len(adapted) > 10
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


class WrittenOut:
    """Softmax attention of EDM2's blocks (Karras et al. 2024, Figure 21), summed by hand."""

    def __call__(self, attn, hidden_states):
        query, key, value = (
            normalize(layer(hidden_states).unflatten(-1, (attn.heads, -1)), dim=3)
            for layer in (attn.to_q, attn.to_k, attn.to_v)
        )
        scores = torch.einsum("bihc,bjhc->bhij", query, key) / query.shape[-1] ** 0.5
        return attn.to_out[0](torch.einsum("bhij,bjhc->bihc", scores.softmax(-1), value).flatten(2))


@every_family
def test_attention_processors(family):
    unet = family.make_student(num_class_embeds=7)
    sample, t, s, condition = inputs(unet)
    expected = unet(sample, t, s, **condition).sample
    layers = [name for name, module in unet.named_modules() if isinstance(module, (Attention, EDM2Attention))]
    own = unet.attn_processors
    assert list(own) == [f"{name}.processor" for name in layers] and len(own) > 1
    written_out = (
        WrittenOut if family.student_class is EDM2UNet2DModel else AttnProcessor
    )  # neither is torch's function
    unet.set_attn_processor(written_out())
    close(unet(sample, t, s, **condition).sample, expected)
    unet.set_attn_processor({name: lambda attn, tokens, **_: 0 * tokens for name in own})
    assert (unet(sample, t, s, **condition).sample - expected).abs().max() > 1e-3
    with pytest.raises(ValueError, match="does not match the number of attention layers"):
        unet.set_attn_processor({name: written_out() for name in list(own)[1:]})
    unet.set_attn_processor(dict(own))
    assert torch.equal(unet(sample, t, s, **condition).sample, expected)
    unet.set_attention_backend("_native_math")
    close(unet(sample, t, s, **condition).sample, expected)


@every_widened_family
def test_an_adapter_of_a_block_reads_both_times(family):
    peft = pytest.importorskip("peft")
    unet = family.make_student(num_class_embeds=7)
    unet.add_adapter(peft.LoraConfig(r=2, target_modules=["time_emb_proj"]))
    width = 2 * unet.time_embedding.linear_2.out_features
    adapters = [parameter for name, parameter in unet.named_parameters() if "time_emb_proj.lora_A" in name]
    assert len(adapters) == len(blocks(unet)) and all(adapter.shape[1] == width for adapter in adapters)
