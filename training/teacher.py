"""Teachers: networks on the Hub or on disk as denoisers D(x, sigma)."""

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import diffusers
import torch
from diffusers import UNet2DModel
from diffusers.utils import logging
from huggingface_hub import snapshot_download

from diffusers_ctm import CTMPipeline, CTMScheduler, CTMUNet2DModel, EDMHeunScheduler, EDMUNet2DModel
from diffusers_ctm.scheduling_utils_ctm import own_config
from diffusers_ctm.trajectory import DISCRETE_TYPES, Preconditioning, jump

from .config import TeacherOptions, UserError
from .hub import error_text


logger = logging.get_logger(__name__)

NETWORKS = ("UNet2DModel", "CTMUNet2DModel", "EDMUNet2DModel")  # attributes of diffusers, ours too

# Files of a network's weights, the best kind first. `.bin` is a pickle, which diffusers opens with torch's `weights_only`.
WEIGHTS = (
    [
        "diffusion_pytorch_model.safetensors",
        "diffusion_pytorch_model.safetensors.index.json",
        "diffusion_pytorch_model-*.safetensors",
    ],
    ["diffusion_pytorch_model.*.safetensors"],
    ["diffusion_pytorch_model.bin"],
)

# What a network without a scheduler's file was trained with, if only its prediction type is said.
DEFAULT_SCHEDULERS = {
    **dict.fromkeys(DISCRETE_TYPES, "DDPMScheduler"),
    "flow_prediction": "FlowMatchEulerDiscreteScheduler",
    "score": "ScoreSdeVeScheduler",
    "consistency": "CMStochasticIterativeScheduler",
}


@dataclass
class Teacher:
    """A frozen denoiser, or a frozen consistency model, which knows the ends of trajectories only.

    Args:
        network: F, in evaluation mode, without gradient.
        scheduler: an `EDMHeunScheduler` with its levels and preconditioning, which samples it if it is a denoiser.
        id2label: names of its classes, if it carries them.
        name: the folder or repository that it came from.
        revision: the commit of that repository; None for a folder.
        null_class: its label that means "no class", if it was trained with label dropout.
    """

    network: UNet2DModel | EDMUNet2DModel
    scheduler: EDMHeunScheduler
    id2label: dict[int, str] | None = None
    name: str | None = None
    revision: str | None = None
    null_class: int | None = None

    @property
    def preconditioning(self) -> Preconditioning:
        return self.scheduler.preconditioning

    @property
    def is_consistency_model(self) -> bool:
        return self.preconditioning.prediction_type == "consistency"

    def denoise(self, x: torch.Tensor, sigma: torch.Tensor, class_labels: torch.Tensor | None = None) -> torch.Tensor:
        """D(x, sigma), x of shape (B, C, H, W), sigma of shape (B,). No gradient. Raises ValueError for a consistency model."""
        if self.is_consistency_model:
            raise ValueError("A consistency model is no denoiser: it knows the jump to sigma_min and nothing else.")
        condition = {} if class_labels is None else {"class_labels": class_labels}
        with torch.no_grad():
            return self.preconditioning.denoise(self.network, x, sigma, **condition)

    def jump_to_end(self, x_t: torch.Tensor, t: torch.Tensor, class_labels: torch.Tensor | None = None) -> torch.Tensor:
        """f(x_t, t), the state at sigma_min, of a consistency model (Song et al. 2023, Eq. 5). No gradient."""
        if not self.is_consistency_model:
            raise ValueError("Only a consistency model knows the jump to sigma_min.")
        condition = {} if class_labels is None else {"class_labels": class_labels}
        end = torch.full_like(t, self.scheduler.config.sigma_min)
        with torch.no_grad():
            g = self.preconditioning.g(self.network, x_t, t, **condition)  # of the only jump it knows, to sigma_min
            return jump(x_t, g, t, end)


