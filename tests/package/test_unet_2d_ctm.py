# Copyright 2026 The diffusers-ctm authors. Licensed under the Apache License, Version 2.0.
"""CTMUNet2DModel: how its second time enters, and what it refuses. See test_unets.py for the rest."""

import math

import pytest
import torch
from diffusers import UNet2DModel
from torch import nn

from diffusers_ctm import CTMUNet2DModel
from helpers.comparing import close
from helpers.tiny_networks import UNET_2D_KINDS, blocks, inputs


@pytest.mark.parametrize("changes", [UNET_2D_KINDS["classes"], UNET_2D_KINDS["ADM"]], ids=["classes", "ADM"])
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


def test_labels_missing_or_not_expected(make_unet):
    sample, t, s, _ = inputs(make_unet())
    for changes in (
        UNET_2D_KINDS["classes"],
        UNET_2D_KINDS["class_embed_type timestep"],
        UNET_2D_KINDS["class_embed_type identity"],
    ):
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
