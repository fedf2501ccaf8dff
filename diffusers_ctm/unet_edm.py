# Copyright 2026 The diffusers-ctm authors. Licensed under the Apache License, Version 2.0.
"""The networks DDPM++ and NCSN++ of EDM (Karras et al. 2022), with or without the second time of a CTM."""

import math
from collections.abc import Sequence

import torch
from diffusers import ModelMixin
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.loaders import PeftAdapterMixin
from diffusers.models.attention import AttentionMixin
from diffusers.models.attention_processor import Attention
from diffusers.models.downsampling import FirDownsample2D
from diffusers.models.embeddings import TimestepEmbedding, Timesteps
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.unets.unet_2d import UNet2DOutput
from diffusers.models.upsampling import FirUpsample2D, upfirdn2d_native
from torch import nn

from .checks import check_choice
from .two_times import both_times, class_vector, config_of, start_as


class EDMUNet2DModel(ModelMixin, ConfigMixin, AttentionMixin, PeftAdapterMixin):
    """F(x, t) of an EDM teacher, or F(x, t, s) of the CTM that is distilled from it (`target_time=True`).

    It is the U-Net of Song et al. (2021) as EDM trains it on CIFAR-10, FFHQ and AFHQv2 ("SongUNet"): DDPM++ with the
    default `time_embedding_type`, `encoder_type` and `resample_filter`, NCSN++ with "fourier", "residual", (1, 3, 3, 1)
    and `time_proj_dim = 2 * model_channels`. Times are c_noise of noise levels with timestep_scale 1,
    ln(sigma) / 4.

    The target time passes the same projection (and the same class embedding), an embedding of its own and, in every
    residual block, columns of its own in `time_emb_proj`, which reads [time, target time]. That equals one linear layer
    per time, added, as in the authors' CIFAR-10 network (Kim et al. 2024). The columns of the target start at zero.

    Args:
        sample_size: height and width of the images, or (height, width). A multiple of 2 to the number of levels - 1.
        in_channels: channels of the input.
        out_channels: channels of the output.
        model_channels: channels after the first convolution.
        block_out_channels: channels of each level, from the full resolution down; each level halves it.
        layers_per_block: residual blocks of a level on the way down; on the way up there is one more.
        attention_levels: levels whose blocks are followed by self-attention, 0 the full resolution (on the way up the
            last block only). The middle has attention always.
        attention_head_dim: channels of an attention head. None, as in EDM, is one head.
        dropout: probability of dropout in the residual blocks.
        time_embedding_type: "positional" (sines of geometric frequencies) or "fourier" (of normal random ones, scale
            16).
        time_proj_dim: number of sines and cosines. None is `model_channels`.
        time_embedding_dim: width of the time embedding. None is `4 * model_channels`.
        encoder_type: "standard", or how the image enters each lower level: "skip" (resampled, 1x1 convolution, added),
            "residual" (a running sum of strided convolutions, added with weight sqrt(1/2)).
        decoder_type: "standard", or "skip": every level has an output convolution, upsampled and added up.
        resample_filter: (1, 1) box, or (1, 3, 3, 1).
        num_class_embeds: number of classes. None: unconditional.
        label_dropout: probability of leaving out the class during training.
        augment_dim: length of the vector that describes how a training image was augmented. None: there is none.
        target_time: whether there is a second time.
        target_time_type: how it enters: "separate", as above, or "interval", one embedding of the projections of time
            and time - target time side by side (class and augmentation are added to both), as in MeanFlow's network for
            CIFAR-10 (Geng et al. 2025).
    """

    _supports_gradient_checkpointing = True
    _no_split_modules = ["ResnetBlock2D", "Attention"]
    _skip_layerwise_casting_patterns = ["norm"]

    @register_to_config
    def __init__(
        self,
        sample_size: int | tuple[int, int] | None = 32,
        in_channels: int = 3,
        out_channels: int = 3,
        model_channels: int = 128,
        block_out_channels: tuple[int, ...] = (256, 256, 256),
        layers_per_block: int = 4,
        attention_levels: tuple[int, ...] = (1,),
        attention_head_dim: int | None = None,
        dropout: float = 0.0,
        time_embedding_type: str = "positional",
        time_proj_dim: int | None = None,
        time_embedding_dim: int | None = None,
        encoder_type: str = "standard",
        decoder_type: str = "standard",
        resample_filter: tuple[int, ...] = (1, 1),
        num_class_embeds: int | None = None,
        label_dropout: float = 0.0,
        augment_dim: int | None = None,
        target_time: bool = False,
        target_time_type: str = "separate",
    ):
        super().__init__()
        check_choice("time_embedding_type", time_embedding_type, ("positional", "fourier"))
        check_choice("encoder_type", encoder_type, ("standard", "skip", "residual"))
        check_choice("decoder_type", decoder_type, ("standard", "skip"))
        check_choice("resample_filter", tuple(resample_filter), ((1, 1), (1, 3, 3, 1)))
        check_choice("target_time_type", target_time_type, ("separate", "interval") if target_time else ("separate",))

        # 1. Times, class and augmentation
        proj_dim = time_proj_dim or model_channels
        width = time_embedding_dim or 4 * model_channels
        if time_embedding_type == "positional":
            self.time_proj = Timesteps(proj_dim, flip_sin_to_cos=False, downscale_freq_shift=1)
        else:
            self.time_proj = EDMFourierProjection(proj_dim)
        is_separate = target_time and target_time_type == "separate"
        read_dim = proj_dim if is_separate or not target_time else 2 * proj_dim
        self.class_embedding = nn.Linear(num_class_embeds, read_dim) if num_class_embeds else None
        self.augment_embedding = nn.Linear(augment_dim, read_dim, bias=False) if augment_dim else None
        self.time_embedding = TimestepEmbedding(read_dim, width)
        self.target_time_embedding = TimestepEmbedding(proj_dim, width) if is_separate else None

        # 2. Down, middle, up; `skips` are the channels of what the way up receives from the way down
        layer = {
            "temb_channels": 2 * width if is_separate else width,
            "dropout": dropout,
            "kernel": "fir" if tuple(resample_filter) == (1, 3, 3, 1) else None,
            "head_dim": attention_head_dim,
        }
        self.conv_in = nn.Conv2d(in_channels, model_channels, 3, padding=1)
        skips = [model_channels]
        self.down_blocks = nn.ModuleList()
        image_channels = in_channels
        for level, channels in enumerate(block_out_channels):
            block = EDMDownBlock2D(
                in_channels=skips[-1],
                out_channels=channels,
                num_layers=layers_per_block,
                halve=level > 0,
                attention=level in attention_levels,
                image_channels=image_channels,
                image_input=encoder_type if level > 0 else "standard",
                resample_filter=resample_filter,
                **layer,
            )
            if level > 0 and encoder_type == "residual":
                image_channels = skips[-1]
            skips += [resnet.out_channels for resnet in block.resnets]
            self.down_blocks.append(block)

        channels = skips[-1]
        self.mid_block = EDMBlock2D([(channels, channels)] * 2, attention=(0,), **layer)

        self.up_blocks = nn.ModuleList()
        for level, out in reversed(list(enumerate(block_out_channels))):
            self.up_blocks.append(
                EDMUpBlock2D(
                    in_channels=channels,
                    skip_channels=[skips.pop() for _ in range(layers_per_block + 1)],
                    out_channels=out,
                    double=level < len(block_out_channels) - 1,
                    attention=level in attention_levels,
                    image_channels=out_channels if decoder_type == "skip" and level > 0 else None,
                    **layer,
                )
            )
            channels = out

        # 3. Out
        self.image_upsample = (
            FirUpsample2D(out_channels, fir_kernel=tuple(resample_filter))
            if decoder_type == "skip" and len(block_out_channels) > 1
            else None
        )
        self.conv_norm_out = edm_norm(channels)
        self.conv_out = nn.Conv2d(channels, out_channels, 3, padding=1)
        self._init_weights(width)

    @torch.no_grad()
    def _init_weights(self, width: int) -> None:
        """EDM's start: Xavier-uniform weights, zero biases; layers that end a branch are close to zero (gain 1e-5)."""
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Conv2d)):
                nn.init.xavier_uniform_(module.weight)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        for module in self.modules():
            if isinstance(module, ResnetBlock2D):
                module.conv2.weight.mul_(1e-5)
                nn.init.xavier_uniform_(module.time_emb_proj.weight[:, :width])
                nn.init.zeros_(module.time_emb_proj.weight[:, width:])
            elif isinstance(module, Attention):
                module.to_out[0].weight.mul_(1e-5)
                for projection in (module.to_q, module.to_k, module.to_v):
                    # gain sqrt(0.2) of one layer with three times as many outputs
                    nn.init.xavier_uniform_(projection.weight, gain=math.sqrt(0.2 / 2))
            elif isinstance(module, EDMUpBlock2D) and module.conv_out is not None:
                module.conv_out.weight.mul_(1e-5)
        self.conv_out.weight.mul_(1e-5)

    @property
    def has_target_time(self) -> bool:
        """Whether the network is shown a second time."""
        return self.config.target_time

    @property
    def last_layer(self) -> nn.Conv2d:
        """The layer at which adaptive loss weights compare gradients (the authors': `dec.32x32_aux_conv`)."""
        return self.conv_out

    @classmethod
    def from_unet(cls, unet: "EDMUNet2DModel") -> "EDMUNet2DModel":
        """A student that equals the teacher `unet` at every target time, on its device and in its dtype.

        Every weight of the teacher is copied, under its name; the target's embedding starts as a copy of the time's,
        and the columns that read it at zero. The copy shares no storage with `unet`. Raises ValueError if `unet` is no
        EDMUNet2DModel, or has a target time already.
        """
        if not isinstance(unet, EDMUNet2DModel):
            raise ValueError(f"from_unet starts from an EDMUNet2DModel, not from {type(unet).__name__}.")
        if unet.has_target_time:
            raise ValueError("from_unet starts from a network without target time; this one has it already.")
        return start_as(cls.from_config(config_of(unet), target_time=True), unet)

    def _conditioning(self, timestep, target_timestep, class_labels, augment_labels, dtype) -> torch.Tensor:
        """The embedding of time or interval, or [time, target time]; class and augmentation are in both. (B, width)."""
        condition = 0
        if self.class_embedding is not None:
            vector = class_vector(self, class_labels, timestep).to(dtype)
            condition = condition + self.class_embedding(vector)
        elif class_labels is not None:
            raise ValueError("class_labels were given, but this network has no class embedding")
        if self.augment_embedding is not None:
            if (
                augment_labels is None
            ):  # zeros, so that no process of a distributed training has a weight without gradient
                augment_labels = torch.zeros(timestep.shape[0], self.config.augment_dim, device=timestep.device)
            condition = condition + self.augment_embedding(augment_labels.to(dtype))
        elif augment_labels is not None:
            raise ValueError("augment_labels were given, but this network has no augment_dim")
        projection = self.time_proj(timestep)
        if self.config.target_time_type == "interval":
            projection = torch.cat([projection, self.time_proj(timestep - target_timestep)], dim=1)
        embedding = self.time_embedding(projection.to(dtype) + condition)
        if self.target_time_embedding is None:
            return embedding
        target_embedding = self.target_time_embedding(self.time_proj(target_timestep).to(dtype) + condition)
        return torch.cat([embedding, target_embedding], dim=1)

    def forward(
        self,
        sample: torch.Tensor,
        timestep: torch.Tensor | float,
        target_timestep: torch.Tensor | float | None = None,
        class_labels: torch.Tensor | None = None,
        augment_labels: torch.Tensor | None = None,
        return_dict: bool = True,
    ) -> UNet2DOutput | tuple[torch.Tensor]:
        """F(c_in(t) x_t, c_noise(t), c_noise(s)).

        Args:
            sample: the scaled noisy sample, shape (B, C, H, W).
            timestep: c_noise(t) = ln(t) / 4, a float or a float tensor of shape (), (1,) or (B,).
            target_timestep: c_noise(s), likewise. None is s = t: the network is then a denoiser.
            class_labels: (B,) integers, or floats of shape (B, num_class_embeds), a one-hot or a mixture. None is no
                class.
            augment_labels: how the sample was augmented, shape (B, augment_dim). None is not at all.
            return_dict: return a `UNet2DOutput` rather than a tuple.

        Raises:
            ValueError: integer times; a target time, labels or augment labels that the network does not have; labels of
                a wrong shape.
        """
        timestep, target = both_times(self, sample, timestep, target_timestep)
        temb = self._conditioning(timestep, target, class_labels, augment_labels, sample.dtype)

        image = sample
        sample = self.conv_in(sample)
        residuals = (sample,)
        for block in self.down_blocks:
            sample, image, new_residuals = block(sample, image, temb)
            residuals += new_residuals

        sample = self.mid_block(sample, temb)

        output = None
        for block in self.up_blocks:
            count = block.num_skips
            skips, residuals = residuals[-count:], residuals[:-count]
            sample = block(sample, skips, temb)
            if self.image_upsample is not None and block.conv_out is not None:
                output = block.image(sample) + (0 if output is None else self.image_upsample(output))

        sample = self.conv_out(nn.functional.silu(self.conv_norm_out(sample)))
        if output is not None:
            sample = sample + self.image_upsample(output)
        return UNet2DOutput(sample=sample) if return_dict else (sample,)