def load_teacher(
    name: str,
    subfolder: str | None = None,
    revision: str | None = None,
    token: str | None = None,
    prediction_type: str | None = None,
    timestep_scale: float | None = None,
    device: torch.device | str = "cpu",
) -> Teacher:
    """Load the teacher in the folder or Hub repository `name`: the one network in it, and its scheduler's config.

    Args:
        name: a folder, or a repository on the Hub. The network's files lie in a subfolder (`unet`) or at the top.
        subfolder: folder in it that holds the network, or one pipeline, where there are several.
        revision: branch, tag or commit of the repository.
        token: for a private repository; None is that of `hf auth login` or HF_TOKEN.
        prediction_type, timestep_scale: instead of what the scheduler's config says.

    Raises:
        UserError: it is not there, cannot be read, holds no or several networks, or has a scheduler that is not known.
    """
    try:
        source = _Source(name, revision, token)
        folder = _choose_network(name, source.networks(), subfolder)
        network = _load_network(name, source, folder)
        raw, label = source.scheduler(folder), f"--teacher {name}"
        index = source.json(_join(os.path.dirname(folder), "model_index.json"))
        id2label = _read_labels(name, index.get("id2label") or {})
    except UserError:
        raise
    except Exception as error:  # huggingface_hub, safetensors and diffusers each raise their own
        here = "" if os.path.isdir(name) else " No such folder is here."
        raise UserError(
            f"--teacher {name} cannot be loaded.{here} It must be a folder or a Hub repository with `unet` and `scheduler`; a private "
            f"repository needs `hf auth login` or HF_TOKEN.\n{error_text(error)}"
        ) from error

    config = network.config
    if config.in_channels != config.out_channels:
        raise UserError(
            f"{label} gives {config.out_channels} channels for {config.in_channels}, such as a network that also predicts variances. It "
            "must predict one value per pixel."
        )
    if config.get("time_embedding_type") == "learned":
        raise UserError(
            f"{label} has time_embedding_type 'learned', which knows whole timesteps only; it cannot be used."
        )
    if config.get("class_embed_type") is not None:
        raise UserError(
            f"{label} has class_embed_type {config.class_embed_type!r}: it is conditional on numbers that are no classes, which is not supported."
        )
    if config.sample_size is None:
        raise UserError(
            f"{label} does not say the size of its images: write sample_size to the config.json of the network."
        )
    null_class = index.get("null_class")
    if null_class is not None and null_class != (config.num_class_embeds or 0) - 1:
        raise UserError(
            f"{label}: null_class {null_class!r} in model_index.json must be the last of the network's {config.num_class_embeds} labels."
        )
    scheduler = _make_scheduler(label, raw, prediction_type, timestep_scale)
    if network.dtype != torch.float32:
        network = network.to(torch.float32)
    network = network.to(device).requires_grad_(False).eval()
    return Teacher(network, scheduler, id2label, name, source.revision, null_class)


def _read_labels(name: str, labels: object) -> dict[int, str] | None:
    """The names of the classes by number; None if there are none."""
    try:
        return {int(number): str(label) for number, label in labels.items()} or None
    except (AttributeError, ValueError) as error:
        raise UserError(f'--teacher {name}: id2label in model_index.json must be like {{"0": "airplane"}}.') from error


def teacher_of(options: TeacherOptions) -> Teacher:
    """The teacher that the options name."""
    return load_teacher(
        options.teacher,
        options.teacher_subfolder,
        options.teacher_revision,
        prediction_type=options.teacher_prediction_type,
        timestep_scale=options.teacher_timestep_scale,
    )


class _Source:
    """Files of a folder or repository; of a repository, those that are needed, all of one commit."""

    def __init__(self, name: str, revision: str | None, token: str | None):
        self.name, self.revision, self.token = name, None, token
        self.root = Path(name)
        self.on_hub = not self.root.is_dir()
        if self.on_hub:
            self.root = Path(self._download(["*model_index.json", "*config.json"], revision))
            self.revision = self.root.name  # a snapshot's folder is named by its commit
        elif revision is not None:
            raise UserError(f"--teacher_revision {revision} is for repositories on the Hub; {name} is a folder.")

    def _download(self, patterns: list[str], revision: str | None) -> str:
        return snapshot_download(self.name, revision=revision, token=self.token, allow_patterns=patterns)

    def files(self, folder: str, patterns: Sequence[str]) -> list[str]:
        """Names of the files in `folder` that match, fetched."""
        if self.on_hub:
            self._download([_join(folder, pattern) for pattern in patterns], self.revision)
        return sorted(path.name for pattern in patterns for path in (self.root / folder).glob(pattern))

    def json(self, path: str) -> dict:
        """The content of a JSON file, {} if it is not there."""
        file = self.root / path
        value = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
        if not isinstance(value, dict):
            raise UserError(f"{path} of {self.name} is no JSON object.")
        return value

    def networks(self) -> dict[str, str]:
        """Class of every model by its folder, "" for the top."""
        found = {}
        for path in sorted(self.root.rglob("config.json")):
            folder = path.parent.relative_to(self.root).as_posix()
            if any(part.startswith(".") for part in Path(folder).parts):
                continue
            folder = "" if folder == "." else folder
            config = self.json(_join(folder, "config.json"))
            # The first versions of diffusers did not record the class.
            unet = "UNet2DModel" if {"in_channels", "block_out_channels", "down_block_types"} <= config.keys() else None
            class_name = config.get("_class_name", unet) or next(iter(config.get("architectures") or []), None)
            if class_name is not None:
                found[folder] = class_name
        return found

    def scheduler(self, folder: str) -> dict:
        """The scheduler's config that belongs to the network in `folder`, {} if there is none."""
        for base in dict.fromkeys([folder, os.path.dirname(folder)]):
            for path in ("scheduler/scheduler_config.json", "scheduler_config.json"):
                config = self.json(_join(base, path))
                if config:
                    return config
        return {}


