"""Teachers: networks on the Hub or on disk as denoisers D(x, sigma)."""

from dataclasses import dataclass

import torch
from diffusers import UNet2DModel
from diffusers.utils import logging

from diffusers_ctm import CTMUNet2DModel, EDMHeunScheduler
from diffusers_ctm.trajectory import Preconditioning

from .config import UserError


logger = logging.get_logger(__name__)


@dataclass
class Teacher:
    """A frozen denoiser.

    Args:
        network: F, in evaluation mode, without gradient.
        scheduler: an `EDMHeunScheduler` that samples it; its config holds the preconditioning.
        id2label: names of its classes, if it carries them.
        null_class: its label that means "no class", if it was trained with label dropout.
    """

    network: UNet2DModel
    scheduler: EDMHeunScheduler
    id2label: dict[int, str] | None = None
    null_class: int | None = None

    @property
    def preconditioning(self) -> Preconditioning:
        return self.scheduler.preconditioning

    def denoise(self, x: torch.Tensor, sigma: torch.Tensor, class_labels: torch.Tensor | None = None) -> torch.Tensor:
        """D(x, sigma), x of shape (B, C, H, W), sigma of shape (B,). No gradient."""
        condition = {} if class_labels is None else {"class_labels": class_labels}
        with torch.no_grad():
            return self.preconditioning.denoise(self.network, x, sigma, **condition)


def load_teacher(name: str, device: torch.device | str = "cpu") -> Teacher:
    """Load the EDM teacher in the folder or Hub repository `name`: `unet` and `scheduler` of a diffusers pipeline.

    Raises UserError if it is not there, cannot be read, or its scheduler is not of the EDM family.
    """
    try:
        config = EDMHeunScheduler.load_config(name, subfolder="scheduler")
        class_name = CTMUNet2DModel.load_config(name, subfolder="unet").get("_class_name", "UNet2DModel")
        network_class = CTMUNet2DModel if class_name == "CTMUNet2DModel" else UNet2DModel
        network, report = network_class.from_pretrained(name, subfolder="unet", output_loading_info=True)
    except Exception as error:  # huggingface_hub, safetensors and diffusers each raise their own
        raise UserError(
            f"--teacher {name} cannot be loaded. It must be a folder or a Hub repository with `unet` and `scheduler`.\n"
            f"{type(error).__name__}: {error}"
        ) from error
    if report["missing_keys"] or report["unexpected_keys"]:
        raise UserError(
            f"--teacher {name}: weights and config do not fit: missing {report['missing_keys'][:3]}, "
            f"unexpected {report['unexpected_keys'][:3]}."
        )
    if "sigma_data" not in config:
        raise UserError(
            f"--teacher {name} has a {config.get('_class_name')}, which is not of the EDM family (EDMHeunScheduler, CTMScheduler, "
            "EDMEulerScheduler, EDMDPMSolverMultistepScheduler)."
        )
    network = network.to(device).requires_grad_(False).eval()
    return Teacher(network, EDMHeunScheduler.from_config(config), *_classes(name))


def _classes(name: str) -> tuple[dict[int, str] | None, int | None]:
    """The class names and the null class in model_index.json; a repository without that file has none."""
    from diffusers import DiffusionPipeline

    try:
        index = DiffusionPipeline.load_config(name)
    except OSError:
        return None, None
    labels = index.get("id2label")
    return {int(number): label for number, label in labels.items()} if labels else None, index.get("null_class")