class EDMBlock2D(nn.Module):
    """Residual blocks at one resolution, and self-attention behind some of them (`attentions`, by block number)."""

    def __init__(
        self,
        channels: Sequence[tuple[int, int]],
        attention: Sequence[int],
        temb_channels: int,
        dropout: float,
        kernel: str | None,
        head_dim: int | None,
        resample: str | None = None,
    ):
        """`channels` holds (in, out) of each residual block; `resample`, "up" or "down", applies to the first."""
        super().__init__()
        self.gradient_checkpointing = False
        self.resnets, self.attentions = nn.ModuleList(), nn.ModuleDict()
        for index, (inside, outside) in enumerate(channels):
            resampled = resample is not None and index == 0
            self.resnets.append(
                ResnetBlock2D(
                    in_channels=inside,
                    out_channels=outside,
                    temb_channels=temb_channels,
                    dropout=dropout,
                    groups=edm_norm(inside).num_groups,
                    groups_out=edm_norm(outside).num_groups,
                    eps=1e-6,
                    kernel=kernel,
                    up=resampled and resample == "up",
                    down=resampled and resample == "down",
                    use_in_shortcut=True if resampled else None,
                    output_scale_factor=math.sqrt(2),
                )
            )
            if index in attention:
                dim_head = head_dim or outside
                self.attentions[str(index)] = Attention(
                    outside,
                    heads=outside // dim_head,
                    dim_head=dim_head,
                    norm_num_groups=edm_norm(outside).num_groups,
                    eps=1e-6,
                    bias=True,
                    upcast_softmax=True,
                    residual_connection=True,
                    rescale_output_factor=math.sqrt(2),
                )

    def layer(self, index: int, hidden_states: torch.Tensor, temb: torch.Tensor) -> torch.Tensor:
        """Residual block number `index`, and its attention if it has one."""
        layers = [(self.resnets[index], (temb,))]
        if str(index) in self.attentions:
            layers.append((self.attentions[str(index)], ()))
        for module, condition in layers:
            if torch.is_grad_enabled() and self.gradient_checkpointing:
                hidden_states = self._gradient_checkpointing_func(module, hidden_states, *condition)
            else:
                hidden_states = module(hidden_states, *condition)
        return hidden_states

    def forward(self, hidden_states: torch.Tensor, temb: torch.Tensor) -> torch.Tensor:
        for index in range(len(self.resnets)):
            hidden_states = self.layer(index, hidden_states, temb)
        return hidden_states


