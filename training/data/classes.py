# Copyright 2026 The diffusers-ctm authors. Licensed under the Apache License, Version 2.0.
"""The classes of a data set in the numbers of a network: by name where both have names."""

from collections import Counter
from collections.abc import Collection, Mapping

import torch

from diffusers_ctm.class_labels import finder

from ..cli.device import say
from ..cli.errors import UserError, listed


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
            f"{network} has no class {listed(missing)}, which the data set has. It knows {listed(id2label.values())}. "
            "Give the data's classes the names that the network has for them, or leave their images out."
        )
    times = Counter(numbers[own] for own in counted)
    if unclear := [names[o] for o in counted if times[numbers[o]] > 1 or (len(found[o]) > 1 and o not in found[o])]:
        raise UserError(
            f"The class names {listed(unclear)} do not tell which classes of {network} they are: one name stands for "
            "several classes there, or several names for one. Give each class of the data a name that is one class's."
        )
    return numbers


class Classes:
    """The classes of a data set: their number and names, those with images, and a network's numbers for them.

    Attributes:
        num_classes, id2label: None without classes; `id2label` also where the classes are plain numbers.
        classes: numbers of the classes that have images, ascending; None if that is not known.

    Args:
        label_column: of the data set; None is no classes.
        num_classes: what the option says.
    """

    def __init__(self, label_column: str | None, num_classes: int | None):
        self.label_column = label_column
        self.num_classes, self.id2label, self.classes = num_classes, None, None
        self._numbers, self._numbered_as = None, None

    def name_classes(self, names: list[str]) -> None:
        """Let these be the classes. Raises UserError if the option says another number of them."""
        if self.num_classes not in (None, len(names)):
            raise UserError(
                f"--num_classes {self.num_classes} is for plain numbers; --label_column {self.label_column} names "
                f"{len(names)} classes. Leave it out."
            )
        self.num_classes, self.id2label = len(names), dict(enumerate(names))

    def check_labels(self, labels: list[int | None]) -> None:
        """Raise UserError if an image has no class, or one beyond their number."""
        missing = sum(label is None or label < 0 for label in labels)
        if missing:
            raise UserError(
                f"--label_column {self.label_column} has no class (null or negative) for {missing} of {len(labels)} "
                "images; remove such images, or leave --label_column out."
            )
        known = self.num_classes if self._numbers is None else len(self._numbers)
        if known is not None and max(labels, default=0) >= known:
            raise UserError(
                f"--label_column {self.label_column} holds the class {max(labels)}, and there are {known} classes, "
                "from 0 on. Give a larger --num_classes."
            )

    @property
    def empty_classes(self) -> list[int]:
        """Numbers of the classes that have no image; none if it is not known."""
        return [] if self.classes is None else sorted(set(range(self.num_classes)) - set(self.classes))

    @property
    def trained_classes(self) -> list[int] | None:
        """`classes`, if others have no image; None if all have, there are none, or it is not known."""
        return self.classes if self.empty_classes else None

    def number_classes(self, num_classes: int, id2label: Mapping[int, str] | None, network: str) -> None:
        """Give the classes the numbers that a network has for them, found by name (`numbers_by_name`).

        `num_classes`, `id2label`, `classes` and all labels are then the network's. One line says what was changed.

        Args:
            num_classes, id2label: of the network.
            network: the option that names it, for messages.

        Raises UserError for classes that the network does not have, and if another network has numbered them already
        and this one differs.
        """
        numbers = {own: own for own in range(self.num_classes)}
        if self.id2label is not None:
            numbers |= numbers_by_name(self.id2label, num_classes, id2label, self.classes, network)
        used = list(numbers) if self.classes is None else self.classes
        if any(numbers[own] >= num_classes for own in used):
            raise UserError(
                f"--label_column {self.label_column} has {self.num_classes} classes, {network} knows {num_classes}. "
                "Leave out the images of classes beyond, or lower --num_classes if it is given."
            )
        moved = [f"{self.id2label[own]} from {own} to {numbers[own]}" for own in used if numbers[own] != own]
        if moved and self._numbered_as is not None:
            raise UserError(
                f"{self._numbered_as} and {network} number the same classes differently: {listed(moved)}. Use one of "
                "them at a time."
            )
        if moved:
            self._numbers = torch.tensor(list(numbers.values()))
            self.classes = self.classes and sorted(numbers[own] for own in used)
            say(f"Classes numbered by name, as {network} has them: {listed(moved)}.")
        if id2label or moved:
            self._numbered_as = network
            self.id2label = {int(number): name for number, name in id2label.items()} if id2label else None
        self.num_classes = num_classes

    def as_numbered(self, labels: list[int]) -> torch.Tensor:
        """Labels of the data set in the numbers of the network, int64 of shape (n,)."""
        labels = torch.tensor(labels)
        return labels if self._numbers is None else self._numbers[labels]