def _join(*parts: str) -> str:
    return "/".join(part for part in parts if part)


def _choose_network(name: str, found: dict[str, str], subfolder: str | None) -> str:
    """The folder of the only network that can be a teacher. Raises UserError that lists what there is."""
    candidates = [folder for folder, class_name in found.items() if class_name in NETWORKS]
    if subfolder is not None:
        subfolder = subfolder.strip("/")
        candidates = [folder for folder in candidates if folder == subfolder or folder.startswith(f"{subfolder}/")]
    if len(candidates) != 1:
        where = f"--teacher {name}" + (f" --teacher_subfolder {subfolder}" if subfolder else "")
        listed = ", ".join(f"{folder or 'the top'} ({class_name})" for folder, class_name in found.items())
        count = "no network" if not candidates else f"{len(candidates)} networks"
        raise UserError(
            f"{where} holds {count} of the classes {', '.join(NETWORKS)}. Found: {listed or 'no model at all'}. "
            + ("Choose one with --teacher_subfolder." if candidates else "It must be a diffusion model of pixels.")
        )
    folder = candidates[0]
    latent = [
        other
        for other, class_name in found.items()
        if folder
        and os.path.dirname(other) == os.path.dirname(folder)
        and class_name.startswith(("VQModel", "Autoencoder"))
    ]
    if latent:
        raise UserError(
            f"--teacher {name}: {folder} works on the latents of {latent[0]} ({found[latent[0]]}), not on pixels, which is not supported."
        )
    return folder


def _load_network(name: str, source: _Source, folder: str) -> UNet2DModel:
    """The network, with no weight missing or left over."""
    fetched = ((kind, source.files(folder, patterns)) for kind, patterns in enumerate(WEIGHTS))
    kind, files = next(((kind, files) for kind, files in fetched if files), (None, []))
    if kind is None:
        raise UserError(
            f"--teacher {name}: {folder or 'the top'} has a config.json, but no weights "
            "(diffusion_pytorch_model.safetensors or .bin)."
        )
    options = {}
    if kind == 1:
        options["variant"] = files[0].split(".")[1]
    network_class = getattr(diffusers, source.json(_join(folder, "config.json")).get("_class_name", "UNet2DModel"))
    network, report = network_class.from_pretrained(
        str(source.root / folder), use_safetensors=kind < 2, output_loading_info=True, **options
    )
    if report["missing_keys"] or report["unexpected_keys"]:
        raise UserError(
            f"--teacher {name}: weights and config do not fit: missing {report['missing_keys'][:3]}, "
            f"unexpected {report['unexpected_keys'][:3]}."
        )
    return network


def _make_scheduler(
    label: str, raw: dict, prediction_type: str | None, timestep_scale: float | None
) -> EDMHeunScheduler:
    """The teacher's levels and preconditioning from the config of any scheduler, and what options say instead."""
    if not raw and prediction_type is None:
        raise UserError(
            f"{label} has no scheduler_config.json, which says what the network predicts. Say it with --teacher_prediction_type; the rest "
            "is then as in diffusers' scheduler of that kind."
        )
    if not raw:
        if prediction_type == "edm" and timestep_scale is None:
            raise UserError(
                f"{label} has no scheduler_config.json: say --teacher_timestep_scale too, 1 for NVIDIA's EDM, 1000 for OpenAI's."
            )
        raw = {"_class_name": DEFAULT_SCHEDULERS.get(prediction_type, "EDMEulerScheduler")}
        logger.warning(f"{label} has no scheduler_config.json; taking the defaults of {raw['_class_name']}.")
    options = {"prediction_type": prediction_type, "timestep_scale": timestep_scale}
    options = {name: value for name, value in options.items() if value is not None}
    try:
        own = own_config(raw)
        if not own.keys() & {"sigma_data", "prediction_type"} and "prediction_type" not in options:
            raise UserError(
                f"{label} has a {raw.get('_class_name')}, which is not known: not of the EDM family, and without betas, flow or scores. "
                "Say --teacher_prediction_type."
            )
        return EDMHeunScheduler.from_config({**own, **options})
    except ValueError as error:
        said = "".join(f" --teacher_{name} {value}" for name, value in options.items())
        raise UserError(f"{label}{said} does not fit its scheduler_config.json: {error}") from error


def ctm_of_consistency_model(network: UNet2DModel, config: dict) -> CTMPipeline:
    """A consistency model as a CTM, untrained: one step, and more at gamma = 1, sample as the consistency model does.

    All its jumps end at sigma_min; at gamma < 1 others are asked, which it never learnt.

    Args:
        network: F of the consistency model.
        config: of its `CMStochasticIterativeScheduler`.
    """
    return CTMPipeline(CTMUNet2DModel.from_unet(network), CTMScheduler.from_config(config, gamma=1.0))