class EDMDownBlock2D(EDMBlock2D):
    """A level of the way down. Its first residual block may halve the resolution; the image may enter after that."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        num_layers: int,
        halve: bool,
        attention: bool,
        image_channels: int,
        image_input: str,
        resample_filter: Sequence[int],
        **layer,
    ):
        channels = [(in_channels, in_channels)] * halve + [(in_channels, out_channels)]
        channels += [(out_channels, out_channels)] * (num_layers - 1)
        super().__init__(
            channels,
            attention=range(int(halve), len(channels)) if attention else (),
            resample="down" if halve else None,
            **layer,
        )
        self.image_downsample = self.image_conv = None
        fir_kernel = tuple(resample_filter)
        if image_input == "skip":
            self.image_downsample = FirDownsample2D(image_channels, fir_kernel=fir_kernel)
            self.image_conv = nn.Conv2d(image_channels, in_channels, 1)
        elif image_input == "residual":
            self.image_downsample = EDMFirConvDownsample2D(image_channels, in_channels, fir_kernel)

    def forward(
        self, hidden_states: torch.Tensor, image: torch.Tensor, temb: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, tuple[torch.Tensor, ...]]:
        """Returns the hidden states, the image for the next level, and the output of each residual block."""
        residuals = ()
        for index in range(len(self.resnets)):
            hidden_states = self.layer(index, hidden_states, temb)
            if index == 0 and self.image_downsample is not None:
                image = self.image_downsample(image)
                if self.image_conv is not None:
                    hidden_states = hidden_states + self.image_conv(image)
                else:
                    hidden_states = image = (hidden_states + image) / math.sqrt(2)
            residuals += (hidden_states,)
        return hidden_states, image, residuals


class EDMUpBlock2D(EDMBlock2D):
    """A level of the way up. Its first residual block may double the resolution; each other one receives a skip."""

    def __init__(
        self,
        in_channels: int,
        skip_channels: Sequence[int],
        out_channels: int,
        double: bool,
        attention: bool,
        image_channels: int | None,
        **layer,
    ):
        channels = [(in_channels, in_channels)] * double
        for index, skip in enumerate(skip_channels):
            channels.append(((out_channels if index else in_channels) + skip, out_channels))
        super().__init__(
            channels,
            attention=(len(channels) - 1,) if attention else (),
            resample="up" if double else None,
            **layer,
        )
        self.num_skips = len(skip_channels)
        self.conv_norm_out = None if image_channels is None else edm_norm(out_channels)
        self.conv_out = None if image_channels is None else nn.Conv2d(out_channels, image_channels, 3, padding=1)

    def forward(self, hidden_states: torch.Tensor, skips: tuple[torch.Tensor, ...], temb: torch.Tensor) -> torch.Tensor:
        skips = list(skips)
        for index in range(len(self.resnets)):
            if index >= len(self.resnets) - self.num_skips:
                hidden_states = torch.cat([hidden_states, skips.pop()], dim=1)
            hidden_states = self.layer(index, hidden_states, temb)
        return hidden_states

    def image(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """This level's part of the output ("skip" decoder)."""
        return self.conv_out(nn.functional.silu(self.conv_norm_out(hidden_states)))


