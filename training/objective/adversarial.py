# Copyright 2026 The diffusers-ctm authors. Licensed under the Apache License, Version 2.0.
"""The adversarial stage: projected discriminators and their hinge losses."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrizations, parametrize

from ..cli.errors import UserError
from ..cli.files import tensors_digest
from ..cli.options import NOT_NEGATIVE, POSITIVE, TWO_OR_MORE, Checked, option
from ..frozen.backbone import Backbone
from ..frozen.maps import load_backbone
from .diffaugment import DiffAugmentParameters, diff_augment, draw_diff_augment
from .losses import adaptive_weight


# The authors' numbers.
POWER_ITERATIONS = 3  # of spectral norm between two updates: one for fakes, one for data, one for the generator
BETAS = (0.5, 0.9)  # of the discriminator's optimizer
GENERATOR_WEIGHTS = (0.01, 10.0)  # the smallest and the largest


@dataclass
class DiscriminatorOptions(Checked):
    """The adversarial stage: a discriminator on frozen features takes turns with the student."""

    discriminator_weight: float = option(
        0.0,
        "Weight of the adversarial loss, which is also scaled to pull at the last layer as the trajectory loss does; "
        "0 is no adversarial stage, 1 the authors'.",
        must_be=NOT_NEGATIVE,
    )
    discriminator_start: int = option(0, "Step at which the adversarial stage begins.", must_be=NOT_NEGATIVE)
    discriminator_period: int = option(
        2,
        "In the adversarial stage the last of every so many steps trains the discriminator, the others the student.",
        must_be=TWO_OR_MORE,
    )
    discriminator_backbones: list[str] = option(
        ["efficientnet_lite0"],
        "Frozen networks whose features the discriminator sees, each 'efficientnet_lite0', 'digits', a folder of "
        "training.features, or an image model of transformers by its folder or Hub id. The authors' are "
        "efficientnet_lite0 and facebook/deit-base-distilled-patch16-224.",
    )
    discriminator_resolution: int | None = option(
        None,
        "Height and width at which these networks are shown images. Default: each network's own.",
        must_be=POSITIVE,
    )
    discriminator_channels: int = option(
        64,
        "Channels of the finest feature map that the discriminator sees; its widest layer has 8 times as many.",
        must_be=POSITIVE,
    )
    discriminator_augment: bool = option(
        True, "Show the discriminator images after DiffAugment: other colors, shifted, with a box cut out."
    )
    discriminator_learning_rate: float = option(
        2e-3, "The discriminator's learning rate, with RAdam.", must_be=POSITIVE
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        names = self.discriminator_backbones
        self.check(0 < len(set(names)) == len(names), "discriminator_backbones", "one or more different names")


# Networks -------------------------------------------------------------------------------------------------------------


class RandomProjection(nn.Module):
    """Fixed random mixing of feature maps (Sauer et al. 2021, Section 3.2), so that no channel and no scale stands
    alone.

    Across channels a 1x1 convolution takes map i to 2^i * `channels`. Across scales, from the coarsest map to the
    finest, the sum of a map and what comes from below passes a 3x3 convolution that halves the channels (but for the
    finest) and is enlarged bilinearly to the size of the next map; the finest is doubled. Nothing here learns.

    If all maps have one size, as those of a plain vision transformer, the first step also makes a pyramid of them, as
    the authors'
    does: of four maps, each pixel of the first becomes 4x4 and of the second 2x2 by a transposed convolution, and the
    last is halved.

    The 3x3 is the paper's; the code published with it has 1x1 there. It is applied before enlarging, at a quarter of
    the cost.

    Args:
        in_channels: of the maps, the finest first.
        sizes: (height, width) of the maps.
        channels: of the finest map after mixing; the others have `channels` * 1, 2, 4...

    Attributes:
        channels: of the mixed maps.
    """

    def __init__(self, in_channels: Sequence[int], sizes: Sequence[tuple[int, int]], channels: int = 64):
        super().__init__()
        count = len(in_channels)
        wide = [channels * 2**index for index in range(count)]
        self.channels = [channels, *wide[:-1]]
        scales = [1] * count
        if count > 1 and len(set(map(tuple, sizes))) == 1:
            scales = [2 ** (count - 2 - index) for index in range(count)]  # the last is 1/2
        self.across_channels = nn.ModuleList(map(_mix_channels, in_channels, wide, scales))
        self.across_scales = nn.ModuleList(nn.Conv2d(n, m, 3, padding=1) for n, m in zip(wide, self.channels))
        self.requires_grad_(False)

    def forward(self, features: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """Maps (B, C_i, H_i, W_i), the finest first, to maps (B, channels[i], ...), each as large as the one before."""
        pyramid = [mix(x) for mix, x in zip(self.across_channels, features)]
        mixed: list[torch.Tensor] = []
        for index in reversed(range(len(pyramid))):
            x = pyramid[index] + mixed[-1] if mixed else pyramid[index]
            height, width = pyramid[index - 1].shape[2:] if index else (2 * x.shape[2], 2 * x.shape[3])
            x = self.across_scales[index](x)
            mixed.append(F.interpolate(x, (height, width), mode="bilinear", align_corners=True))
        return mixed[::-1]


def _mix_channels(in_channels: int, channels: int, scale: float) -> nn.Module:
    """The convolution that enlarges a map `scale` times."""
    if scale > 1:
        return nn.ConvTranspose2d(in_channels, channels, scale, stride=scale)
    if scale < 1:
        return nn.Conv2d(in_channels, channels, 3, stride=2, padding=1)
    return nn.Conv2d(in_channels, channels, 1)


def discriminator_head(in_channels: int, size: int, channels: int = 64) -> nn.Sequential:
    """Convolutions that halve a map of `size` x `size` down to 8 or less (at least once), then a 4x4 convolution to
    logits.

    The last but one has 8 * `channels` channels, those before it half as many each, but not below `channels`.
    """
    halvings = 0
    while halvings == 0 or size > 8:
        size, halvings = size // 2, halvings + 1
    widths = [max(channels, 8 * channels // 2**left) for left in reversed(range(halvings))]
    blocks = [
        nn.Sequential(
            parametrizations.spectral_norm(
                nn.Conv2d(n, m, 4, stride=2, padding=1), n_power_iterations=POWER_ITERATIONS
            ),
            nn.BatchNorm2d(m),
            nn.LeakyReLU(0.2, inplace=True),
        )
        for n, m in zip([in_channels, *widths], widths)
    ]
    logits = nn.Conv2d(widths[-1], 1, min(4, size), bias=False)
    return nn.Sequential(*blocks, parametrizations.spectral_norm(logits, n_power_iterations=POWER_ITERATIONS))


def spectral_norms(network: nn.Module) -> list[parametrize.ParametrizationList]:
    return [module for module in network.modules() if isinstance(module, parametrize.ParametrizationList)]


@torch.no_grad()
def update_spectral_norm(network: nn.Module) -> None:
    """Follow the weights of a network of heads after they changed, by three power iterations each."""
    for norm in spectral_norms(network):
        norm.train()
        norm()
        norm.eval()


class MultiScaleDiscriminator(nn.Module):
    """One head per feature map (Sauer et al. 2021), with spectral norm, batch norm and LeakyReLU.

    Batch statistics are those of one forward pass on one process, as the authors' are: a global batch that is split
    otherwise trains slightly otherwise. The running averages are kept but not used in training.

    The estimate of the largest singular values moves by `update_spectral_norm` only, not by forward passes. So between
    two updates of its weights this is one function, however many passes accumulation, two batches or the generator's
    step take.

    Args:
        in_channels, sizes: channels and height of the maps.
        channels: of the narrowest convolution; the widest has 8 times as many.
    """

    def __init__(self, in_channels: Sequence[int], sizes: Sequence[int], channels: int = 64):
        super().__init__()
        self.heads = nn.ModuleList(discriminator_head(n, size, channels) for n, size in zip(in_channels, sizes))
        self.train()

    def train(self, mode: bool = True) -> "MultiScaleDiscriminator":
        super().train(mode)
        for norm in spectral_norms(self):
            norm.eval()  # in this mode it does not iterate
        return self

    def forward(self, features: Sequence[torch.Tensor]) -> torch.Tensor:
        """Logits of all heads side by side, shape (B, L)."""
        return torch.cat([head(x).flatten(1) for head, x in zip(self.heads, features)], dim=1)


def fingerprint(backbone: Backbone) -> torch.Tensor:
    """SHA-256 of a feature network's tensors and of the size that it is shown, uint8 of shape (32,)."""
    digest = tensors_digest([*backbone.named_parameters(), *backbone.named_buffers()], str(backbone.resolution))
    return torch.tensor(list(digest), dtype=torch.uint8)


