"""Under which licence weights may be published; asks records, not folders."""

import re

from ..cli.errors import UserError
from ..cli.files import read_json
from .client import card_licence
from .license import PERMISSIVE, Licence, licence_of, strictest
from .record import CONVERSION, ORIGINS, RECORD, conversion_repo


def check_licence_name(name: str | None, field: str) -> None:
    if name is not None and re.fullmatch(r"[a-z0-9][a-z0-9.+-]*", name) is None:
        raise UserError(
            f"--{field} must be a licence as the Hub names it, e.g. 'mit' or 'cc-by-nc-sa-4.0', got {name!r}."
        )


def teachers_licence(folder: str) -> tuple[Licence | None, str]:
    """The strictest of what the weights in `folder` inherit, and where that is said: records of the run or the conversion, or a card."""
    record, conversion = read_json(folder, RECORD), read_json(folder, CONVERSION)
    origins = []
    for role, title in ORIGINS.items():
        origin = record.get(role) or {}
        repo = origin["name"] if origin.get("on_hub") else None
        origins.append((origin, repo, f"its {title} {origin.get('name')} has that"))
    origins.append((conversion, conversion_repo(conversion), f"{CONVERSION} says so of {conversion.get('source')}"))
    reasons = []
    for origin, repo, reason in origins:
        if (found := licence_of(origin)) is not None:
            reasons.append((found, reason))
        elif repo is not None and (found := card_licence(repo, origin.get("revision"))) is not None:
            reasons.append((found, f"the card of {repo} says so"))
    inherited = strictest(found for found, _ in reasons)
    return next(((found, reason) for found, reason in reasons if found is inherited), (None, ""))


def choose_licence(folder: str, wanted: Licence | None, option_name: str = "license") -> Licence:
    """The licence to publish under. Raises UserError if `wanted` is not what the teacher's allows, or if none is known."""
    inherited, reason = teachers_licence(folder)
    wanted = wanted or licence_of(read_json(folder, RECORD)) or inherited
    if wanted is None:
        raise UserError(
            f"--{option_name} is needed: neither {RECORD} nor {CONVERSION} nor a card on the Hub says the licence of these weights or "
            "of their teacher. Weights that were distilled from others must keep that licence."
        )
    check_inheritance(inherited, reason, wanted)
    return wanted


def check_inheritance(inherited: Licence | None, reason: str, wanted: Licence) -> None:
    """Raise UserError if weights that inherit one licence may not be published under the other."""
    if inherited is None or inherited.id in PERMISSIVE:
        return
    if wanted.id == inherited.id and wanted.name in (None, inherited.name):  # several are "other"
        return
    kind = " (non-commercial)" if re.search(r"(^|-)nc(-|$)", inherited.id) else ""
    raise UserError(
        f"The licence {wanted} contradicts {inherited}{kind}, which these weights have: {reason}. Publish them under {inherited}: leave the "
        "licence out or give that one."
    )
