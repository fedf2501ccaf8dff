# Copyright 2026 The diffusers-ctm authors. Licensed under the Apache License, Version 2.0.
"""Option groups of several programs: data, teacher, network."""

import math
from dataclasses import dataclass

from diffusers_ctm.preconditioning import PREDICTIONS

from .options import NOT_NEGATIVE, POSITIVE, Checked, option


@dataclass
class DataOptions(Checked):
    """The images."""

    dataset_name: str = option(
        "digits",
        "Images: 'digits' (8x8, from scikit-learn, no download), a data set on the Hub, a local folder (of images, of "
        "parquet files, saved by `save_to_disk`, or of NVIDIA's dataset_tool), a parquet file, or a .zip file of that "
        "tool.",
    )
    dataset_config_name: str | None = option(None, "Configuration of the data set, if it has several.")
    dataset_split: str = option("train", "Split of the data set, or a part: 'train[:1500]', 'train[-10%:]'.")
    image_column: str | None = option(
        None, "Column that holds the images, or the bytes of image files. Default: the only one."
    )
    label_column: str | None = option(
        None,
        "Column that holds the class of each image, a number or a name, for class-conditional training; 'label' also "
        "where folders or NVIDIA's dataset.json say the classes. Default: no classes.",
    )
    num_classes: int | None = option(
        None,
        "Number of classes, where --label_column holds plain numbers. Default: the largest plus one. Needed with "
        "--streaming, and to train a network for classes of which many have no image.",
        must_be=POSITIVE,
        needs="label_column",
    )
    resolution: int | None = option(
        None,
        "Height and width in pixels; images are scaled and center-cropped to it. Needed where images differ in "
        "size; otherwise their shorter side.",
        must_be=POSITIVE,
    )
    image_mode: str | None = option(
        None,
        "'L' (gray) or 'RGB'. Default: RGB if one of 256 images spread over the data set is in color; of a stream, one "
        "of the first 64.",
        [None, "L", "RGB"],
    )
    random_flip: bool = option(False, "Mirror images left to right with probability 1/2.")
    dataloader_num_workers: int = option(
        0, "Processes that decode images; 0 is the main one.", recorded=False, must_be=NOT_NEGATIVE
    )


