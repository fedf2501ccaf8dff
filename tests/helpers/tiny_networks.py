# Copyright 2026 The diffusers-ctm authors. Licensed under the Apache License, Version 2.0.
"""Tiny networks of every family in every kind, and inputs for them."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from diffusers import ModelMixin, UNet2DModel
from diffusers.models.attention_processor import Attention
from diffusers.models.resnet import ResnetBlock2D
from torch import nn

from diffusers_ctm import CTMDiTTransformer2DModel, CTMUNet2DModel, EDM2UNet2DModel, EDMUNet2DModel
from diffusers_ctm.transformer_dit_ctm import CTMDiTBlock
from diffusers_ctm.two_times import image_size
from diffusers_ctm.unet_edm2 import EDM2Block2D
from helpers.comparing import close
from helpers.exact import randn


TINY = {
    "sample_size": 8,
    "in_channels": 3,
    "out_channels": 3,
    "block_out_channels": (16, 32),
    "layers_per_block": 1,
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
    "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
    "norm_num_groups": 8,
    "attention_head_dim": 8,
}
SKIP = {"block_out_channels": (32, 64), "norm_num_groups": 32}
UNET_2D_KINDS = {
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
    "centered": {"center_input_sample": True},
    "ADM": {
        "resnet_time_scale_shift": "scale_shift",
        "downsample_type": "resnet",
        "upsample_type": "resnet",
        "num_class_embeds": 7,
        "sample_size": (8, 16),
        "attn_norm_num_groups": 8,
    },
}
EDM_TINY = {
    "sample_size": 8,
    "model_channels": 8,
    "block_out_channels": (8, 16),
    "layers_per_block": 1,
}
NCSNPP = {
    "time_embedding_type": "fourier",
    "encoder_type": "residual",
    "resample_filter": (1, 3, 3, 1),
    "time_proj_dim": 16,
}
EDM_KINDS = {
    "DDPM++": {},
    "NCSN++": {**NCSNPP, "num_class_embeds": 7, "augment_dim": 9},
    "classes": {"num_class_embeds": 7},
    "skip": {"encoder_type": "skip", "decoder_type": "skip", "block_out_channels": (8, 12, 16)},
    "skip, filtered": {"encoder_type": "skip", "decoder_type": "skip", "resample_filter": (1, 3, 3, 1)},
    "residual box": {"encoder_type": "residual", "block_out_channels": (8, 12, 16), "layers_per_block": 2},
    "one level": {"block_out_channels": (8,), "attention_levels": (), "decoder_type": "skip"},
    "heads": {"attention_head_dim": 4, "attention_levels": (0, 1)},
    "not square": {"sample_size": (8, 16), "in_channels": 2, "out_channels": 4, "time_embedding_dim": 24},
}


EDM2_TINY = {
    "sample_size": 8,
    "block_out_channels": (8, 16),
    "layers_per_block": 1,
    "attention_levels": (1,),
    "attention_head_dim": 8,
    "log_variance_channels": 8,
}
EDM2_KINDS = {
    "plain": {},
    "classes": {"num_class_embeds": 7},
    "three levels": {"block_out_channels": (8, 12, 16), "layers_per_block": 2, "attention_head_dim": 4},
    "one level": {"block_out_channels": (8,), "attention_levels": ()},
    "every option": {
        "num_class_embeds": 7,
        "time_proj_dim": 12,
        "time_embedding_dim": 20,
        "label_balance": 0.35,
        "concat_balance": 0.4,
        "res_balance": 0.25,
        "attn_balance": 0.4,
        "clip_act": 1.5,
        "resample_filter": (1, 3, 3, 1),
        "log_variance_channels": None,
        "attention_levels": (0, 1),
        "attention_head_dim": 4,
    },
    "not square": {"sample_size": (8, 16), "in_channels": 2, "out_channels": 4},
}


DIT_TINY = {
    "sample_size": 8,
    "in_channels": 3,
    "out_channels": 3,
    "num_attention_heads": 2,
    "attention_head_dim": 8,
    "num_layers": 2,
}
DIT_KINDS = {
    "plain": {},
    "classes": {"num_class_embeds": 7, "num_layers": 5},
    "every option": {
        "num_class_embeds": 7,
        "num_attention_heads": 3,
        "attention_head_dim": 4,
        "attention_bias": False,
        "patch_size": 4,
        "activation_fn": "geglu",
        "upcast_attention": True,
        "norm_elementwise_affine": True,
        "norm_eps": 1e-2,
    },
    "not square": {"sample_size": (4, 16), "in_channels": 2, "out_channels": 4},
}


def fill(network):
    """Draw every weight of a network of which DiT's start leaves many at zero. Returns the network."""
    for parameter in network.parameters():
        nn.init.normal_(parameter.data, std=0.2)
    return network


def make_dit(seed=0, random=True, **changes):
    """A tiny CTMDiTTransformer2DModel in eval mode. `random=True` draws every weight."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        transformer = CTMDiTTransformer2DModel(**{**DIT_TINY, **changes}).eval()
        return fill(transformer) if random else transformer


def make_edm2(seed=0, random=True, **changes):
    """A tiny EDM2UNet2DModel in eval mode. `random=True` also fills the gains, and gives rows of unequal length."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        unet = EDM2UNet2DModel(**{**EDM2_TINY, **changes}).eval()
        if random:
            for name, parameter in unet.named_parameters():
                if name.endswith("gain"):
                    nn.init.uniform_(parameter.data, 0.4, 0.9)
                else:
                    parameter.data.mul_(torch.exp(0.3 * torch.randn(len(parameter), *[1] * (parameter.ndim - 1))))
    return unet


