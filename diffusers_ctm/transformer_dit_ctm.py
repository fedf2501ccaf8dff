# Copyright 2026 The diffusers-ctm authors. Licensed under the Apache License, Version 2.0.
"""The diffusion transformer DiT (Peebles & Xie 2023), with or without the second time of a CTM."""

import inspect

import torch
from diffusers import DiTTransformer2DModel, ModelMixin
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.loaders import PeftAdapterMixin
from diffusers.models.attention import AttentionMixin, FeedForward
from diffusers.models.attention_processor import Attention
from diffusers.models.embeddings import (
    LabelEmbedding,
    PatchEmbed,
    TimestepEmbedding,
    Timesteps,
    get_2d_sincos_pos_embed,
)
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from diffusers.models.normalization import AdaLayerNormZero
from torch import nn

from .two_times import both_times, config_of, placed_as


TIME_FEATURES = 256  # sines and cosines of a time, as in DiT


class CTMDiTTransformer2DModel(ModelMixin, ConfigMixin, AttentionMixin, PeftAdapterMixin):
    """F(x, t) of a DiT, or F(x, t, s) of the CTM that is distilled from it (`target_time=True`).

    It is diffusers' `DiTTransformer2DModel`, with the same names of weights, but for three things: it predicts no
    variances, it takes real times, and it leaves out no labels in training, which is the trainer's to do.

    Every block embeds time and class, and its `norm1.linear` (adaLN) makes shifts, scales and gates of the sum; the
    output layer reads the sum of the first block. The embedding of the target time, `target_time_embedding`, is one for
    all blocks and is added to each of these sums: each block's adaLN layer reads it in its own way, as those of the
    published DiT read one embedding of the time. That is 1.6 million weights for DiT-XL/2, 0.2% more. Its second layer
    starts at zero, so that a new student equals its teacher.

    Args:
        num_attention_heads: attention heads; times `attention_head_dim` it is the width, a multiple of 4.
        attention_head_dim: channels of an attention head.
        in_channels: channels of the input.
        out_channels: channels of the output.
        num_layers: blocks.
        dropout: probability of dropout at the end of both branches of a block.
        attention_bias: whether queries, keys and values have biases.
        sample_size: height and width of the images or latents, or (height, width), multiples of `patch_size`.
        patch_size: height and width of the patches.
        activation_fn: of the feed-forward layers, a name of diffusers' `FeedForward`.
        num_class_embeds: number of labels; one that means "no class" is the last. None: unconditional.
        upcast_attention: whether attention is computed in float32.
        norm_elementwise_affine: whether the norm before the feed-forward layers has weights.
        norm_eps: added to the variance in it.
        target_time: whether there is a second time.

    Raises:
        ValueError: a width that is no multiple of 4, or a `sample_size` of no whole patches.
    """

    _supports_gradient_checkpointing = True
    _no_split_modules = ["CTMDiTBlock"]
    _repeated_blocks = ["CTMDiTBlock"]
    _skip_layerwise_casting_patterns = ["pos_embed", "norm"]

    @register_to_config
    def __init__(
        self,
        num_attention_heads: int = 16,
        attention_head_dim: int = 72,
        in_channels: int = 4,
        out_channels: int = 4,
        num_layers: int = 28,
        dropout: float = 0.0,
        attention_bias: bool = True,
        sample_size: int | tuple[int, int] = 32,
        patch_size: int = 2,
        activation_fn: str = "gelu-approximate",
        num_class_embeds: int | None = None,
        upcast_attention: bool = False,
        norm_elementwise_affine: bool = False,
        norm_eps: float = 1e-5,
        target_time: bool = False,
    ):
        super().__init__()
        self.gradient_checkpointing = False
        width = num_attention_heads * attention_head_dim
        size = (sample_size, sample_size) if isinstance(sample_size, int) else tuple(sample_size)
        if width % 4:
            raise ValueError(
                f"num_attention_heads={num_attention_heads} times attention_head_dim={attention_head_dim} must be a "
                "multiple of 4."
            )
        self._check_size(*size)

        # 1. Patches and their positions
        self.pos_embed = CTMPatchEmbed(*size, patch_size, in_channels, width)
        if size[0] != size[1]:  # of which diffusers makes as many positions as for a square
            grid = (self.pos_embed.height, self.pos_embed.width)
            positions = get_2d_sincos_pos_embed(width, grid, base_size=self.pos_embed.base_size)
            self.pos_embed.register_buffer("pos_embed", positions.float()[None], persistent=False)

        # 2. Times and blocks
        self.time_proj = Timesteps(TIME_FEATURES, flip_sin_to_cos=True, downscale_freq_shift=1)
        self.target_time_embedding = TimestepEmbedding(TIME_FEATURES, width) if target_time else None
        self.transformer_blocks = nn.ModuleList(
            CTMDiTBlock(
                width,
                heads=num_attention_heads,
                dropout=dropout,
                attention_bias=attention_bias,
                activation_fn=activation_fn,
                num_class_embeds=num_class_embeds,
                upcast_attention=upcast_attention,
                norm_elementwise_affine=norm_elementwise_affine,
                norm_eps=norm_eps,
            )
            for _ in range(num_layers)
        )

        # 3. Out
        self.norm_out = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
        self.proj_out_1 = nn.Linear(width, 2 * width)
        self.proj_out_2 = nn.Linear(width, patch_size**2 * out_channels)
        self._init_weights()

    @torch.no_grad()
    def _init_weights(self) -> None:
        """DiT's start: every block is the identity, and the output zero."""
        for name, module in self.named_modules():
            if isinstance(module, nn.Embedding):
                nn.init.normal_(module.weight, std=0.02)
            elif isinstance(module, (nn.Linear, nn.Conv2d)):
                if "proj_out" in name or name.endswith("norm1.linear") or name == "target_time_embedding.linear_2":
                    nn.init.zeros_(module.weight)
                elif "timestep_embedder" in name or name == "target_time_embedding.linear_1":
                    nn.init.normal_(module.weight, std=0.02)
                else:
                    nn.init.xavier_uniform_(module.weight.flatten(1))
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    @classmethod
    def from_config(cls, config=None, return_unused_kwargs: bool = False, **kwargs):
        if isinstance(config, dict) and "num_embeds_ada_norm" in config:  # it would lose its classes
            raise ValueError(
                "This is the config of a DiTTransformer2DModel. Load it as one, and pass it to "
                "`CTMDiTTransformer2DModel.from_unet`."
            )
        return super().from_config(config, return_unused_kwargs, **kwargs)

    @property
    def has_target_time(self) -> bool:
        """Whether the network is shown a second time."""
        return self.target_time_embedding is not None

    @property
    def last_layer(self) -> nn.Linear:
        """The layer at which adaptive loss weights compare gradients."""
        return self.proj_out_2

    @classmethod
    def from_unet(
        cls, unet: "DiTTransformer2DModel | CTMDiTTransformer2DModel", target_time: bool = True
    ) -> "CTMDiTTransformer2DModel":
        """A student that equals the teacher `unet` to the last bit at every target time, on its device, in its dtype.

        Every weight of the teacher is copied, under its name. Of a `DiTTransformer2DModel` that predicts variances
        beside the noise, twice as many channels, those are left out; the student equals the rest up to rounding. The
        first layer of `target_time_embedding` starts as a copy of the time's, the second at zero. The copy shares no
        storage with `unet`. `target_time=False` gives the teacher itself as a network of this class. Raises ValueError
        if `unet` is of another class, has a target time already, or gives other channels than it takes.
        """
        if isinstance(unet, DiTTransformer2DModel):
            config, weights = _without_variance(unet)
        elif isinstance(unet, CTMDiTTransformer2DModel):
            if unet.has_target_time:
                raise ValueError("from_unet starts from a network without target time; this one has it already.")
            config, weights = config_of(unet), dict(unet.state_dict())
        else:
            raise ValueError(
                f"from_unet starts from a DiTTransformer2DModel or CTMDiTTransformer2DModel, not from "
                f"{type(unet).__name__}."
            )
        network = placed_as(cls.from_config(config, target_time=target_time), unet)
        if target_time:
            for kind in ("weight", "bias"):
                name = f"transformer_blocks.0.norm1.emb.timestep_embedder.linear_1.{kind}"
                weights[f"target_time_embedding.linear_1.{kind}"] = weights[name]
        network.load_state_dict(network.state_dict() | weights)
        return network

    def _check_size(self, height: int, width: int) -> None:
        patch = self.config.patch_size
        if height % patch or width % patch:
            raise ValueError(f"Samples of {height}x{width} are no whole patches of patch_size={patch}.")

    def forward(
        self,
        sample: torch.Tensor,
        timestep: torch.Tensor | float,
        target_timestep: torch.Tensor | float | None = None,
        class_labels: torch.Tensor | None = None,
        return_dict: bool = True,
    ) -> Transformer2DModelOutput | tuple[torch.Tensor]:
        """F(c_in(t) x_t, c_noise(t), c_noise(s)).

        Args:
            sample: the scaled noisy sample, shape (B, C, H, W). H and W may differ from `sample_size`.
            timestep: c_noise(t), for a DiT as published a real number in [0, 999]; a float or a float tensor of shape
                (), (1,) or (B,).
            target_timestep: c_noise(s), likewise. None is s = t: the network is then a denoiser.
            class_labels: (B,) integers below `num_class_embeds`.
            return_dict: return a `Transformer2DModelOutput` rather than a tuple.

        Raises:
            ValueError: integer times; a target time that the network does not have; class labels missing or not
                expected; a sample of no whole patches.
        """
        timestep, target = both_times(self, sample, timestep, target_timestep)
        if class_labels is None and self.config.num_class_embeds is not None:
            raise ValueError("class_labels should be provided when doing class conditioning")
        if class_labels is not None and self.config.num_class_embeds is None:
            raise ValueError("class_labels were given, but this network has no class embedding")
        self._check_size(*sample.shape[2:])
        rows, columns = (side // self.config.patch_size for side in sample.shape[2:])

        time, target_embedding = self.time_proj(timestep).to(sample.dtype), None
        if self.has_target_time:
            target_embedding = self.target_time_embedding(self.time_proj(target).to(sample.dtype))

        tokens, conditioning = self.pos_embed(sample).to(sample.dtype), None
        for block in self.transformer_blocks:
            if torch.is_grad_enabled() and self.gradient_checkpointing:
                tokens, own = self._gradient_checkpointing_func(block, tokens, time, target_embedding, class_labels)
            else:
                tokens, own = block(tokens, time, target_embedding, class_labels)
            conditioning = own if conditioning is None else conditioning  # the output reads that of the first block

        shift, scale = self.proj_out_1(nn.functional.silu(conditioning))[:, None].chunk(2, dim=2)
        patches = self.proj_out_2(self.norm_out(tokens) * (1 + scale) + shift)
        # (B, rows * columns, p q C) to (B, C, rows p, columns q)
        patches = patches.unflatten(2, (self.config.patch_size, self.config.patch_size, self.config.out_channels))
        output = patches.unflatten(1, (rows, columns)).permute(0, 5, 1, 3, 2, 4).flatten(4).flatten(2, 3)
        return Transformer2DModelOutput(sample=output) if return_dict else (output,)


class CTMPatchEmbed(PatchEmbed):
    """Patches and their positions. These stay float32 when the network is cast, as they are when it is loaded."""

    def _apply(self, fn, recurse=True):
        positions = self.pos_embed
        super()._apply(fn, recurse)
        if not positions.is_meta:
            self.pos_embed = positions.to(self.pos_embed.device)
        return self


class CTMDiTBlock(nn.Module):
    """Self-attention, then feed-forward layers, each shifted, scaled and gated by the times and the class."""

    def __init__(
        self,
        width: int,
        heads: int,
        dropout: float,
        attention_bias: bool,
        activation_fn: str,
        num_class_embeds: int | None,
        upcast_attention: bool,
        norm_elementwise_affine: bool,
        norm_eps: float,
    ):
        super().__init__()
        self.norm1 = AdaLayerNormZero(width)
        self.norm1.emb = CTMDiTEmbedding(width, num_class_embeds)
        self.attn1 = Attention(
            width, heads=heads, dim_head=width // heads, bias=attention_bias, upcast_attention=upcast_attention
        )
        self.norm3 = nn.LayerNorm(width, norm_eps, norm_elementwise_affine)
        self.ff = FeedForward(width, activation_fn=activation_fn)
        self.dropout = nn.Dropout(dropout)

    def forward(
        self,
        tokens: torch.Tensor,
        time: torch.Tensor,
        target_embedding: torch.Tensor | None,
        class_labels: torch.Tensor | None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The tokens, (B, tokens, width), and the sum of the embeddings of times and class, (B, width)."""
        conditioning = self.norm1.emb(time, class_labels)
        if target_embedding is not None:
            conditioning = conditioning + target_embedding
        modulation = self.norm1.linear(nn.functional.silu(conditioning))[:, None]
        shift, scale, gate, shift_ff, scale_ff, gate_ff = modulation.chunk(6, dim=2)
        attended = self.attn1(self.norm1.norm(tokens) * (1 + scale) + shift)
        tokens = tokens + gate * self.dropout(attended)
        fed = self.ff(self.norm3(tokens) * (1 + scale_ff) + shift_ff)
        return tokens + gate_ff * self.dropout(fed), conditioning


class CTMDiTEmbedding(nn.Module):
    """The sum of the embeddings of time and class."""

    def __init__(self, width: int, num_class_embeds: int | None):
        super().__init__()
        self.timestep_embedder = TimestepEmbedding(TIME_FEATURES, width)
        # Without a probability, diffusers neither adds a label for "no class" nor drops labels.
        self.class_embedder = LabelEmbedding(num_class_embeds, width, dropout_prob=0.0) if num_class_embeds else None

    def forward(self, time: torch.Tensor, class_labels: torch.Tensor | None) -> torch.Tensor:
        """(B, width), of the sines and cosines `time`, (B, 256)."""
        embedding = self.timestep_embedder(time)
        return embedding if self.class_embedder is None else embedding + self.class_embedder(class_labels)


def _without_variance(transformer: DiTTransformer2DModel) -> tuple[dict, dict[str, torch.Tensor]]:
    """Config and weights of `CTMDiTTransformer2DModel` for diffusers' network, without the variances that it predicts.

    Raises ValueError if it gives neither as many channels as it takes nor twice as many.
    """
    source, weights = transformer.config, dict(transformer.state_dict())
    channels, given = source.in_channels, transformer.out_channels
    if given not in (channels, 2 * channels):
        raise ValueError(
            f"from_unet starts from a DiTTransformer2DModel of as many channels as it takes, {channels}, or twice as "
            f"many, with variances; this one gives {given}."
        )
    for name in ("proj_out_2.weight", "proj_out_2.bias"):  # rows are in the order row, column of a patch, channel
        weight = weights[name]
        weights[name] = weight.unflatten(0, (-1, given))[:, :channels].flatten(0, 1)
    expected = inspect.signature(CTMDiTTransformer2DModel.__init__).parameters
    config = {name: value for name, value in source.items() if name in expected}
    return {**config, "out_channels": channels, "num_class_embeds": source.num_embeds_ada_norm + 1}, weights
