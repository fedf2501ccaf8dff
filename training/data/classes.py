# Copyright 2026 The diffusers-ctm authors. Licensed under the Apache License, Version 2.0.
"""The classes of a data set in the numbers of a network: by name where both have names."""

from collections import Counter
from collections.abc import Collection, Iterable, Mapping

from diffusers_ctm.class_labels import finder

from ..cli.errors import UserError


MOST_SHOWN = 12  # names in a message


def shown(words: Iterable[str]) -> str:
    """Words in a message, the first of many."""
    words = list(words)
    more = f" and {len(words) - MOST_SHOWN} more" if len(words) > MOST_SHOWN else ""
    return ", ".join(words[:MOST_SHOWN]) + more


def numbers_by_name(
    names: Mapping[int, str],
    num_classes: int,
    id2label: Mapping[int, str] | None,
    used: Collection[int] | None,
    network: str,
) -> dict[int, int]:
    """The network's number of each class of the data that has a name; -1 for one without images that it lacks.

    Classes are found by name, without regard to case if none is spelled so. Where the network has no names, or none of
    these, names that are numbers mean these numbers: folders are often called so.

    Args:
        names: of the data's classes, by number.
        num_classes: of the network.
        id2label: the network's names; None if it has none.
        used: the data's classes that have images; None if that is not known.
        network: the option that names the network, for messages.

    Raises UserError for names that the network lacks, and for names that could mean several classes.
    """
    as_numbers = {own: int(name) for own, name in names.items() if name.isdecimal() and int(name) < num_classes}
    are_numbers = len(set(as_numbers.values())) == len(names)
    find = finder(id2label or {})
    found = {own: find(name) for own, name in names.items()}
    if are_numbers and not any(found.values()):
        return as_numbers
    if not id2label:
        return {own: own for own in names}
    numbers = {own: own if own in places else (places or [-1])[0] for own, places in found.items()}
    counted = [own for own in names if used is None or own in used]
    if missing := [names[own] for own in counted if numbers[own] < 0]:
        raise UserError(
            f"{network} has no class {shown(missing)}, which the data set has. It knows {shown(id2label.values())}. "
            "Give the data's classes the names that the network has for them, or leave their images out."
        )
    times = Counter(numbers[own] for own in counted)
    if unclear := [names[o] for o in counted if times[numbers[o]] > 1 or (len(found[o]) > 1 and o not in found[o])]:
        raise UserError(
            f"The class names {shown(unclear)} do not tell which classes of {network} they are: one name stands for "
            "several classes there, or several names for one. Give each class of the data a name that is one class's."
        )
    return numbers
