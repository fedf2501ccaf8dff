# Copyright 2026 The diffusers-ctm authors. Licensed under the Apache License, Version 2.0.
"""Options of the training programs, in groups; a function takes the group that it needs.

A new option is one field, `option(default, sentence)`, of the group that its reader takes. The command line, YAML
files, `--help`, `training.json` and the comparison of a resumed run with its checkpoint follow from it.
"""

from dataclasses import dataclass

from .names import HUB_ID
from .options import BELOW_ONE, FOLDER, NOT_NEGATIVE, POSITIVE, SEED, TWO_OR_MORE, Checked, option
from .shared_options import DataOptions, NetworkOptions


@dataclass
class StreamOptions(DataOptions):
    """Images as a stream."""

    streaming: bool = option(
        False,
        "Read the data set as it comes, without downloading or holding it. Each process reads all of it; "
        "--dataloader_num_workers are threads. The order is shuffled within --shuffle_buffer images only: what is "
        "stored class by class needs to be stored in another order.",
    )
    shuffle_buffer: int = option(
        10_000,
        "Images that are shuffled together, and held in memory, with --streaming.",
        must_be=POSITIVE,
        needs="streaming",
    )


@dataclass
class LatentOptions(Checked):
    """Training on the latents of an autoencoder."""

    vae: str | None = option(
        None,
        "Train on the latents of this image autoencoder of diffusers: a folder or a repository on the Hub, of the "
        "autoencoder or of a pipeline with it. Default: the teacher's, if it has one, else pixels.",
    )
    vae_revision: str | None = option(
        None, "Branch, tag or commit of the autoencoder's repository. Default: main.", needs="vae"
    )
    vae_unit_range: bool = option(
        False,
        "Show the autoencoder images in [0, 1], as EDM2 and its dataset_tool do. Default: as its pipeline says, else "
        "in [-1, 1].",
        needs="vae",
    )
    latents: str | None = option(
        None,
        "Folder of the data set's latents: what is missing there is encoded first. Several runs may share it. Or the "
        ".zip file or folder of them that EDM2's dataset_tool encoded. Default: OUTPUT_DIR-latents, beside the "
        "output_dir.",
        recorded=False,
    )


@dataclass
class OutputOptions(Checked):
    """The run's folder, and what it starts from."""

    config: str | None = option(
        None, "YAML file with any of these options; the command line overrides it.", recorded=False
    )
    output_dir: str = option(
        "runs/run",
        "Folder of the run: checkpoints, samples, logs, and the finished `pipeline`.",
        recorded=False,
        must_be=FOLDER,
    )
    resume_from_checkpoint: str | None = option(
        None,
        "A checkpoint folder, or 'latest': the newest in output_dir, or a fresh start if there is none, or user/name: "
        "the newest that a run with --hub_strategy checkpoint uploaded there.",
        recorded=False,
    )
    init_from: str | None = option(
        None,
        "Start from the weights of a first stage, averages included: a checkpoint folder, a pipeline's folder or Hub "
        "repository, or a run with either. Optimizer and steps start anew. Ignored if there is something to resume.",
        recorded=False,
    )
    checkpointing_steps: int = option(
        500,
        "Save a checkpoint every so many steps, and at the end; 0 is never, but when a signal stops the run.",
        recorded=False,
        must_be=NOT_NEGATIVE,
    )
    checkpoints_total_limit: int = option(
        2, "Keep at most this many checkpoints, the newest; 0 keeps all.", recorded=False, must_be=NOT_NEGATIVE
    )


@dataclass
class StepOptions(Checked):
    """Steps and images."""

    seed: int = option(0, "Seed of weights, data order and noise.", must_be=SEED)
    max_train_steps: int = option(1000, "Optimizer steps in all.", free=True, must_be=POSITIVE)
    train_batch_size: int = option(
        128,
        "Images per process and forward pass. A step uses this times processes times gradient_accumulation_steps.",
        free=True,
        must_be=POSITIVE,
    )
    gradient_accumulation_steps: int = option(
        1, "Forward and backward passes per optimizer step.", free=True, must_be=POSITIVE
    )


