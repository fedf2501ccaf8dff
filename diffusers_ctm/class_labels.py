# Copyright 2026 The diffusers-ctm authors. Licensed under the Apache License, Version 2.0.
"""Classes of a batch: by number or name, drawn at random, or none."""

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from numbers import Integral, Number
from typing import Any

import numpy as np
import torch


def finder(id2label: Mapping[Any, str]) -> Callable[[str], list[int]]:
    """A function from a name to the numbers of the classes that have it.

    A name is found as it is spelled: whole, else between the commas of longer ones ("goldfish" of ImageNet's "goldfish,
    Carassius auratus"). Only if no class is spelled so, without regard to case.
    """
    tables = [defaultdict(list) for _ in range(4)]
    for number, name in id2label.items():
        name = str(name)
        parts = {part.strip() for part in name.split(",")} - {""}
        spellings = ({name}, parts, {name.lower()}, {part.lower() for part in parts})
        for table, keys in zip(tables, spellings, strict=True):
            for key in keys:
                table[key].append(int(number))

    def find(name: str) -> list[int]:
        keys = (name, name, name.lower(), name.lower())
        return next((table[key] for table, key in zip(tables, keys, strict=True) if key in table), [])

    return find


def label_ids(
    labels: int | str | Sequence[int | str] | torch.Tensor, num_classes: int | None, id2label: Mapping | None
) -> list[int]:
    """Class numbers for numbers or names of classes. Raises ValueError for a class that does not exist."""
    if num_classes is None:
        raise ValueError("class_labels were given, but this network is unconditional.")
    labels = labels.tolist() if isinstance(labels, (torch.Tensor, np.ndarray)) else labels
    labels = [labels] if isinstance(labels, (Number, str)) else labels
    if not isinstance(labels, Sequence):
        raise ValueError(f"class_labels must be a number, a name or a list of these, got {labels!r}.")
    find, ids = None, []
    for label in labels:
        if isinstance(label, str):
            find = find or finder(id2label or {})
            numbers = find(label)
            if not numbers:
                known = ", ".join(sorted(map(str, (id2label or {}).values()), key=str.lower))
                known = known or "none: this checkpoint carries no names, pass a number"
                raise ValueError(f"class_labels={label!r} is not the name of a class. Known names: {known}.")
            if len(numbers) > 1:
                raise ValueError(f"class_labels={label!r} is the name of the classes {numbers}; pass a number.")
            label = numbers[0]
        if not isinstance(label, Integral) or isinstance(label, bool):
            raise ValueError(f"class_labels must be whole numbers or names, got {label!r}.")
        if not 0 <= int(label) < num_classes:
            raise ValueError(f"class_labels={label} is not a class; this network knows 0 to {num_classes - 1}.")
        ids.append(int(label))
    return ids


def labels_and_batch_size(
    pipe: Any, class_labels, batch_size: int | None, generator, device
) -> tuple[torch.Tensor | None, int]:
    """Labels of shape (B,) on `device`, None for an unconditional network, and B.

    Without `class_labels` they are drawn at random, as `generator` says and without moving it: the noise that follows
    is that of the same call with these labels. Raises ValueError for labels or generators that are not B.
    """
    ids = None if class_labels is None else pipe.get_label_ids(class_labels)
    if ids is not None:
        if not ids:
            raise ValueError("class_labels is empty; pass None for random classes.")
        ids = ids * (batch_size or 1) if len(ids) == 1 else ids
        if batch_size is not None and len(ids) != batch_size:
            raise ValueError(
                f"class_labels has {len(ids)} entries for batch_size={batch_size}; pass one or {batch_size}."
            )
    batch_size = len(ids) if ids else batch_size or 1
    if isinstance(generator, list) and len(generator) != batch_size:
        raise ValueError(
            f"generator is a list of {len(generator)} for batch_size={batch_size}; pass one or {batch_size}."
        )
    if ids is not None:
        return torch.tensor(ids, device=device), batch_size
    if pipe.num_classes is None:
        return None, batch_size
    sources, count = (generator, 1) if isinstance(generator, list) else ([generator], batch_size)
    beside = {source: source and _generator_beside(source) for source in sources}  # one that is listed twice goes on
    drawn = [torch.randint(len(pipe.classes), (count,), generator=beside[source], device="cpu") for source in sources]
    return torch.tensor(pipe.classes, device="cpu")[torch.cat(drawn)].to(device), batch_size


def _generator_beside(generator: torch.Generator) -> torch.Generator:
    """A generator on the CPU whose seed is the number that `generator` would draw next. It does not share its bits."""
    copy = torch.Generator(generator.device).set_state(generator.get_state())
    return torch.Generator().manual_seed(int(torch.randint(2**31, (), generator=copy, device=copy.device)))


def null_labels(pipe: Any, class_labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(`class_labels`, labels that mean "no class"), in the form that the pipeline's network takes."""
    if pipe.config.null_class is not None:
        return class_labels, torch.full_like(class_labels, pipe.config.null_class)
    one_hot = torch.nn.functional.one_hot(class_labels.long(), pipe.unet.config.num_class_embeds).float()
    return one_hot, torch.zeros_like(one_hot)
