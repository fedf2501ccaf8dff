# Copyright 2026 The diffusers-ctm authors. Licensed under the Apache License, Version 2.0.
"""The autoencoder that an option names, or that lies beside a teacher."""

import os
from dataclasses import replace

from ..cli.errors import UserError, loading
from ..data.latents import Autoencoder
from ..hub.record import CONVERSION, RECORD
from .source import Source, join


def load_autoencoder(name: str, revision: str | None, unit_range: bool = False) -> Autoencoder:
    """The one image autoencoder in the folder or repository --vae, shown images in [0, 1] if `unit_range` says so.

    Raises UserError if there is none, or several.
    """
    label = f"--vae {name}"
    with loading(label, "It must be a folder or a Hub repository with an autoencoder, alone or in a pipeline's `vae`."):
        source = Source(name, revision, "vae")
        folder = source.choose_autoencoder()
        if folder is None:
            raise UserError(f"{label} holds no autoencoder. Give a folder or repository with one.")
        autoencoder = autoencoder_of(source, folder)
        return replace(autoencoder, normalize_images=False) if unit_range else autoencoder


def autoencoder_of(source: Source, folder: str) -> Autoencoder:
    """The autoencoder in `folder` of a source, frozen, as its pipeline uses it."""
    pipeline = os.path.dirname(folder)
    index = source.json(join(pipeline, "model_index.json"))
    network = source.load_network(folder).float().requires_grad_(False).eval()
    source.files(pipeline, [RECORD, CONVERSION])
    records = (source.json(join(pipeline, name)) for name in (RECORD, CONVERSION))
    record = next((record["vae"] for record in records if record.get("vae")), None)
    return Autoencoder(network, index.get("normalize_images", True), source.name, source.revision, record)
