# Copyright 2026 The diffusers-ctm authors. Licensed under the Apache License, Version 2.0.
"""Files of a reference: features that were kept, or the mean and covariance that others share."""

import json
import os
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from ..cli.errors import UserError, loading
from ..cli.files import atomic_file, tensors_digest
from ..cli.shared_options import DataOptions
from ..data.images import ImageDataset
from .distances import Statistics, reference_features


ROUNDING = 1e-5  # of the largest entry or eigenvalue of a covariance; many are computed in float32

SPOT_CHECK = 32  # images that are looked at again when kept features are read


@dataclass
class ReferenceFile:
    """What a file of a reference holds.

    Args:
        statistics: mean (F,) and covariance (F, F), float64.
        features: float32 (N, F), or None in a file of others.
        made_from: what `origin_of` said of the features; None in a file of others.
    """

    statistics: Statistics
    features: torch.Tensor | None = None
    made_from: dict[str, Any] | None = None


def read_reference(path: str) -> ReferenceFile:
    """Read a file .npz with `mu` and `sigma`, and if `keep_reference` wrote it with features. No code in it runs.

    Raises UserError if it cannot be read, or `sigma` is no covariance.
    """
    option = f"--reference {path}"
    with loading(option, "It must be a file .npz with `mu` and `sigma`."), np.load(path, allow_pickle=False) as file:
        if not {"mu", "sigma"} <= set(file.files):
            raise UserError(f"{option} has no `mu` and `sigma`; it has {', '.join(file.files) or 'nothing'}.")
        mu, sigma = (torch.from_numpy(np.asarray(file[name], dtype=np.float64)) for name in ("mu", "sigma"))
        check_statistics(option, mu, sigma)
        if "made_from" not in file.files:
            return ReferenceFile((mu, sigma))
        return ReferenceFile((mu, sigma), torch.from_numpy(file["features"]), json.loads(str(file["made_from"])))


def check_statistics(what: str, mu: torch.Tensor, sigma: torch.Tensor) -> None:
    """Raise UserError unless they are a mean (F,) and a covariance (F, F), up to rounding."""
    if mu.ndim != 1 or sigma.shape != (len(mu), len(mu)):
        shapes = f"mu of shape {tuple(mu.shape)} and sigma of shape {tuple(sigma.shape)}"
        raise UserError(f"{what} has {shapes}; (F,) and (F, F) were expected.")
    if not (mu.isfinite().all() and sigma.isfinite().all()):
        raise UserError(f"{what} has infinite or NaN numbers.")
    if (sigma - sigma.T).abs().max() > ROUNDING * sigma.abs().max():
        raise UserError(f"{what}: sigma is not symmetric, so it is no covariance.")
    values = torch.linalg.eigvalsh(sigma)
    if values[0] < -ROUNDING * values[-1].clamp(min=0):
        raise UserError(f"{what}: sigma has the eigenvalue {values[0]:.3g} below 0, so it is no covariance.")


def origin_of(dataset: ImageDataset, network: torch.nn.Module) -> dict[str, Any]:
    """All that features of a data set depend on, in JSON's types. Paths are named by their last part."""
    return {
        **dataset.origin(),
        "features": tensors_digest(network.state_dict().items(), str(network.about.get("resizing"))).hex()[:16],
    }


def kept_features(
    path: str,
    kept: ReferenceFile | None,
    config: DataOptions,
    dataset: ImageDataset,
    network: torch.nn.Module,
    batch_size: int,
    device: torch.device,
) -> torch.Tensor:
    """Features (N, F) of all real images, on the CPU: of `kept`, or computed and then written to `path`.

    Raises UserError if `kept` was made from other data or features, or in another way. A few images are looked at
    again.
    """
    origin = origin_of(dataset, network)

    def compute(only: torch.Tensor | None = None) -> torch.Tensor:
        workers = config.dataloader_num_workers if only is None else 0
        return reference_features(dataset, network, batch_size, device, config.random_flip, workers, only)[0]

    if kept is None:
        features = compute()
        keep_reference(path, features, origin)
        return features
    option = f"--reference {path}"
    other = [name for name in origin if kept.made_from.get(name) != origin[name]]
    if other:
        changes = (f"{name} {kept.made_from.get(name)}, here {origin[name]}" for name in other)
        raise UserError(f"{option} was made otherwise: {'; '.join(changes)}. Give another file, which is then written.")
    spots = torch.linspace(0, len(dataset) - 1, min(SPOT_CHECK, len(dataset))).long()
    now = compute(spots)
    if (now - kept.features[spots]).abs().max() > 0.01 * kept.features.std(0).max():
        raise UserError(f"{option} does not hold the features of these images. Give another file, or remove this one.")
    return kept.features


def keep_reference(path: str, features: torch.Tensor, origin: dict[str, Any]) -> None:
    """Write features (N, F), their mean and covariance, and what they were made from, and say so."""
    values = features.double()
    statistics = {"mu": values.mean(0).numpy(), "sigma": values.T.cov().numpy()}
    with atomic_file(path) as draft:
        np.savez(draft, features=features.numpy(), made_from=np.array(json.dumps(origin)), **statistics)
    print(f"Kept the features of {len(features):,} real images in {os.path.normpath(path)}.")
