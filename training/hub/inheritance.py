# Copyright 2026 The diffusers-ctm authors. Licensed under the Apache License, Version 2.0.
"""The license under which weights may be published, from the records of how they came to be."""

import re
from typing import Any

from ..cli.errors import UserError
from .client import card_license
from .license import PERMISSIVE, License, license_of, strictest
from .record import CONVERSION, RECORD, origins_of


def inherited_license(record: dict[str, Any], conversion: dict[str, Any]) -> tuple[License | None, str]:
    """The strictest license that weights inherit, by their records and by cards on the Hub, and from whom."""
    licenses = {}
    for title, origin in origins_of(record, conversion).items():
        license = license_of(origin)
        if license is None and origin.get("on_hub"):
            license = card_license(origin["name"], origin.get("revision"))
        licenses[f"its {title} {origin.get('name')} has that"] = license
    strict = strictest(licenses.values())
    return strict, next(reason for reason, license in licenses.items() if license is strict)


def choose_license(
    record: dict[str, Any], conversion: dict[str, Any], wanted: License | None = None, option_name: str = "license"
) -> License:
    """The license to publish under. Raises UserError if `wanted` contradicts an inherited one, or if none is known.

    Args:
        record, conversion: contents of `training.json` and `conversion.json`, {} if there is none.
    """
    inherited, reason = inherited_license(record, conversion)
    license = wanted or license_of(record) or inherited
    if license is None:
        raise UserError(
            f"--{option_name} is needed: neither {RECORD} nor {CONVERSION} nor a card on the Hub says the license of "
            "these weights or of their teacher. Weights that were distilled from others must keep that license."
        )
    if not may_be_published(inherited, license):
        non_commercial = " (non-commercial)" if re.search(r"(^|-)nc(-|$)", inherited.id) else ""
        raise UserError(
            f"The license {license} contradicts {inherited}{non_commercial}, which these weights have: {reason}. "
            f"Publish them under {inherited}: leave the license out or give that one."
        )
    return license


def may_be_published(inherited: License | None, license: License) -> bool:
    """Whether weights that inherit one license may be published under the other."""
    if inherited is None or inherited.id in PERMISSIVE:
        return True
    return license.id == inherited.id and license.name in (None, inherited.name)  # several are "other"
