# Copyright 2026 The diffusers-ctm authors. Licensed under the Apache License, Version 2.0.
"""The magnitude-preserving network of EDM2 (Karras et al. 2024), with or without the second time of a CTM."""

import math

import torch
from diffusers import ModelMixin
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.loaders import PeftAdapterMixin
from diffusers.models.attention import AttentionMixin, AttentionModuleMixin
from diffusers.models.attention_dispatch import dispatch_attention_fn
from diffusers.models.unets.unet_2d import UNet2DOutput
from torch import nn

from .two_times import both_times, class_vector, config_of, placed_as


EPSILON = 1e-4  # of every normalization, added to the root mean square


# Magnitude-preserving operations --------------------------------------------------------------------------------------


def normalize(x: torch.Tensor, dim: int | tuple[int, ...] = 1) -> torch.Tensor:
    """x / (1e-4 + root mean square of x over `dim`); over the channels it is pixel normalization."""
    norm = torch.linalg.vector_norm(x, dim=dim, keepdim=True, dtype=torch.promote_types(x.dtype, torch.float32))
    return x / (EPSILON + norm / math.sqrt(x.numel() / norm.numel())).to(x.dtype)


def mp_silu(x: torch.Tensor) -> torch.Tensor:
    """SiLU that keeps the variance of unit normal numbers (Eq. 81)."""
    return nn.functional.silu(x) / 0.596


def mp_sum(a: torch.Tensor, b: torch.Tensor, balance: float) -> torch.Tensor:
    """(1 - balance) a + balance b, scaled so that independent a and b of unit variance keep it (Eq. 88)."""
    return torch.lerp(a, b, balance) / math.hypot(1 - balance, balance)


def mp_cat(a: torch.Tensor, b: torch.Tensor, balance: float) -> torch.Tensor:
    """a and b one after the other on the channels, b contributing `balance` of the magnitude (Eq. 103)."""
    scale = math.sqrt(a.shape[1] + b.shape[1]) / math.hypot(1 - balance, balance)
    return torch.cat(
        [(1 - balance) * scale / math.sqrt(a.shape[1]) * a, balance * scale / math.sqrt(b.shape[1]) * b], dim=1
    )


def effective_weight(weight: torch.Tensor, gain: torch.Tensor | float, dtype: torch.dtype) -> torch.Tensor:
    """What a layer multiplies with: rows (output channels) of norm 1, times the gain (Eq. 47), computed in float32.

    It does not depend on the length of the rows of `weight`, but for `EPSILON`.
    """
    weight = weight.to(torch.promote_types(weight.dtype, torch.float32))
    return (normalize(weight, tuple(range(1, weight.ndim))) * (gain / math.sqrt(weight[0].numel()))).to(dtype)


class MPLinear(nn.Linear):
    """A linear layer without bias whose rows are normalized at each call."""

    def __init__(self, in_features: int, out_features: int):
        super().__init__(in_features, out_features, bias=False)

    def reset_parameters(self) -> None:
        nn.init.normal_(self.weight)

    def forward(self, x: torch.Tensor, gain: torch.Tensor | float = 1.0) -> torch.Tensor:
        return nn.functional.linear(x, effective_weight(self.weight, gain, x.dtype))