class ProjectedDiscriminator(nn.Module):
    """Projected GAN's discriminators (Sauer et al. 2021), one on the features of each frozen network.

    The feature networks follow `to(...)`, but stay in evaluation mode and are neither among the parameters nor in the
    state dict. The state dict has their fingerprints instead, which must be the same when it is loaded again. It also
    has the random projections, which never change, and the heads, which learn.

    Args:
        backbones: feature networks by name, in the order of the logits, on the CPU.
        seed: of projections and heads. The global random state is not touched.
        image_channels: 1 or 3.
        channels: of the finest projected map; scales the whole. 64 is the authors'.
        augment: whether `draw_augment` draws anything.
    """

    def __init__(
        self,
        backbones: Mapping[str, Backbone],
        seed: int,
        image_channels: int = 3,
        channels: int = 64,
        augment: bool = True,
    ):
        super().__init__()
        self.augment = augment
        self.backbones = {name: backbone.eval().requires_grad_(False) for name, backbone in backbones.items()}
        self.projections, self.discriminators = nn.ModuleList(), nn.ModuleList()
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            torch.default_generator.manual_seed(seed)
            for backbone in self.backbones.values():
                features = backbone(torch.zeros(1, image_channels, *[backbone.resolution] * 2))
                projection = RandomProjection([x.shape[1] for x in features], [x.shape[2:] for x in features], channels)
                sizes = [min(x.shape[2:]) for x in projection(features)]
                self.projections.append(projection)
                self.discriminators.append(MultiScaleDiscriminator(projection.channels, sizes, channels))
        self.register_buffer("fingerprints", torch.stack([fingerprint(x) for x in self.backbones.values()]))

    def _apply(self, function: Callable, recurse: bool = True) -> "ProjectedDiscriminator":
        for backbone in self.backbones.values():
            backbone._apply(function, recurse)
        return super()._apply(function, recurse)

    def _load_from_state_dict(self, state_dict: dict, prefix: str, *others) -> None:
        saved = state_dict.get(prefix + "fingerprints")
        if saved is not None and saved.shape == self.fingerprints.shape:
            for name, before, now in zip(self.backbones, saved.tolist(), self.fingerprints.tolist()):
                if before != now:
                    raise UserError(
                        f"The feature network {name} is not the one that the saved discriminator was trained on: its "
                        "weights or the size that it is shown differ. Give the same --discriminator_backbones and "
                        "--discriminator_resolution, and the same versions of the packages or files that they come "
                        "from."
                    )
        super()._load_from_state_dict(state_dict, prefix, *others)

    def draw_augment(
        self, uniform: Callable[[], torch.Tensor], height: int, width: int, parts: int = 1
    ) -> list[DiffAugmentParameters] | None:
        """Parameters of `draw_diff_augment` for each backbone, or None without augmentation."""
        return [draw_diff_augment(uniform, height, width, parts) for _ in self.backbones] if self.augment else None

    def forward(
        self, images: torch.Tensor, augment: Sequence[DiffAugmentParameters] | None = None, parts: int = 1
    ) -> list[torch.Tensor]:
        """Logits of each backbone, float32 of shape (B, L), positive for data.

        Images are augmented at their own size, then the backbone scales them. All of it is in float32 whatever autocast
        says, as the authors' is: in bfloat16 the generator's gradient through EfficientNet-Lite0 was at an angle of 74
        degrees to this one.

        Args:
            images: in [-1, 1], shape (B, C, H, W).
            augment: for each backbone, as `draw_augment` gives it.
            parts: the batch is so many batches of equal size one after the other, each with its own batch statistics.
        """
        logits = []
        with torch.autocast(images.device.type, enabled=False):
            images = images.float()
            for index, backbone in enumerate(self.backbones.values()):
                shown = images if augment is None else diff_augment(images, augment[index])
                features = self.projections[index](backbone(shown))
                batches = zip(*(x.chunk(parts) for x in features))
                logits.append(torch.cat([self.discriminators[index](batch) for batch in batches]))
        return logits

    @contextmanager
    def frozen(self) -> Iterator[None]:
        """Freeze this module for the generator's step; batch norm still uses the batch.

        Within, calls of this module (not of a wrapper of it) change nothing here and need no memory for gradients of
        its parameters.
        """
        norms = [module for module in self.modules() if isinstance(module, nn.BatchNorm2d)]

        def learn(mode: bool) -> None:
            self.discriminators.requires_grad_(mode)
            for norm in norms:
                norm.track_running_stats = mode

        learn(False)
        try:
            yield
        finally:
            learn(True)


