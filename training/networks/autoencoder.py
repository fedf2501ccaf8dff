# Copyright 2026 The diffusers-ctm authors. Licensed under the Apache License, Version 2.0.
"""The autoencoder that an option names, or that lies beside a teacher."""

import os

from ..cli.errors import UserError, loading
from ..data.latents import Autoencoder
from .source import Source, join


def load_autoencoder(name: str, revision: str | None) -> Autoencoder:
    """The one image autoencoder in the folder or repository --vae. Raises UserError if there is none, or several."""
    label = f"--vae {name}"
    with loading(label, "It must be a folder or a Hub repository with an autoencoder, alone or in a pipeline's `vae`."):
        source = Source(name, revision, "vae")
        folders = source.autoencoders()
    if len(folders) != 1:
        raise UserError(
            f"{label} holds {len(folders) or 'no'} autoencoders{': ' if folders else ''}{', '.join(folders)}. Give a "
            "folder or repository with one."
        )
    with loading(label):
        return autoencoder_of(source, folders[0])


def autoencoder_of(source: Source, folder: str) -> Autoencoder:
    """The autoencoder in `folder` of a source, frozen, as its pipeline uses it."""
    index = source.json(join(os.path.dirname(folder), "model_index.json"))
    network = source.load_network(folder).float().requires_grad_(False).eval()
    return Autoencoder(network, index.get("normalize_images", True), source.name, source.revision)
