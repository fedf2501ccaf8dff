# Copyright 2026 The diffusers-ctm authors. Licensed under the Apache License, Version 2.0.
"""diffusers' UNet2DModel with a second time: the network F(x, t, s) of a consistency trajectory model."""

import functools

import torch
from diffusers import UNet2DModel
from diffusers.loaders import PeftAdapterMixin
from diffusers.models.attention import AttentionMixin
from diffusers.models.embeddings import TimestepEmbedding
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.unets.unet_2d import UNet2DOutput
from torch import nn

from .two_times import both_times, config_of, start_as, widened


class CTMUNet2DModel(UNet2DModel, AttentionMixin, PeftAdapterMixin):
    """A `UNet2DModel` that is shown two times, where it stands and where it jumps to.

    The target time has its own embedding, `target_time_embedding`, and enters every residual block beside the time:
    each `time_emb_proj` reads the concatenation [time, target time] and is twice as wide. That equals one linear layer
    per time, added, as in the authors' ImageNet-64 network (Kim et al. 2024, Appendix). The class embedding is added to
    the time only. The new columns start at zero, so that before training the output does not depend on the target, and
    `from_unet` equals its teacher.

    Its arguments, config and weight names are those of `UNet2DModel`, with `target_time_embedding.*` added.
    `from_pretrained` reads what this class saved; a saved `UNet2DModel` is loaded as such and passed to `from_unet`.
    """

    _no_split_modules = ["ResnetBlock2D", "Attention"]
    has_target_time = True  # whether the network is shown a second time

    @functools.wraps(UNet2DModel.__init__)
    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)  # registers its arguments, which are ours
        if self.config.time_embedding_type == "learned":
            raise ValueError("time_embedding_type='learned' knows whole timesteps only; use 'positional' or 'fourier'.")
        embedding = self.time_embedding
        self.target_time_embedding = TimestepEmbedding(embedding.linear_1.in_features, embedding.linear_1.out_features)
        for block in list(self.modules()):
            if isinstance(block, ResnetBlock2D) and block.time_emb_proj is not None:
                block.time_emb_proj = widened(block.time_emb_proj)

    @property
    def last_layer(self) -> nn.Conv2d:
        """The layer at which adaptive loss weights compare gradients."""
        return self.conv_out

    @classmethod
    def from_unet(cls, unet: UNet2DModel) -> "CTMUNet2DModel":
        """A student that equals the teacher `unet` at every target time, on its device and in its dtype.

        Copies every weight, class embeddings included; the target's embedding starts as a copy of the time's, and the
        columns that read it at zero. The copy shares no storage with `unet`. Raises ValueError if `unet` is no
        UNet2DModel.
        """
        if not isinstance(unet, UNet2DModel) or isinstance(unet, CTMUNet2DModel):
            raise ValueError(f"from_unet starts from a diffusers UNet2DModel, not from {type(unet).__name__}.")
        return start_as(cls.from_config(config_of(unet)), unet)

    def _conditioning(self, timestep, target_timestep, class_labels, dtype) -> torch.Tensor:
        """[embedding of time and class, embedding of the target time], shape (B, 2 * embedding width)."""
        embedding = self.time_embedding(self.time_proj(timestep).to(dtype))
        target_embedding = self.target_time_embedding(self.time_proj(target_timestep).to(dtype))
        if self.class_embedding is not None:
            if class_labels is None:
                raise ValueError("class_labels should be provided when doing class conditioning")
            if self.config.class_embed_type == "timestep":
                class_labels = self.time_proj(class_labels).to(dtype)
            embedding = embedding + self.class_embedding(class_labels).to(dtype)
        elif class_labels is not None:
            raise ValueError("class_labels were given, but this network has no class embedding")
        return torch.cat([embedding, target_embedding], dim=1)

    def forward(
        self,
        sample: torch.Tensor,
        timestep: torch.Tensor | float,
        target_timestep: torch.Tensor | float | None = None,
        class_labels: torch.Tensor | None = None,
        return_dict: bool = True,
    ) -> UNet2DOutput | tuple[torch.Tensor]:
        """F(c_in(t) x_t, c_noise(t), c_noise(s)).

        Args:
            sample: the scaled noisy sample, shape (B, C, H, W).
            timestep: c_noise(t), a float or a float tensor of shape (), (1,) or (B,).
            target_timestep: c_noise(s), likewise. None is s = t: the network is then a denoiser.
            class_labels: (B,) integers, or what `class_embed_type` asks.
            return_dict: return a `UNet2DOutput` rather than a tuple.

        Raises:
            ValueError: integer times, class labels missing or not expected.
        """
        if self.config.center_input_sample:
            sample = 2 * sample - 1.0
        timestep, target = both_times(self, sample, timestep, target_timestep)
        emb = self._conditioning(timestep, target, class_labels, sample.dtype)

        # From here on as in UNet2DModel.
        skip_sample = sample
        sample = self.conv_in(sample)
        residuals = (sample,)
        for block in self.down_blocks:
            if hasattr(block, "skip_conv"):
                sample, res_samples, skip_sample = block(hidden_states=sample, temb=emb, skip_sample=skip_sample)
            else:
                sample, res_samples = block(hidden_states=sample, temb=emb)
            residuals += res_samples

        if self.mid_block is not None:
            sample = self.mid_block(sample, emb)

        skip_sample = None
        for block in self.up_blocks:
            count = len(block.resnets)
            res_samples, residuals = residuals[-count:], residuals[:-count]
            if hasattr(block, "skip_conv"):
                sample, skip_sample = block(sample, res_samples, emb, skip_sample)
            else:
                sample = block(sample, res_samples, emb)

        sample = self.conv_out(self.conv_act(self.conv_norm_out(sample)))
        if skip_sample is not None:
            sample = sample + skip_sample
        if self.config.time_embedding_type == "fourier":
            sample = sample / timestep.reshape(-1, 1, 1, 1)
        return UNet2DOutput(sample=sample) if return_dict else (sample,)
