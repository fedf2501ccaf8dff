"""A licence as the Hub names it, and the strictest of several."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import yaml
from huggingface_hub import ModelCard


# Who may be republished under another licence, as these allow. Whatever is not here is inherited as it is.
PERMISSIVE = {
    "mit", "apache-2.0", "bsd", "bsd-2-clause", "bsd-3-clause", "bsd-3-clause-clear", "isc", "unlicense", "wtfpl", "zlib", "0bsd",
    "cc0-1.0", "pddl", "cc-by-2.0", "cc-by-2.5", "cc-by-3.0", "cc-by-4.0", "afl-3.0", "bsl-1.0", "ecl-2.0", "ncsa", "postgresql",
}  # fmt: skip


@dataclass
class Licence:
    """A licence as the Hub names it.

    Args:
        id: e.g. "mit", "cc-by-nc-sa-4.0", or "other".
        name, link: of an "other" one.
    """

    id: str
    name: str | None = None
    link: str | None = None

    def __str__(self) -> str:
        return f"{self.id} ({self.name})" if self.name else self.id


def licence_of(values: Any) -> Licence | None:
    """The licence in a card's metadata, or in a record: keys `license`, `license_name`, `license_link`. None in what is no dict."""
    found = values.get("license") if isinstance(values, dict) else None
    if isinstance(found, list) and len(found) == 1:
        found = found[0]
    if not isinstance(found, str) or not found.strip() or found.strip().lower() == "unknown":
        return None
    name, link = (
        text if isinstance(text := values.get(key), str) else None for key in ("license_name", "license_link")
    )
    return Licence(found.strip().lower(), name, link)


def licence_in(card: str) -> Licence | None:
    """The licence in the text of a card; None if there is none, or metadata that is no YAML."""
    try:
        return licence_of(ModelCard(card, ignore_metadata_errors=True).data.to_dict())
    except (ValueError, yaml.YAMLError, RecursionError):
        return None


def strictest(licences: Iterable[Licence | None]) -> Licence | None:
    """Of the licences that are known the first that is not permissive, else the first. (Two such conditions are not weighed.)"""
    known = [licence for licence in licences if licence is not None]
    return next((licence for licence in known if licence.id not in PERMISSIVE), known[0] if known else None)


def licence_fields(licence: Licence | None) -> dict[str, str]:
    """The licence as entries of a record or a card."""
    if licence is None:
        return {}
    values = {"license": licence.id, "license_name": licence.name, "license_link": licence.link}
    return {name: value for name, value in values.items() if value}