def make_discriminator(options: DiscriminatorOptions, image_channels: int, seed: int) -> ProjectedDiscriminator:
    """The discriminator that the options describe, on the CPU, for images with 1 or 3 channels.

    Raises UserError for a backbone that cannot be loaded.
    """
    if image_channels not in (1, 3):
        raise UserError(
            f"--discriminator_weight must be 0 for images with {image_channels} channels; its networks see 1 or 3."
        )
    backbones = {
        name: load_backbone(name, options.discriminator_resolution) for name in options.discriminator_backbones
    }
    return ProjectedDiscriminator(
        backbones, seed, image_channels, options.discriminator_channels, options.discriminator_augment
    )


def check_single_images(discriminator: ProjectedDiscriminator, image_channels: int, size: int) -> None:
    """Raise UserError if passes of one image cannot train it: batch norm needs several numbers of a channel."""
    try:
        with torch.no_grad(), discriminator.frozen():
            discriminator(torch.zeros(1, image_channels, size, size))
    except ValueError as error:
        raise UserError(
            "--train_batch_size must be 2 or more with these discriminators, whose coarsest maps have one pixel "
            f"({error}), or --discriminator_resolution larger."
        ) from error


def discriminator_optimizer(
    options: DiscriminatorOptions, discriminator: ProjectedDiscriminator
) -> torch.optim.Optimizer:
    """RAdam over the heads, as the authors'. Each of its steps also updates the spectral norm."""
    optimizer = torch.optim.RAdam(
        discriminator.discriminators.parameters(), lr=options.discriminator_learning_rate, betas=BETAS
    )
    optimizer.register_step_post_hook(lambda *_: update_spectral_norm(discriminator))
    return optimizer