@dataclass
class TeacherOptions(Checked):
    """The teacher.

    The options say which network of a folder or repository it is, and what it predicts if its files do not say so. A
    private repository needs `hf auth login` or HF_TOKEN: a token is not an option, so that none is recorded.
    """

    teacher: str | None = option(None, "The teacher: a folder or a repository on the Hub.", recorded=False)
    teacher_subfolder: str | None = option(
        None,
        "Folder of the teacher's network, or of its pipeline, if --teacher holds several. Default: the only one.",
        free=True,
        needs="teacher",
    )
    teacher_revision: str | None = option(
        None, "Branch, tag or commit of the teacher's repository. Default: main.", needs="teacher"
    )
    teacher_prediction_type: str | None = option(
        None,
        "What the teacher predicts: 'edm', 'epsilon', 'v_prediction', 'sample' (those three with the betas of its "
        "scheduler), 'flow_prediction', 'score' (variance exploding, images in [0, 1]) or 'consistency'. Default: "
        "what its scheduler says.",
        [None, *PREDICTIONS],
        needs="teacher",
    )
    teacher_timestep_scale: float | None = option(
        None,
        "An EDM teacher or consistency model is shown this times ln(sigma) / 4: 1 for NVIDIA's EDM, 1000 for "
        "OpenAI's. Default: what its scheduler says.",
        must_be=POSITIVE,
        needs="teacher",
    )
    teacher_guidance_scale: float = option(
        1.0,
        "Guide the teacher: its denoiser becomes D_ref + w (D - D_ref) with this w, where D_ref is that of "
        "--guidance_teacher, or its own without class (classifier-free guidance, for one trained with label dropout). "
        "1 is no guidance; each call then takes one network evaluation instead of two.",
        must_be=POSITIVE,
        needs="teacher",
    )
    guidance_teacher: str | None = option(
        None,
        "A worse model of the same images and classes that guides the teacher (autoguidance), such as a smaller one or "
        "one trained for less time: a folder or a repository on the Hub. Default: the teacher without class.",
        recorded=False,
    )
    guidance_teacher_subfolder: str | None = option(
        None, "As --teacher_subfolder, of --guidance_teacher.", free=True, needs="guidance_teacher"
    )
    guidance_teacher_revision: str | None = option(
        None, "As --teacher_revision, of --guidance_teacher.", needs="guidance_teacher"
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.teacher_is_guided:
            self.refuse(
                ["guidance_teacher"], "has no use at --teacher_guidance_scale 1", "give another scale, or leave it out"
            )

    @property
    def teacher_is_guided(self) -> bool:
        return self.teacher_guidance_scale != 1


@dataclass
class NetworkOptions(Checked):
    """The network of a run that starts from nothing."""

    architecture: str = option(
        "unet_2d",
        "'unet_2d': diffusers' UNet2DModel, an ADM; 'ddpmpp': EDM's DDPM++ for CIFAR-10 (EDMUNet2DModel), whose first "
        "convolution has half the first of --block_out_channels; 'edm2': EDM2's magnitude-preserving network "
        "(EDM2UNet2DModel); 'dit': a diffusion transformer (CTMDiTTransformer2DModel).",
        ["unet_2d", "ddpmpp", "edm2", "dit"],
    )
    block_out_channels: list[int] = option(
        [64, 128], "Channels of each resolution, the highest first; of 'dit' one number, its width."
    )
    layers_per_block: int = option(2, "Residual blocks per resolution; of 'dit' all its blocks.", must_be=POSITIVE)
    patch_size: int = option(2, "Height and width of the patches of 'dit', in pixels.", must_be=POSITIVE)
    attention_levels: list[int] = option([1], "Resolutions that have self-attention, by index into block_out_channels.")
    mid_attention: bool = option(True, "Self-attention in the middle block.")
    attention_head_dim: int = option(32, "Channels per attention head.", must_be=POSITIVE)
    norm_num_groups: int = option(8, "Groups of the group normalization.", must_be=POSITIVE)
    resnet_time_scale_shift: str = option(
        "scale_shift",
        "How the noise level enters a block: added ('default') or as scale and shift.",
        ["default", "scale_shift"],
    )
    sigma_data: float = option(0.5, "Standard deviation of the data in [-1, 1].", must_be=POSITIVE)
    timestep_scale: float = option(
        1.0, "The network is shown timestep_scale * ln(sigma) / 4; 1 is NVIDIA's EDM, 1000 OpenAI's.", must_be=POSITIVE
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        groups, channels = self.norm_num_groups, self.block_out_channels
        if self.architecture != "unet_2d":
            self.refuse(
                ["mid_attention", "norm_num_groups", "resnet_time_scale_shift"],
                f"is not for --architecture {self.architecture}, which has its own",
            )
        if self.architecture == "dit":
            self.refuse(["attention_levels"], "is not for --architecture dit, which has one level")
            unit = math.lcm(self.attention_head_dim, 4)
            self.check(
                len(channels) == 1 and channels[0] > 0 and channels[0] % unit == 0,
                "block_out_channels",
                f"one multiple of {unit} (of attention_head_dim, and of 4) with --architecture dit",
            )
            return
        self.refuse(["patch_size"], "is for --architecture dit")
        self.check(all(width > 0 for width in channels), "block_out_channels", "positive")
        if self.architecture != "edm2":  # which has no groups
            self.check(
                all(width % groups == 0 for width in channels), "block_out_channels", "multiples of norm_num_groups"
            )
        if self.architecture == "ddpmpp":
            self.check(all(width % 2 == 0 for width in channels), "block_out_channels", "even numbers")
        levels = range(len(channels))
        self.check(all(i in levels for i in self.attention_levels), "attention_levels", f"in 0..{len(levels) - 1}")
        attended = {*self.attention_levels, *(levels[-1:] if self.mid_attention else [])}
        narrowest = min((channels[level] for level in attended), default=self.attention_head_dim)
        self.check(
            self.attention_head_dim <= narrowest,
            "attention_head_dim",
            f"at most {narrowest}, the fewest --block_out_channels that have attention (--attention_levels, "
            "--mid_attention)",
        )
        if self.architecture == "edm2":
            heads = self.attention_head_dim
            self.check(
                all(channels[level] % heads == 0 for level in attended),
                "attention_head_dim",
                "a divisor of the --block_out_channels that have attention (--attention_levels, and the last)",
            )