def make_edm(seed=0, random=True, **changes):
    """A tiny EDMUNet2DModel in eval mode. `random=True` also fills what starts at or near zero."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        unet = EDMUNet2DModel(**{**EDM_TINY, **changes}).eval()
        if random:
            for name, parameter in unet.named_parameters():
                if name.endswith("bias"):
                    nn.init.normal_(parameter.data, std=0.1)
                elif "conv2" in name or "to_out" in name or "conv_out" in name:
                    nn.init.xavier_uniform_(parameter.data)
                elif "time_emb_proj" in name:
                    nn.init.normal_(parameter.data, std=0.3)
    return unet


@dataclass(frozen=True)
class Family:
    """A network with two times, and the teacher that it grows from.

    Args:
        student_class: has `from_unet`.
        make_teacher, make_student: of the same changes; `make_student(random=False, ...)` is as newly built.
        kinds: changes by name.
        small: a kind of few layers, with every condition.
        timestep_scale: that its embedding is made for.
        checkpointed: the blocks whose activations gradient checkpointing computes again; None leaves them to diffusers.
        adapted: names of layers of every sort, for adapters.
        last_layer: name of the layer whose zeros make the output zero.
    """

    student_class: type[ModelMixin]
    make_teacher: Callable[..., ModelMixin]
    make_student: Callable[..., ModelMixin]
    kinds: dict[str, dict]
    small: dict
    timestep_scale: float
    checkpointed: tuple[type[nn.Module], ...] | None
    adapted: tuple[str, ...]
    last_layer: str = "conv_out"


FAMILIES = {
    "CTMUNet2DModel": Family(
        CTMUNet2DModel,
        lambda **changes: make_unet_2d(UNet2DModel, **changes),
        lambda **changes: make_unet_2d(CTMUNet2DModel, **changes),
        UNET_2D_KINDS,
        {
            "block_out_channels": (8,),
            "down_block_types": ("AttnDownBlock2D",),
            "up_block_types": ("UpBlock2D",),
            "num_class_embeds": 7,
        },
        1000.0,
        None,
        ("to_q", "to_v", "time_emb_proj", "linear_1"),
    ),
    "EDMUNet2DModel": Family(
        EDMUNet2DModel,
        make_edm,
        lambda **changes: make_edm(target_time=True, **changes),
        EDM_KINDS,
        {"block_out_channels": (8,), "attention_levels": (), "num_class_embeds": 7, "augment_dim": 9},
        1.0,
        (ResnetBlock2D, Attention),
        ("to_q", "to_v", "time_emb_proj", "linear_1"),
    ),
    "EDM2UNet2DModel": Family(
        EDM2UNet2DModel,
        make_edm2,
        lambda **changes: make_edm2(target_time=True, **changes),
        EDM2_KINDS,
        {"block_out_channels": (8,), "attention_levels": (), "num_class_embeds": 7},
        1.0,
        (EDM2Block2D,),
        ("to_q", "to_v", "emb_linear", "time_embedding"),
    ),
    "CTMDiTTransformer2DModel": Family(
        CTMDiTTransformer2DModel,
        make_dit,
        lambda **changes: make_dit(target_time=True, **changes),
        DIT_KINDS,
        {"num_layers": 1, "num_class_embeds": 7},
        1000.0,
        (CTMDiTBlock,),
        ("to_q", "to_v", "linear", "linear_1"),
        "proj_out_2",
    ),
}


def inputs(unet, batch=3):
    """Sample, t, s and all conditions that `unet` knows."""
    config = unet.config
    sample = randn(batch, config.in_channels, *image_size(unet), dtype=torch.float32)
    t, s = torch.tensor([1.1, 0.3, 0.02])[:batch], torch.tensor([0.8, 0.01, 0.015])[:batch]
    condition = {}
    if config.num_class_embeds is not None:
        condition["class_labels"] = torch.arange(batch)
    elif config.get("class_embed_type") == "timestep":
        condition["class_labels"] = torch.arange(batch) * 3.5
    elif config.get("class_embed_type") == "identity":
        condition["class_labels"] = randn(batch, unet.time_embedding.linear_2.out_features, seed=1, dtype=torch.float32)
    if config.get("augment_dim") is not None:
        condition["augment_labels"] = randn(batch, config.augment_dim, seed=1, dtype=torch.float32)
    return sample, t, s, condition


def times(unet, t, s):
    """The times of (t, s) that the network is shown."""
    return (t, s) if unet.has_target_time else (t,)


def check_the_same(again, unet):
    """Equal weights, and equal outputs up to rounding, which depends on where in memory the weights lie."""
    for name, weight in unet.state_dict().items():
        assert torch.equal(again.state_dict()[name], weight), name
    sample, t, s, condition = inputs(unet)
    close(again(sample, *times(unet, t, s), **condition).sample, unet(sample, *times(unet, t, s), **condition).sample)


def blocks(unet):
    """The blocks that read the times, where one layer reads both."""
    return [module for module in unet.modules() if getattr(module, "time_emb_proj", None) is not None]


def make_unet_2d(cls=CTMUNet2DModel, random=True, seed=0, **changes):
    """A tiny network in eval mode. `random=True` also fills the layers that start at zero."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        unet = cls(**{**TINY, **changes}).eval()
        if random and cls is CTMUNet2DModel:
            for name, parameter in unet.named_parameters():
                if name.endswith("time_emb_proj.weight"):
                    torch.nn.init.normal_(parameter.data, std=0.3)
    return unet
