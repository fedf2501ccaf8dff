# Copyright 2026 The diffusers-ctm authors. Licensed under the Apache License, Version 2.0.
"""The network that options describe."""

import torch
from diffusers import UNet2DModel

from diffusers_ctm import CTMDiTTransformer2DModel, EDM2UNet2DModel, EDMHeunScheduler, EDMUNet2DModel

from ..cli.errors import UserError, listed
from ..cli.shared_options import NetworkOptions
from ..data.images import Images
from ..data.latents import LatentDataset
from .source import Network


def build_unet(
    config: NetworkOptions, dataset: Images | LatentDataset, dropout: float, label_dropout: float
) -> Network:
    """The network that the options describe. Untrained, its D is the best linear denoiser, as in EDM.

    Raises UserError for a resolution that it cannot halve or cut into patches, and if many classes have no image.
    """
    check_classes(dataset)
    levels = range(len(config.block_out_channels))
    halvings = 2 ** (len(levels) - 1)
    if dataset.resolution % halvings:
        raise UserError(
            f"--resolution must be a multiple of {halvings} for {len(levels)} --block_out_channels, got "
            f"{dataset.resolution}{' for latents' if dataset.pipeline_options else ''}."
        )
    shared = {
        "sample_size": dataset.resolution,
        "in_channels": dataset.channels,
        "out_channels": dataset.channels,
        "attention_head_dim": config.attention_head_dim,
        "dropout": dropout,
        "num_class_embeds": dataset.num_classes + 1 if label_dropout else dataset.num_classes,
    }
    if config.architecture == "dit":
        if dataset.resolution % config.patch_size:
            raise UserError(f"--patch_size must be a divisor of the resolution, {dataset.resolution}.")
        return CTMDiTTransformer2DModel(
            num_attention_heads=config.block_out_channels[0] // config.attention_head_dim,
            num_layers=config.layers_per_block,
            patch_size=config.patch_size,
            **shared,
        )
    shared |= {"block_out_channels": tuple(config.block_out_channels), "layers_per_block": config.layers_per_block}
    kinds = ["Attn" if level in config.attention_levels else "" for level in levels]
    if config.architecture == "ddpmpp":
        return EDMUNet2DModel(
            model_channels=config.block_out_channels[0] // 2, attention_levels=tuple(config.attention_levels), **shared
        )
    if config.architecture == "edm2":
        network = EDM2UNet2DModel(attention_levels=tuple(config.attention_levels), **shared)
        network.normalize_weights_()
        return network
    network = UNet2DModel(
        down_block_types=tuple(f"{kind}DownBlock2D" for kind in kinds),
        up_block_types=tuple(f"{kind}UpBlock2D" for kind in reversed(kinds)),
        add_attention=config.mid_attention,
        norm_num_groups=config.norm_num_groups,
        resnet_time_scale_shift=config.resnet_time_scale_shift,
        **shared,
    )
    torch.nn.init.zeros_(network.conv_out.weight)
    torch.nn.init.zeros_(network.conv_out.bias)
    return network


def check_classes(dataset: Images | LatentDataset) -> None:
    """Raise UserError if more than a few of the classes to be learned have no image, unless --num_classes says so."""
    empty = dataset.empty_classes
    if len(empty) > 1 and 10 * len(empty) > dataset.num_classes and dataset.options.num_classes is None:
        raise UserError(
            f"--label_column {dataset.label_column}: {len(empty)} of {dataset.num_classes} classes have no image, "
            f"{listed(map(str, empty))}. Number the classes without gaps, or give --num_classes {dataset.num_classes} "
            "if the network is to have them all the same."
        )


def build_scheduler(config: NetworkOptions, sigma_min: float, sigma_max: float) -> EDMHeunScheduler:
    """The preconditioning and levels of such a network."""
    return EDMHeunScheduler(
        sigma_min=sigma_min, sigma_max=sigma_max, sigma_data=config.sigma_data, timestep_scale=config.timestep_scale
    )