class EDMFirConvDownsample2D(FirDownsample2D):
    """diffusers' filter and convolution that halve the resolution, with the convolution called as a module.

    diffusers reads its weight past the module, where the hooks of offloading and of layerwise casting have not brought
    it.
    """

    def __init__(self, channels: int, out_channels: int, fir_kernel: tuple[int, ...]):
        super().__init__(channels, out_channels, use_conv=True, fir_kernel=fir_kernel)
        self.Conv2d_0.stride, self.Conv2d_0.padding = (2, 2), (0, 0)  # padded by the filter

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """(B, channels, H, W) to (B, out_channels, H / 2, W / 2)."""
        taps = torch.tensor(self.fir_kernel, dtype=hidden_states.dtype, device=hidden_states.device)
        padding = ((len(taps) + 1) // 2, len(taps) // 2)
        filtered = upfirdn2d_native(hidden_states, torch.outer(taps, taps) / taps.sum() ** 2, pad=padding)
        return self.Conv2d_0(filtered)


class EDMFourierProjection(nn.Module):
    """Sines, then cosines, of 2 pi times (16 * normal) random frequencies.

    A frequency of 40 leaves nothing of a time if it is rounded to bfloat16. A network's dtype is cast in many ways, but
    never that of whole numbers, so the buffer holds the bits of the float32 frequencies.
    """

    def __init__(self, channels: int, scale: float = 16.0):
        super().__init__()
        self.register_buffer(
            "frequency_bits", (torch.randn(channels // 2, dtype=torch.float32) * scale).view(torch.int32)
        )

    def forward(self, timestep: torch.Tensor) -> torch.Tensor:
        """(B,) to (B, channels), float32."""
        angles = timestep.float()[:, None] * (2 * math.pi * self.frequency_bits.view(torch.float32))
        return torch.cat([angles.sin(), angles.cos()], dim=1)


def edm_norm(channels: int) -> nn.GroupNorm:
    """Group normalization of EDM: 32 groups, or groups of 4 channels where that makes fewer."""
    return nn.GroupNorm(min(32, channels // 4), channels, eps=1e-6)
