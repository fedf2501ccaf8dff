"""What of a path, an id or an address may be shown."""

import os
import re
from typing import Any


HUB_ID = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")


def is_hub_id(name: str | None) -> bool:
    """Whether `name` is user/name on the Hub rather than something on this disk."""
    return bool(name) and HUB_ID.fullmatch(name) is not None and not os.path.exists(name)


def public_name(name: str) -> str:
    """`name` as it may be published: a Hub id as it is, of a local path its last part, of `run/pipeline` and `run/checkpoint-5` the run."""
    if is_hub_id(name):
        return name
    parts = [part for part in re.split(r"[/\\]", os.path.abspath(name) if name.startswith(".") else name) if part]
    if len(parts) > 1 and re.fullmatch(r"pipeline|checkpoint-\d+", parts[-1]):
        parts.pop()
    return parts[-1] if parts else name


def _without_folders(value: Any) -> Any:
    """`value`, or its public name if it is a path."""
    is_path = isinstance(value, str) and (os.path.isabs(value) or ("/" in value and os.path.exists(value)))
    return public_name(value) if is_path else value