def is_discriminator_step(options: DiscriminatorOptions, step: int) -> bool:
    """Whether step `step` (from 0) trains the discriminator: the last of every `discriminator_period` steps."""
    since, period = step - options.discriminator_start, options.discriminator_period
    return options.discriminator_weight > 0 and since >= 0 and since % period == period - 1


# Losses ---------------------------------------------------------------------------------------------------------------


def generator_hinge_loss(logits: Sequence[torch.Tensor]) -> torch.Tensor:
    """Mean of -D(fake), of each backbone's logits (B, L) and then over backbones."""
    return torch.stack([-fake.mean() for fake in logits]).mean()


def discriminator_hinge_loss(real_logits: Sequence[torch.Tensor], fake_logits: Sequence[torch.Tensor]) -> torch.Tensor:
    """Mean of max(0, 1 - D(real)) + max(0, 1 + D(fake)), of each backbone's logits (B, L) and then over backbones.

    It is 2 if D is 0 everywhere, and 0 if D tells both apart by a margin of 1 on either side.
    """
    return torch.stack(
        [F.relu(1 - real).mean() + F.relu(1 + fake).mean() for real, fake in zip(real_logits, fake_logits)]
    ).mean()


def generator_loss(
    discriminator: ProjectedDiscriminator, fake: torch.Tensor, augment: Sequence[DiffAugmentParameters] | None = None
) -> torch.Tensor:
    """The generator's hinge loss, differentiable in `fake` and in nothing else. The discriminator stays as it is.

    Args:
        discriminator: itself, not wrapped for several processes: there is nothing to synchronize.
        fake: in [-1, 1], shape (B, C, H, W).
        augment: `draw_augment(...)`.
    """
    with discriminator.frozen():
        return generator_hinge_loss(discriminator(fake, augment))


def discriminator_loss(
    discriminator: nn.Module,
    real: torch.Tensor,
    fake: torch.Tensor,
    augment: Sequence[DiffAugmentParameters] | None = None,
) -> torch.Tensor:
    """The discriminator's hinge loss. No gradient reaches what made `fake`.

    Args:
        discriminator: a ProjectedDiscriminator, maybe wrapped for several processes.
        real, fake: in [-1, 1], shape (B, C, H, W).
        augment: `draw_augment(..., parts=2)`, the fakes first.
    """
    logits = discriminator(torch.cat([fake.detach(), real]), augment, parts=2)
    fake_logits, real_logits = zip(*(both.chunk(2) for both in logits))
    return discriminator_hinge_loss(real_logits, fake_logits)


def generator_weight(trajectory_gradient: torch.Tensor, generator_gradient: torch.Tensor) -> torch.Tensor:
    """Weight of the generator's loss: `adaptive_weight`, between the authors' limits."""
    return adaptive_weight(trajectory_gradient, generator_gradient).clamp(*GENERATOR_WEIGHTS)