class MPConv2d(nn.Conv2d):
    """A convolution without bias, with zeros around the image, whose filters are normalized at each call."""

    def __init__(self, in_channels: int, out_channels: int, kernel_size: int):
        super().__init__(in_channels, out_channels, kernel_size, padding=kernel_size // 2, bias=False)

    def reset_parameters(self) -> None:
        nn.init.normal_(self.weight)

    def forward(self, x: torch.Tensor, gain: torch.Tensor | float = 1.0) -> torch.Tensor:
        return nn.functional.conv2d(x, effective_weight(self.weight, gain, x.dtype), padding=self.padding)


class MPFourier(nn.Module):
    """sqrt(2) cos(f c + p), of random frequencies 2 pi N(0, 1) and phases 2 pi U(0, 1) that are never trained (Eq. 75).

    They stay float32 whatever dtype the network is cast to: the buffers hold their bits, as whole numbers.
    """

    def __init__(self, channels: int):
        super().__init__()
        frequencies = 2 * math.pi * torch.randn(channels, dtype=torch.float32)
        phases = 2 * math.pi * torch.rand(channels, dtype=torch.float32)
        self.register_buffer("frequency_bits", frequencies.view(torch.int32))
        self.register_buffer("phase_bits", phases.view(torch.int32))

    def forward(self, c: torch.Tensor) -> torch.Tensor:
        """(B,) to (B, channels), float32 or float64."""
        c = c.to(torch.promote_types(c.dtype, torch.float32))[:, None]
        frequencies, phases = self.frequency_bits.view(torch.float32), self.phase_bits.view(torch.float32)
        return math.sqrt(2) * torch.cos(c * frequencies + phases)


def resample(x: torch.Tensor, direction: str | None, taps: tuple[float, ...]) -> torch.Tensor:
    """Halve ("down") or double ("up") the resolution by the separable filter `taps`; None keeps it.

    A filter of even length; (1, 1) is a mean of 2x2 pixels and their repetition.
    """
    if direction is None:
        return x
    if tuple(taps) == (1, 1):
        return nn.functional.avg_pool2d(x, 2) if direction == "down" else nn.functional.interpolate(x, scale_factor=2)
    row = torch.tensor(taps, dtype=x.dtype, device=x.device) / sum(taps)
    kernel = torch.outer(row, row).expand(x.shape[1], 1, -1, -1)
    options = {"stride": 2, "padding": len(taps) // 2 - 1, "groups": x.shape[1]}
    if direction == "down":
        return nn.functional.conv2d(x, kernel, **options)
    return nn.functional.conv_transpose2d(x, 4 * kernel, **options)


# The network ----------------------------------------------------------------------------------------------------------


class EDM2UNet2DModel(ModelMixin, ConfigMixin, AttentionMixin, PeftAdapterMixin):
    """F(x, t) of an EDM2 teacher, or F(x, t, s) of the CTM that is distilled from it (`target_time=True`).

    Every layer keeps the magnitude of what passes: weights are normalized at each call, sums and concatenations are
    balanced, and there are neither biases nor group normalization (Karras et al. 2024, Figure 21 and Appendix B). Times
    are c_noise of noise levels with timestep_scale 1, ln(sigma) / 4.

    The target time has Fourier features and an embedding of its own, and in each block a linear layer of its own,
    `target_emb_linear`, beside that of the time; `target_emb_gain`, at first 0, says how much of it is added. So a new
    student equals its teacher.

    Training calls `normalize_weights_` after each step of the optimizer. Adapters (LoRA) fit on the linear layers, such
    as "to_q" and "emb_linear"; they cannot be fused.

    Args:
        sample_size: height and width of the images or latents, or (height, width). A multiple of 2 to the number of
            levels - 1.
        in_channels: channels of the input. The network adds one of ones.
        out_channels: channels of the output.
        block_out_channels: channels of each level, from the full resolution down; each level halves it.
        layers_per_block: blocks of a level on the way down; on the way up there is one more.
        attention_levels: levels whose blocks have self-attention, 0 the full resolution. The first block of the middle
            has it always.
        attention_head_dim: channels of an attention head; every level with attention has a multiple of it.
        dropout: probability of dropout in the blocks.
        time_proj_dim: number of Fourier features. None is `block_out_channels[0]`.
        time_embedding_dim: width of the embedding. None is the largest of `block_out_channels`.
        num_class_embeds: number of classes. None: unconditional.
        label_dropout: probability of leaving out the class during training.
        label_balance: share of the class in the embedding.
        concat_balance: share of the skip connection.
        res_balance, attn_balance: share of the residual and of the attention branch.
        clip_act: activations are clipped to [-clip_act, clip_act] after each block.
        resample_filter: taps of the filter between levels, an even number of them.
        log_variance_channels: Fourier features of `log_variance`. None: there is none.
        target_time: whether there is a second time.

    Raises:
        ValueError: a level with attention whose channels are no multiple of `attention_head_dim`, or a filter that has
            an odd number of taps or a sum of 0.
    """

    _supports_gradient_checkpointing = True
    _no_split_modules = ["EDM2Block2D"]

    @register_to_config
    def __init__(
        self,
        sample_size: int | tuple[int, int] | None = 64,
        in_channels: int = 3,
        out_channels: int = 3,
        block_out_channels: tuple[int, ...] = (128, 256, 384, 512),
        layers_per_block: int = 3,
        attention_levels: tuple[int, ...] = (2, 3),
        attention_head_dim: int = 64,
        dropout: float = 0.0,
        time_proj_dim: int | None = None,
        time_embedding_dim: int | None = None,
        num_class_embeds: int | None = None,
        label_dropout: float = 0.0,
        label_balance: float = 0.5,
        concat_balance: float = 0.5,
        res_balance: float = 0.3,
        attn_balance: float = 0.3,
        clip_act: float = 256.0,
        resample_filter: tuple[float, ...] = (1, 1),
        log_variance_channels: int | None = 128,
        target_time: bool = False,
    ):
        super().__init__()
        self.gradient_checkpointing = False
        last = len(block_out_channels) - 1
        for level in {*attention_levels, last}:
            if block_out_channels[level] % attention_head_dim:
                raise ValueError(
                    f"attention_head_dim={attention_head_dim} must divide the {block_out_channels[level]} channels of "
                    f"level {level}, which has attention."
                )

        if len(resample_filter) % 2 or not sum(resample_filter):
            raise ValueError(
                f"resample_filter={resample_filter} must have an even number of taps and a sum that is not 0, such as "
                "(1, 1)."
            )

        # 1. Times and class
        proj_dim = time_proj_dim or block_out_channels[0]
        width = time_embedding_dim or max(block_out_channels)
        self.time_proj = MPFourier(proj_dim)
        self.time_embedding = MPLinear(proj_dim, width)
        self.class_embedding = MPLinear(num_class_embeds, width) if num_class_embeds else None
        self.target_time_proj = MPFourier(proj_dim) if target_time else None
        self.target_time_embedding = MPLinear(proj_dim, width) if target_time else None

        # 2. Down, middle, up; `skips` are the channels of what the way up receives from the way down
        def block(in_channels: int, out_channels: int, level: int, **kind) -> EDM2Block2D:
            kind.setdefault("attention", level in attention_levels and kind.get("resample") is None)
            return EDM2Block2D(
                in_channels,
                out_channels,
                emb_channels=width,
                target_time=target_time,
                head_dim=attention_head_dim,
                dropout=dropout,
                res_balance=res_balance,
                attn_balance=attn_balance,
                concat_balance=concat_balance,
                clip_act=clip_act,
                resample_filter=tuple(resample_filter),
                **kind,
            )

        channels = block_out_channels[0]
        self.conv_in = MPConv2d(in_channels + 1, channels, 3)
        self.down_blocks, skips = nn.ModuleList(), [channels]
        for level, out in enumerate(block_out_channels):
            if level > 0:
                self.down_blocks.append(block(channels, channels, level, encoder=True, resample="down"))
                skips.append(channels)
            for _ in range(layers_per_block):
                self.down_blocks.append(block(channels, out, level, encoder=True))
                skips.append(out)
                channels = out

        self.mid_blocks = nn.ModuleList(
            block(channels, channels, last, encoder=False, attention=attention) for attention in (True, False)
        )

        self.up_blocks = nn.ModuleList()
        for level, out in reversed(list(enumerate(block_out_channels))):
            if level < last:
                self.up_blocks.append(block(channels, channels, level, encoder=False, resample="up"))
            for _ in range(layers_per_block + 1):
                self.up_blocks.append(block(channels, out, level, encoder=False, skip_channels=skips.pop()))
                channels = out

        # 3. Out
        self.conv_out = MPConv2d(channels, out_channels, 3)
        self.out_gain = nn.Parameter(torch.zeros(()))
        self.log_variance_proj = MPFourier(log_variance_channels) if log_variance_channels else None
        self.log_variance_linear = MPLinear(log_variance_channels, 1) if log_variance_channels else None

    @property
    def has_target_time(self) -> bool:
        """Whether the network is shown a second time."""
        return self.target_time_embedding is not None

    @property
    def last_layer(self) -> nn.Conv2d:
        """The layer at which adaptive loss weights compare gradients."""
        return self.conv_out

    @classmethod
    def from_unet(cls, unet: "EDM2UNet2DModel") -> "EDM2UNet2DModel":
        """A student that equals the teacher `unet` to the last bit at every target time, on its device, in its dtype.

        Every weight of the teacher is copied, under its name, but for those of `log_variance`, which belong to the
        teacher's own training. What reads the target time is new and random, with gains of zero. (A copy of the time's
        own embedding would add up with it where both times are equal.) The copy shares no storage with `unet`. Raises
        ValueError if `unet` is no EDM2UNet2DModel, or has a target time already.
        """
        if not isinstance(unet, EDM2UNet2DModel):
            raise ValueError(f"from_unet starts from an EDM2UNet2DModel, not from {type(unet).__name__}.")
        if unet.has_target_time:
            raise ValueError("from_unet starts from a network without target time; this one has it already.")
        student = cls.from_config(config_of(unet), target_time=True, log_variance_channels=None)
        student = placed_as(student, unet)
        weights = {name: weight for name, weight in unet.state_dict().items() if not name.startswith("log_variance_")}
        student.load_state_dict(student.state_dict() | weights)
        return student

    @torch.no_grad()
    def normalize_weights_(self, applied: torch.Tensor | None = None) -> None:
        """Give every row of every weight a root mean square of 1, as training keeps it (Eq. 66).

        Call it after each step of the optimizer, so that its learning rate stays the relative size of a step. The
        output changes by what `EPSILON` in the normalization makes of it, about 1e-4. `applied`, a bool of shape () on
        the device, says whether the step was taken; at False nothing changes, and the host need not know it.
        """
        for module in self.modules():
            if isinstance(module, (MPLinear, MPConv2d)):
                weight = normalize(module.weight, tuple(range(1, module.weight.ndim)))
                module.weight.copy_(weight if applied is None else torch.where(applied, weight, module.weight))

    def log_variance(self, timestep: torch.Tensor) -> torch.Tensor:
        """u(sigma), the logarithm of the loss that is to be expected at c_noise = `timestep` (Eq. 21); (B,) to (B,).

        Training divides the loss by exp(u) and adds u. Raises ValueError without `log_variance_channels`.
        """
        if self.log_variance_linear is None:
            raise ValueError("This network has no log_variance_channels.")
        with torch.autocast(timestep.device.type, enabled=False):
            return self.log_variance_linear(self.log_variance_proj(timestep))[:, 0]

    def fuse_lora(self, *args, **kwargs) -> None:
        """Raises ValueError: the sum of a weight and an adapter would be normalized, and the adapter with it."""
        raise ValueError("The weights of an EDM2UNet2DModel are normalized at each call; no adapter fits into them.")

    def _embeddings(self, timestep, target_timestep, class_labels) -> tuple[torch.Tensor, ...]:
        """The embedding of time and class, and that of the target time; each (B, width), float32 or float64."""
        embedding = self.time_embedding(self.time_proj(timestep))
        if self.class_embedding is not None:
            vector = class_vector(self, class_labels, timestep).to(embedding.dtype)
            embedding = mp_sum(embedding, self.class_embedding(vector), self.config.label_balance)
        elif class_labels is not None:
            raise ValueError("class_labels were given, but this network has no class embedding")
        if not self.has_target_time:
            return (mp_silu(embedding),)
        return mp_silu(embedding), mp_silu(self.target_time_embedding(self.target_time_proj(target_timestep)))

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
            timestep: c_noise(t) = ln(t) / 4, a float or a float tensor of shape (), (1,) or (B,).
            target_timestep: c_noise(s), likewise. None is s = t: the network is then a denoiser.
            class_labels: (B,) integers, or floats of shape (B, num_class_embeds), a one-hot or a mixture. None is no
                class.
            return_dict: return a `UNet2DOutput` rather than a tuple.

        Raises:
            ValueError: integer times; a target time or labels that the network does not have; labels of a wrong shape.
        """
        timestep, target = both_times(self, sample, timestep, target_timestep)
        with torch.autocast(sample.device.type, enabled=False):
            embeddings = self._embeddings(timestep, target, class_labels)

        sample = self.conv_in(torch.cat([sample, torch.ones_like(sample[:, :1])], dim=1))
        skips = [sample]
        for block in self.down_blocks:
            sample = self._run(block, sample, None, embeddings)
            skips.append(sample)
        for block in self.mid_blocks:
            sample = self._run(block, sample, None, embeddings)
        for block in self.up_blocks:
            sample = self._run(block, sample, skips.pop() if block.has_skip else None, embeddings)
        sample = self.conv_out(sample, self.out_gain)
        return UNet2DOutput(sample=sample) if return_dict else (sample,)

    def _run(self, block, sample, skip, embeddings) -> torch.Tensor:
        if torch.is_grad_enabled() and self.gradient_checkpointing:
            return self._gradient_checkpointing_func(block, sample, skip, *embeddings)
        return block(sample, skip, *embeddings)


class EDM2Block2D(nn.Module):
    """A residual block, and self-attention behind it (Figure 21).

    A block of the encoder normalizes its input over the channels, and that goes on as the main path.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        emb_channels: int,
        encoder: bool,
        target_time: bool,
        attention: bool,
        head_dim: int,
        dropout: float,
        res_balance: float,
        attn_balance: float,
        concat_balance: float,
        clip_act: float,
        resample_filter: tuple[float, ...],
        resample: str | None = None,
        skip_channels: int = 0,
    ):
        super().__init__()
        self.encoder, self.resample, self.resample_filter = encoder, resample, resample_filter
        self.has_skip, self.concat_balance = skip_channels > 0, concat_balance
        self.res_balance, self.attn_balance, self.clip_act = res_balance, attn_balance, clip_act
        in_channels += skip_channels
        self.conv1 = MPConv2d(out_channels if encoder else in_channels, out_channels, 3)
        self.emb_linear = MPLinear(emb_channels, out_channels)
        self.emb_gain = nn.Parameter(torch.zeros(()))
        self.target_emb_linear = MPLinear(emb_channels, out_channels) if target_time else None
        self.target_emb_gain = nn.Parameter(torch.zeros(())) if target_time else None
        self.dropout = nn.Dropout(dropout)
        self.conv2 = MPConv2d(out_channels, out_channels, 3)
        self.conv_shortcut = MPConv2d(in_channels, out_channels, 1) if in_channels != out_channels else None
        self.attention = EDM2Attention(out_channels, head_dim) if attention else None

    def _scale(self, embedding: torch.Tensor, target_embedding: torch.Tensor | None) -> torch.Tensor:
        """What the channels of the residual branch are multiplied with, (B, channels)."""
        with torch.autocast(embedding.device.type, enabled=False):
            scale = 1 + self.emb_linear(embedding, self.emb_gain)
            if target_embedding is not None:
                scale = scale + self.target_emb_linear(target_embedding, self.target_emb_gain)
        return scale

    def forward(
        self,
        x: torch.Tensor,
        skip: torch.Tensor | None,
        embedding: torch.Tensor,
        target_embedding: torch.Tensor | None = None,
    ) -> torch.Tensor:
        x = resample(x, self.resample, self.resample_filter)
        if skip is not None:
            x = mp_cat(x, skip, self.concat_balance)
        if self.encoder:
            x = x if self.conv_shortcut is None else self.conv_shortcut(x)
            x = normalize(x)

        y = self.conv1(mp_silu(x))
        y = mp_silu(y * self._scale(embedding, target_embedding)[:, :, None, None].to(y.dtype))
        y = self.conv2(self.dropout(y))
        if not self.encoder and self.conv_shortcut is not None:
            x = self.conv_shortcut(x)
        x = mp_sum(x, y, self.res_balance)

        if self.attention is not None:
            x = mp_sum(x, self.attention(x), self.attn_balance)
        return x.clamp(-self.clip_act, self.clip_act)


class EDM2AttnProcessor:
    """Self-attention of queries, keys and values that are normalized in each head."""

    _attention_backend = None
    _parallel_config = None

    def __call__(self, attn: "EDM2Attention", hidden_states: torch.Tensor) -> torch.Tensor:
        """(B, tokens, channels) to the same."""
        query, key, value = (
            normalize(layer(hidden_states).unflatten(-1, (attn.heads, -1)), dim=3)
            for layer in (attn.to_q, attn.to_k, attn.to_v)
        )
        attended = dispatch_attention_fn(
            query, key, value, backend=self._attention_backend, parallel_config=self._parallel_config
        )
        return attn.to_out[0](attended.flatten(2).to(hidden_states.dtype))


class EDM2Attention(nn.Module, AttentionModuleMixin):
    """Self-attention over the pixels of an image; its layers are 1x1 convolutions, seen as linear."""

    _default_processor_cls = EDM2AttnProcessor
    _available_processors = [EDM2AttnProcessor]
    _supports_qkv_fusion = False

    def __init__(self, channels: int, head_dim: int):
        super().__init__()
        self.heads = channels // head_dim
        self.to_q, self.to_k, self.to_v = (MPLinear(channels, channels) for _ in range(3))
        self.to_out = nn.ModuleList([MPLinear(channels, channels)])
        self.set_processor(EDM2AttnProcessor())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(B, channels, H, W) to the same."""
        tokens = x.flatten(2).transpose(1, 2)
        return self.processor(self, tokens).transpose(1, 2).unflatten(2, x.shape[2:])
