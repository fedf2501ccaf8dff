# Copyright 2026 The diffusers-ctm authors. Licensed under the Apache License, Version 2.0.
"""The part that may be shown of a path, an id on the Hub or an address."""

import os
import re
import urllib.parse


HUB_ID = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")


def is_address(name: str) -> bool:
    return name.lower().startswith(("https://", "http://"))


def is_hub_id(name: str | None) -> bool:
    """Whether `name` is user/name on the Hub rather than something on this disk."""
    return bool(name) and HUB_ID.fullmatch(name) is not None and not os.path.exists(name)


def public_name(name: str) -> str:
    """`name` as it may be published.

    A Hub id stays as it is, an address loses user, password and query, and a path keeps its last part; of
    `run/pipeline` and `run/checkpoint-5` that is the run.
    """
    if is_hub_id(name):
        return name
    if is_address(name):
        parts = urllib.parse.urlsplit(name)
        return f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}"
    parts = [part for part in re.split(r"[/\\]", os.path.abspath(name) if name.startswith(".") else name) if part]
    if len(parts) > 1 and re.fullmatch(r"pipeline|checkpoint-\d+", parts[-1]):
        parts.pop()
    return parts[-1] if parts else name


def without_folders(value: object) -> object:
    """`value`, or its public name if it is a path."""
    is_path = isinstance(value, str) and (os.path.isabs(value) or ("/" in value and os.path.exists(value)))
    return public_name(value) if is_path else value