@dataclass
class OptimizerOptions(Checked):
    """The optimizer."""

    optimizer: str = option("radam", "'radam' (CTM), 'adam' (EDM) or 'adamw'.", ["radam", "adam", "adamw"])
    learning_rate: float = option(4e-4, "Peak learning rate.", must_be=POSITIVE)
    adam_beta2: float = option(0.999, "Decay of the optimizer's second moment.", must_be=BELOW_ONE)
    adam_weight_decay: float = option(0.0, "Weight decay.", must_be=NOT_NEGATIVE)
    adam_epsilon: float = option(1e-8, "The optimizer's epsilon.", must_be=POSITIVE)
    lr_scheduler: str = option(
        "constant_with_warmup",
        "Learning rate after the warm-up: constant, or falling to 0 at max_train_steps along a line or half a cosine; "
        "'inverse_sqrt' is constant up to --lr_decay_after, then falls as 1/sqrt(step) (EDM2).",
        ["constant_with_warmup", "linear", "cosine", "inverse_sqrt"],
    )
    lr_decay_after: int | None = option(
        None, "The last step of the peak learning rate, with --lr_scheduler inverse_sqrt.", must_be=POSITIVE
    )
    lr_warmup_steps: int = option(0, "Steps over which the learning rate rises from 0.", must_be=NOT_NEGATIVE)
    max_grad_norm: float = option(
        1.0,
        "Clip the norm of each network's gradient to this; 0 is no clipping. RAdam's first five steps are as long as "
        "the gradient is.",
        must_be=NOT_NEGATIVE,
    )
    max_skipped_steps: int = option(
        20,
        "A step whose loss or gradient is infinite or NaN changes nothing. Stop after so many in a row; in fp16 a few "
        "at the start are usual.",
        free=True,
        must_be=POSITIVE,
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.lr_scheduler == "inverse_sqrt":
            self.check(self.lr_decay_after is not None, "lr_decay_after", "given with --lr_scheduler inverse_sqrt")
        else:
            self.refuse(["lr_decay_after"], "is for --lr_scheduler inverse_sqrt")


@dataclass
class AverageOptions(Checked):
    """Moving averages of the weights."""

    ema_decay: float = option(
        0.999,
        "Decay per step of the exponential moving average of the weights, which is what is saved.",
        must_be=BELOW_ONE,
    )
    ema_warmup: bool = option(False, "Let the decay rise as (1 + step) / (10 + step) up to ema_decay. For short runs.")
    extra_ema_decays: list[float] = option(
        [],
        "Decays of further averages, each saved as output_dir/pipeline-ema-DECAY beside `pipeline`, for comparison.",
        must_be=BELOW_ONE,
    )
    posthoc_ema: list[float] = option(
        [],
        "Relative widths (sigma_rel) of power-function averages whose snapshots are kept, from which `python -m "
        "training.ema` makes the average of any width after the training (Karras et al. 2024); '0.05 0.1' is enough. "
        "Each costs as much memory as the network.",
        must_be=("in (0, 0.288]", lambda width: 0 < width < 12**-0.5),
    )
    posthoc_ema_every: int = option(
        500,
        "Keep a snapshot of each every so many steps, and at the end; for --posthoc_ema.",
        recorded=False,
        must_be=POSITIVE,
        needs="posthoc_ema",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check(len(set(self.posthoc_ema)) != 1, "posthoc_ema", "two different widths or more")


@dataclass
class HardwareOptions(Checked):
    """Precision, memory and speed."""

    mixed_precision: str = option(
        "auto",
        "'no', 'fp16', 'bf16', or 'auto': bf16 on a GPU that has it, else no.",
        ["auto", "no", "fp16", "bf16"],
        free=True,
    )
    gradient_checkpointing: bool = option(
        False, "Recompute activations in the backward pass to save memory.", free=True
    )
    compile: bool = option(
        False,
        "Compile the networks with torch.compile: faster steps after some minutes at the start; needs a C++ compiler.",
        free=True,
    )


@dataclass
class MonitorOptions(Checked):
    """Samples, losses and distances during the run."""

    sample_every: int = option(
        500, "Draw a grid of samples every so many steps; 0 is never.", recorded=False, must_be=NOT_NEGATIVE
    )
    eval_every: int = option(
        0,
        "Measure the Frechet distance of samples to the data every so many steps, and at the end, into the tracker "
        "and output_dir/metrics.jsonl; 0 is never.",
        recorded=False,
        must_be=NOT_NEGATIVE,
    )
    eval_samples: int = option(
        2000, "Images of each such measurement; compare only equal numbers.", recorded=False, must_be=TWO_OR_MORE
    )
    eval_features: str | None = option(
        None,
        "Network whose features are compared, as --features of training.evaluate. Default: 'digits' for digits.",
        recorded=False,
    )
    logging_steps: int = option(
        20, "Show and track the losses every so many steps; each is a mean over them.", recorded=False, must_be=POSITIVE
    )
    report_to: str = option(
        "tensorboard", "Tracker: 'tensorboard', 'wandb' or 'none'.", ["tensorboard", "wandb", "none"], recorded=False
    )


@dataclass
class HubOptions(Checked):
    """Uploads to the Hub."""

    push_to_hub: bool = option(
        False,
        "Upload the pipeline to the Hub as --hub_model_id. Log in before with `hf auth login` or HF_TOKEN.",
        recorded=False,
        needs="hub_model_id",
    )
    hub_model_id: str | None = option(
        None,
        "The repository on the Hub, user/name. It is created if it is not there.",
        recorded=False,
        must_be=("a repository on the Hub as user/name", HUB_ID.fullmatch),
    )
    hub_private: bool = option(False, "Create a private repository.", recorded=False)
    hub_strategy: str = option(
        "every_save",
        "What is uploaded when: 'end', the finished pipeline; 'every_save', also the averaged pipeline at each "
        "checkpoint, in the background; 'checkpoint', also the newest checkpoint, for --resume_from_checkpoint "
        "user/name.",
        ["every_save", "end", "checkpoint"],
        recorded=False,
    )
    hub_license: str | None = option(
        None, "License of the weights, as the Hub names it, e.g. 'mit'. Default: the teacher's.", recorded=False
    )


@dataclass
class RunOptions(
    HubOptions,
    MonitorOptions,
    HardwareOptions,
    AverageOptions,
    OptimizerOptions,
    StepOptions,
    OutputOptions,
    LatentOptions,
    StreamOptions,
):
    """Every training run has these options."""

    def __post_init__(self) -> None:
        """Check, and fill in the features that measure the digits."""
        super().__post_init__()
        self.check(not (self.vae and self.streaming), "vae", "left out with --streaming: latents are encoded once")
        self.check(
            not (self.eval_every and self.streaming),
            "eval_every",
            "0 with --streaming: the real images are not at hand",
        )
        if self.eval_features is None and self.dataset_name == "digits":
            self.eval_features = "digits"
        self.check(
            self.eval_features is not None or not self.eval_every,
            "eval_features",
            "given with --eval_every: a folder that training.features saved, FID's Inception, or an image model of "
            "transformers",
        )


@dataclass
class GridOptions(Checked):
    """The grid of noise levels of a CTM."""

    num_train_timesteps: int = option(
        18, "Noise levels N of the Karras grid: 18 for CIFAR-10, 40 for ImageNet-64.", must_be=TWO_OR_MORE
    )
    sigma_min: float | None = option(None, "Lowest noise level of the grid. Default: the teacher's.", must_be=POSITIVE)
    sigma_max: float | None = option(
        None,
        "Highest noise level of the grid, where sampling starts. Default: the teacher's. If that is in the thousands, "
        "as of cosine betas and scores, 80 to 200 is enough for images in [-1, 1] and leaves more of the grid to the "
        "rest.",
        must_be=POSITIVE,
    )


@dataclass
class StudentOptions(NetworkOptions, GridOptions):
    """Dropout of the student."""

    dropout: float | None = option(None, "Dropout of the student. Default: the teacher's, or none.", must_be=BELOW_ONE)
    label_dropout: float | None = option(
        None,
        "Probability of leaving the class of an image out, without a teacher or for one that was trained so. Default: "
        "0.1 for such a teacher, else 0.",
        must_be=BELOW_ONE,
        needs="label_column",
    )
