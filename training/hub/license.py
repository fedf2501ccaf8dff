# Copyright 2026 The diffusers-ctm authors. Licensed under the Apache License, Version 2.0.
"""A license as the Hub names it, and the strictest of several."""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import yaml
from huggingface_hub import ModelCard

from ..cli.errors import UserError


# These allow republishing under another license. Any license that is not here is inherited as it is.
PERMISSIVE = {
    "mit", "apache-2.0", "bsd", "bsd-2-clause", "bsd-3-clause", "bsd-3-clause-clear", "isc", "unlicense", "wtfpl",
    "zlib", "0bsd", "cc0-1.0", "pddl", "cc-by-2.0", "cc-by-2.5", "cc-by-3.0", "cc-by-4.0", "afl-3.0", "bsl-1.0",
    "ecl-2.0", "ncsa", "postgresql",
}  # fmt: skip


@dataclass
class License:
    """A license as the Hub names it.

    Args:
        id: e.g. "mit", "cc-by-nc-sa-4.0", or "other".
        name, link: of an "other" one.
    """

    id: str
    name: str | None = None
    link: str | None = None

    def __str__(self) -> str:
        return f"{self.id} ({self.name})" if self.name else self.id


def check_license_name(name: str | None, option_name: str) -> None:
    if name is not None and re.fullmatch(r"[a-z0-9][a-z0-9.+-]*", name) is None:
        raise UserError(
            f"--{option_name} must be a license as the Hub names it, e.g. 'mit' or 'cc-by-nc-sa-4.0', got {name!r}."
        )


def license_of(values: Any) -> License | None:
    """The license in a card's metadata or in a record: keys `license`, `license_name`, `license_link`.

    None if it is missing or unknown, or if `values`, which someone else may have written, is no dict.
    """
    values = values if isinstance(values, dict) else {}
    license_id = values.get("license")
    if isinstance(license_id, list) and len(license_id) == 1:
        license_id = license_id[0]
    if not isinstance(license_id, str) or license_id.strip().lower() in ("", "unknown"):
        return None
    name, link = (
        text if isinstance(text := values.get(key), str) else None for key in ("license_name", "license_link")
    )
    return License(license_id.strip().lower(), name, link)


def license_in(card: str) -> License | None:
    """The license in the text of a card; None if there is none, or if its metadata is no YAML."""
    try:
        return license_of(ModelCard(card, ignore_metadata_errors=True).data.to_dict())
    except (ValueError, yaml.YAMLError, RecursionError):
        return None


def strictest(licenses: Iterable[License | None]) -> License | None:
    """The first license that is not permissive, else the first. (Two that are not permissive are not compared.)"""
    return min(filter(None, licenses), key=lambda license: license.id in PERMISSIVE, default=None)


def license_fields(license: License | None) -> dict[str, str]:
    """The license as entries of a record or a card."""
    values = {"license": license.id, "license_name": license.name, "license_link": license.link} if license else {}
    return {key: value for key, value in values.items() if value}
