# Copyright 2026 The diffusers-ctm authors. Licensed under the Apache License, Version 2.0.
"""Images of any source and mode at one size, and the order in which a run reads them."""

import io
import json
import struct
import zipfile

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from datasets import ClassLabel, Dataset, DatasetDict, Features, Image, List, Value
from PIL import Image as PILImage
from PIL import ImageFilter
from sklearn.datasets import load_digits

from training.cli.errors import UserError, error_text
from training.cli.shared_options import DataOptions
from training.data.batches import load_batches, step_indices
from training.data.dataset_tool import archive_of
from training.data.images import ImageDataset, mirrored, to_sample
from training.data.sources import digits
from training.data.stream import ImageStream, ahead, stream_batches


def picture(size, mode="RGB", seed=0):
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    return PILImage.fromarray(pixels).convert(mode)


@pytest.fixture
def parquet(tmp_path):
    """A function that writes pictures, classes and notes to a parquet file."""
    path = str(tmp_path / "data.parquet")

    def write(pictures, labels=None, kind=ClassLabel(names=["cat", "dog", "eel"])):  # noqa: B008
        columns = {"img": pictures, "note": ["x"] * len(pictures), "kind": labels or [0] * len(pictures)}
        features = Features({"img": Image(), "note": Value("string"), "kind": kind})
        Dataset.from_dict(columns, features=features).to_parquet(path)
        return path

    return write


def test_digits_are_all_there_with_their_levels_of_gray():
    data = ImageDataset(DataOptions(label_column="label"))
    images, labels = data[list(range(len(data)))]
    source = load_digits()
    assert images.shape == (1797, 1, 8, 8) and data.num_classes == 10 and data.id2label[3] == "3"
    assert (labels.numpy() == source.target).all()
    np.testing.assert_array_equal(images[:, 0].numpy(), np.round(source.images * 255 / 16))
    assert to_sample(images).std().item() == pytest.approx(0.752, abs=0.001)  # the sigma_data of its configs
    assert to_sample(torch.tensor([0, 255], dtype=torch.uint8)).tolist() == [-1.0, 1.0]


def test_parquet_pixels_and_classes(parquet):
    pictures = [picture((6, 6), seed=seed) for seed in range(3)]
    data = ImageDataset(DataOptions(dataset_name=parquet(pictures, [2, 0, 1]), label_column="kind"))
    images, labels = data[[2, 0]]
    np.testing.assert_array_equal(images[0].permute(1, 2, 0).numpy(), np.asarray(pictures[2]))
    assert labels.tolist() == [1, 2] and data.id2label == {0: "cat", 1: "dog", 2: "eel"}
    assert (data.mode, data.resolution, data.channels) == ("RGB", 6, 3)


def test_images_are_made_smaller_as_those_of_imagenet(parquet):
    pixels = np.random.default_rng(0).integers(0, 256, (100, 150, 3), dtype=np.uint8)
    photo = PILImage.fromarray(pixels).filter(ImageFilter.GaussianBlur(2))
    small, _ = ImageDataset(DataOptions(dataset_name=parquet([photo]), resolution=32))[[0]]
    pairs = np.asarray(photo).reshape(100, 75, 2, 3).mean(2)
    halved = (np.floor(pairs + 0.5).reshape(50, 2, 75, 3).mean(1) + 0.5).astype(np.uint8)  # PIL rounds twice
    expected = PILImage.fromarray(halved).resize((48, 32), PILImage.Resampling.BICUBIC).crop((8, 0, 40, 32))
    np.testing.assert_array_equal(small[0].permute(1, 2, 0), np.asarray(expected))


def test_images_are_mirrored_by_the_numbers_drawn():
    images = torch.arange(8).reshape(2, 1, 2, 2)
    assert mirrored(images, torch.tensor([0.49, 0.5])).flatten().tolist() == [1, 0, 3, 2, 4, 5, 6, 7]


@pytest.mark.parametrize(
    "options, message",
    [
        ({"image_column": "photo"}, "--image_column photo is not a column.*img"),
        ({"image_column": "note"}, "--image_column note holds no images"),
        ({"label_column": "species"}, "--label_column species is not a column.*kind"),
        ({"label_column": "img"}, "--label_column img must hold one class for each image"),
        ({"dataset_name": "nowhere/at-all"}, "--dataset_name nowhere/at-all cannot be loaded"),
        ({"dataset_name": "digits", "dataset_split": "valid"}, r"--dataset_split valid: .*'train\[-10%:\]'.*Unknown"),
        (
            {"dataset_name": "digits", "dataset_split": "train[1,2]"},
            r"--dataset_split train\[1,2\]: the data set has 'train'",
        ),
        (
            {"dataset_name": "digits", "dataset_split": "train[2000:]"},
            r"no images in --dataset_split train\[2000:\]|size 0",
        ),
        ({"dataset_name": "digits", "dataset_config_name": "small"}, "no configurations"),
    ],
)
def test_wrong_columns_and_parts_are_named(parquet, options, message):
    options = {"dataset_name": parquet([picture((4, 4))]), **options}
    for read in (ImageDataset, lambda options: ImageStream(options, 5)):
        with pytest.raises(UserError, match=message):
            read(DataOptions(**options))


@pytest.mark.parametrize("split", ["train[:1500]", "train[1500:]", "train[-25%:]", "train[3:7]+train[:2]"])
def test_parts_of_a_split_are_those_of_datasets(split, tmp_path):
    """The digits are cut as a data set on the Hub is, and a parquet file too, whatever its split is called."""
    path = str(tmp_path / "digits.parquet")
    digits().to_parquet(path)
    theirs = datasets.load_dataset("parquet", data_files={"train": path}, split=split)
    named = split.replace("train", "test")
    for options in ({}, {"dataset_name": path}, {"dataset_name": path, "dataset_split": named}):
        data = ImageDataset(DataOptions(**{"label_column": "label", "dataset_split": split, **options}))
        images, labels = data[list(range(len(data)))]
        assert labels.tolist() == theirs["label"][:]
        assert torch.equal(images[-1, 0], torch.from_numpy(np.array(theirs[-1]["image"])))


def test_data_without_images_and_labels_of_any_whole_type(parquet, tmp_path):
    path = str(tmp_path / "notes.parquet")
    Dataset.from_dict({"note": ["x"]}).to_parquet(path)
    with pytest.raises(UserError, match="no column of images.*note"):
        ImageDataset(DataOptions(dataset_name=path))
    path = parquet([picture((4, 4))] * 2, [0, 6], Value("uint8"))
    data = ImageDataset(DataOptions(dataset_name=path, label_column="kind"))
    assert data.num_classes == 7 and data[[1]][1].tolist() == [6]


@pytest.mark.parametrize("value", [None, -1])
@pytest.mark.parametrize("kind", [Value("int64"), ClassLabel(names=["cat", "dog"])])
def test_images_without_a_class_are_refused(value, kind, parquet):
    path = parquet([picture((4, 4))] * 3, [0, value, 1], kind)
    options = DataOptions(dataset_name=path, label_column="kind")
    with pytest.raises(UserError, match="--label_column kind has no class .* for 1 of 3 images"):
        ImageDataset(options)
    message = "has no class .* for 1 of 3" if isinstance(kind, ClassLabel) else "holds plain numbers.*--num_classes"
    with pytest.raises(UserError, match=f"--label_column kind {message}"):
        next(stream_batches(ImageStream(options, 5), 3, 0, 0, 1, [0], 1, None, 0))


def test_sixteen_bits_are_scaled_and_transparency_is_white(parquet):
    deep = PILImage.fromarray(np.array([[0, 65535], [32896, 257]], dtype=np.uint16))
    images, _ = ImageDataset(DataOptions(dataset_name=parquet([deep])))[[0]]
    assert images.tolist() == [[[[0, 255], [128, 1]]]]
    clear = PILImage.fromarray(np.array([[[9, 9, 9, 0], [200, 0, 0, 255]]] * 2, dtype=np.uint8), "RGBA")
    images, _ = ImageDataset(DataOptions(dataset_name=parquet([clear])))[[0]]
    assert images[0, :, 0].T.tolist() == [[255, 255, 255], [200, 0, 0]]
    palette = clear.convert("RGB").convert("P")
    palette.info["transparency"] = palette.getpixel((1, 0))
    floats = PILImage.fromarray(np.zeros((2, 2), dtype=np.float32))
    data = ImageDataset(DataOptions(dataset_name=parquet([picture((2, 2))]), image_mode="L"))
    assert [data._fit(palette).getpixel((x, 0)) for x in (0, 1)] == [0, 255]
    with pytest.raises(UserError, match="32-bit gray"):
        data._fit(floats)


def gray_tiff(values, bits=16, polarity=1, order="<", upright=False):
    """A TIFF file of gray with 12 or 16 bits; with polarity 0 its highest value is black; `upright` says so in it."""
    values = np.array(values)
    if bits == 16:
        data = values.astype(order + "u2").tobytes()
    else:
        data = int("".join(f"{value:012b}" for value in values.flatten()), 2).to_bytes(values.size * 3 // 2, "big")
    height, width = values.shape
    short = {256: width, 257: height, 258: bits, 259: 1, 262: polarity, 278: height}
    if upright:
        short[274] = 1
    long = {273: 8 + 2 + (len(short) + 2) * 12 + 4, 279: len(data)}
    entries = b"".join(
        struct.pack(order + "HHI", tag, 3 if tag in short else 4, 1)
        + (struct.pack(order + "HH", short[tag], 0) if tag in short else struct.pack(order + "I", long[tag]))
        for tag in sorted(short | long)
    )
    return (
        {"<": b"II*\0", ">": b"MM\0*"}[order]
        + struct.pack(order + "IH", 8, len(short | long))
        + entries
        + bytes(4)
        + data
    )


DEEP = np.array([[0, 65535], [32896, 257]], dtype=np.uint16)


ON_ITS_SIDE = PILImage.Exif()
ON_ITS_SIDE[274] = 6  # how a camera says that the image stands on its side


def saved(image, kind, **options):
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


@pytest.mark.parametrize(
    "file",
    [
        saved(PILImage.fromarray(DEEP), "PNG"),
        saved(PILImage.fromarray(DEEP), "TIFF"),
        saved(PILImage.fromarray(DEEP.astype(np.int32)), "PPM"),
        b"P2 2 2 65535\n0 65535\n32896 257\n",
        gray_tiff(DEEP, order=">"),
        gray_tiff(65535 - DEEP, polarity=0),
        gray_tiff([[0, 4095], [2056, 16]], bits=12),
        gray_tiff(65535 - DEEP, polarity=0, upright=True),
        gray_tiff([[0, 4095], [2056, 16]], bits=12, upright=True),
        saved(PILImage.fromarray(np.rot90(DEEP).copy()), "PNG", exif=ON_ITS_SIDE),
    ],
    ids=["png", "tiff", "pgm", "plain pgm", "big-endian tiff", "white is zero", "12 bits"]
    + ["upright, white is zero", "upright, 12 bits", "png on its side"],
)
def test_gray_of_many_bits_is_scaled(file, tmp_path):
    pq.write_table(pa.table({"image": [file]}), tmp_path / "deep.parquet")
    images, _ = ImageDataset(DataOptions(dataset_name=str(tmp_path / "deep.parquet")))[[0]]
    assert images.tolist() == [[[[0, 255], [128, 1]]]]


# The first look -------------------------------------------------------------------------------------------------------


def both(options):
    """The data set at hand and streamed."""
    return ImageDataset(options), ImageStream(options, 5)


def test_one_image_in_color_makes_the_data_set_color(parquet, capfd):
    gray, color = PILImage.new("L", (4, 4), 9), picture((4, 4))
    for data in both(DataOptions(dataset_name=parquet([gray] + [color] * 8 + [gray]), label_column="kind")):
        assert (data.mode, data.channels, data.resolution) == ("RGB", 3, 4)
        assert data.decode([row[data.image_column] for row in data.source], [0] * 10, range(10))[0].shape[1] == 3
    out = capfd.readouterr().out
    assert out.count("Data: ") == 2
    assert "train: 10 images, 4x4 pixels, color, 3 classes, without an image for dog, eel." in out


def test_palettes_are_gray_or_color_by_their_colors(parquet):
    color = picture((4, 4)).quantize(8)
    gray = PILImage.new("P", (4, 4), 1)
    gray.putpalette([0, 0, 0, 7, 7, 7])
    cmyk = picture((4, 4), "CMYK")  # as TIFF
    for image, mode in ((gray, "L"), (color, "RGB"), (cmyk, "RGB"), (PILImage.new("LA", (4, 4)), "L")):
        data = ImageDataset(DataOptions(dataset_name=parquet([image])))
        assert data.mode == mode
    images, _ = ImageDataset(DataOptions(dataset_name=parquet([gray])))[[0]]
    assert images.tolist() == [[[[7] * 4] * 4]]


def test_images_that_differ_in_size_need_a_resolution(parquet):
    path = parquet([picture((12, 15))] + [picture((70, 64))] * 9)
    for read in (ImageDataset, lambda options: ImageStream(options, 5)):
        with pytest.raises(UserError, match=r"--resolution is needed.* 12 to 64 pixels, most often 64 \(9 images\)"):
            read(DataOptions(dataset_name=path))
        assert read(DataOptions(dataset_name=path, resolution=16)).resolution == 16
    path = parquet([picture((12, 15)), picture((20, 12))])  # the shorter side counts
    assert ImageDataset(DataOptions(dataset_name=path)).resolution == 12


def test_what_the_first_look_did_not_show_is_warned_of_once(parquet, capsys):
    """The 65th image of a stream and one of the 257th at hand: color in a gray data set, smaller than the others."""
    gray = PILImage.new("L", (4, 4), 3)
    unsaturated = gray.convert("RGB")  # loses nothing
    for count, data in ((70, lambda options: ImageStream(options, 5)), (514, ImageDataset)):
        rare = [unsaturated, picture((3, 4)), picture((2, 4))]
        places = [65, 67, 69] if count == 70 else [1, 3, 5]
        pictures = [gray] * count
        for place, image in zip(places, rare):
            pictures[place] = image
        path = parquet(pictures)
        for given in ({}, {"resolution": 4, "image_mode": "L"}):
            read = data(DataOptions(dataset_name=path, **given))
            rows = list(read.source)
            capsys.readouterr()
            for place in places:
                read.decode([rows[place]["img"]], None, [place])
            said = capsys.readouterr().err.splitlines()
            if given:
                assert said == []
            else:
                assert len(said) == 2 and all(f"Image {places[1]} of" in line for line in said)
                assert "enlarged from 3 to 4 pixels" in said[0] and "--resolution" in said[0]
                assert "loses its color" in said[1] and "--image_mode" in said[1]


@pytest.mark.parametrize("size", [(1, 1), (1, 9), (9, 1), (7, 3)])
def test_images_of_any_shape_are_made_square(size, parquet):
    for resolution in (None, 1, 4):
        data = ImageDataset(DataOptions(dataset_name=parquet([picture(size)]), resolution=resolution))
        assert data[[0]][0].shape == (1, 3, resolution or min(size), resolution or min(size))


def test_the_orientation_that_a_camera_noted_is_followed(tmp_path):
    left = PILImage.fromarray(np.repeat(np.array([[0, 255]], dtype=np.uint8), 2, axis=0))
    exif = PILImage.Exif()
    exif[274] = 6  # to be turned by 90 degrees to the right
    left.save(tmp_path / "0.png", exif=exif)
    for data in both(DataOptions(dataset_name=str(tmp_path))):
        row = next(iter(data.source))
        assert data.decode([row["image"]], None, [0])[0].tolist() == [[[[0, 0], [255, 255]]]]


# Columns --------------------------------------------------------------------------------------------------------------


def test_rows_without_an_image_are_counted(parquet):
    path = parquet([picture((4, 4)), picture((4, 4)), None, None])
    with pytest.raises(UserError, match=r"--image_column img has no image \(null\) in 2 of 4 rows, the first in row 2"):
        ImageDataset(DataOptions(dataset_name=path))
    with pytest.raises(UserError, match="in 2 of 4 rows, the first in row 2"):
        ImageStream(DataOptions(dataset_name=path), 5)
    path = parquet([picture((4, 4))] * 70 + [None])  # later than the first look
    for workers in (0, 2):
        batches = stream_batches(ImageStream(DataOptions(dataset_name=path), 4), 5, 0, 0, 20, [0], 1, None, workers)
        with pytest.raises(UserError, match="the first in row 70"):
            list(batches)
    pq.write_table(pa.table({"x": [{"bytes": saved(picture((4, 4)), "PNG"), "path": "a"}, {}]}), path)
    for read in (ImageDataset, lambda options: ImageStream(options, 5)):  # no null, but a pair of them
        with pytest.raises(UserError, match="in 1 of 2 rows, the first in row 1"):
            read(DataOptions(dataset_name=path))


@pytest.mark.parametrize("kind", ["binary", "large_binary", "struct", "bytes alone", "large struct"])
def test_bytes_of_image_files_are_images(kind, tmp_path):
    pictures = [picture((4, 4), seed=seed) for seed in range(3)]
    files, path = [saved(each, "PNG") for each in pictures], str(tmp_path / "files.parquet")
    column = pa.array(files, pa.large_binary() if kind == "large_binary" else pa.binary())
    if "struct" in kind or "alone" in kind:
        fields = {"bytes": pa.large_binary() if "large" in kind else pa.binary(), "path": pa.string()}
        rows = [{"bytes": file, "path": f"{index}.png"} for index, file in enumerate(files)]
        column = pa.array(rows, pa.struct({k: v for k, v in fields.items() if k == "bytes" or kind != "bytes alone"}))
    pq.write_table(pa.table({"photo": column, "hash": pa.array([b"1", b"2", b"3"]), "label": [0, 1, 2]}), path)
    for read in (ImageDataset, lambda options: ImageStream(options, 5)):
        with pytest.raises(UserError, match="--image_column is needed: .*photo, hash"):
            read(DataOptions(dataset_name=path))
        with pytest.raises(UserError, match="(?s)Image 0 of .*--image_column hash must hold image files.*Unidentified"):
            read(DataOptions(dataset_name=path, image_column="hash"))
        data = read(DataOptions(dataset_name=path, image_column="photo"))
        images, _ = data.decode([row["photo"] for row in data.source], None, range(3))
        np.testing.assert_array_equal(images[2].permute(1, 2, 0), np.asarray(pictures[2]))


def test_paths_and_addresses_are_no_images(tmp_path):
    path = str(tmp_path / "paths.parquet")
    pq.write_table(pa.table({"url": ["https://example.com/a.png"], "several": [[b"x"]]}), path)
    for given in ({}, {"image_column": "url"}, {"image_column": "several"}):
        with pytest.raises(UserError, match=r"paths or addresses|url holds no images but text|no images but List"):
            ImageDataset(DataOptions(dataset_name=path, **given))


def test_names_of_classes_are_classes(parquet):
    path = parquet([picture((4, 4))] * 4, ["eel", "cat", "eel", "ant"], Value("string"))
    options = DataOptions(dataset_name=path, label_column="kind")
    data = ImageDataset(options)
    assert data.id2label == {0: "ant", 1: "cat", 2: "eel"} and data.num_classes == 3
    assert data.labels().tolist() == [2, 1, 2, 0] == data[[0, 1, 2, 3]][1].tolist()
    with pytest.raises(UserError, match="--label_column kind holds text.*ClassLabel there, or leave out --streaming"):
        ImageStream(options, 5)
    with pytest.raises(UserError, match="no class .* for 1 of 2 images"):
        ImageDataset(
            DataOptions(dataset_name=parquet([picture((4, 4))] * 2, ["a", None], Value("string")), label_column="kind")
        )


@pytest.mark.parametrize(
    "labels, kind, expected",
    [
        ([False, True], "bool", [0, 1]),
        ([0.0, 2.0], "float64", [0, 2]),
        ([0.0, 0.5], "float32", "(?s)--label_column kind .* must be a whole number.*0.5"),
        ([0.0, float("nan")], "float32", "(?s)--label_column kind .* must be a whole number.*nan"),
        ([[0], [1, 2]], List(Value("int64")), "--label_column kind must hold one class for each image"),
    ],
)
def test_classes_of_other_types(labels, kind, expected, parquet):
    kind = Value(kind) if isinstance(kind, str) else kind
    options = DataOptions(dataset_name=parquet([picture((4, 4))] * 2, labels, kind), label_column="kind")
    if isinstance(expected, list):
        assert ImageDataset(options).labels().tolist() == expected
    else:
        with pytest.raises(UserError, match=expected):
            ImageDataset(options)


def test_the_cause_of_a_failure_is_said(tmp_path):
    for name in "ab":
        Dataset.from_dict({"image": [picture((4, 4))], name: [1]}).to_parquet(tmp_path / f"train-{name}.parquet")
    with pytest.raises(UserError, match="Cause: CastError: .*because column names don't match"):
        ImageDataset(DataOptions(dataset_name=str(tmp_path)))
    error = RuntimeError("it failed")
    error.__cause__ = OSError("no file")
    error.__cause__.__cause__ = AssertionError()
    assert error_text(error) == "RuntimeError: it failed. Cause: OSError: no file. Cause: AssertionError"
    error.__cause__ = OSError("it failed")  # says nothing new
    assert error_text(error) == "RuntimeError: it failed"
    assert error_text(ValueError(f"{'a' * 600} at last")).endswith("aaa at last")


# Folders and archives -------------------------------------------------------------------------------------------------


def write_images(folder, names):
    """Images of 2x2 pixels whose gray is their place in the list."""
    for index, name in enumerate(names):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        PILImage.new("L", (2, 2), index).save(folder / name)


@pytest.mark.parametrize(
    "names, classes",
    [
        (["train/cat/0.png", "test/dog/1.png"], {0: "cat", 1: "dog"}),  # splits with one class each
        (["train/cat/0.png", "train/cat/1.png"], {0: "cat"}),
        (["train/cat/0.png", "train/dog/1.png", "test/2.png"], None),
        (["train/0.png", "test/1.png"], None),  # the splits are no classes
        (["0.png", "1.png"], None),
        (["cat/0.png", "cat/young/1.png"], None),
    ],
)
def test_folders_are_classes_in_every_split(names, classes, tmp_path):
    write_images(tmp_path, names)
    options = DataOptions(dataset_name=str(tmp_path), label_column="label")
    for read in (ImageDataset, lambda options: ImageStream(options, 5)):
        if classes is None:
            with pytest.raises(UserError, match="folders are not one for each class.*train/CLASS/IMAGE"):
                read(options)
        else:
            data = read(options)
            assert data.id2label == classes and next(iter(data.source))["label"] == 0
    assert ImageDataset(DataOptions(dataset_name=str(tmp_path))).num_classes is None


TOOL_NAMES = [f"{index // 4:05}/img{index:08}.png" for index in range(7)]


@pytest.fixture
def tool_output(tmp_path):
    """A function that writes what NVIDIA's dataset_tool writes, as a folder or .zip file; the class is i mod 3."""

    def write(archive, content=None, names=TOOL_NAMES):
        folder, path = tmp_path / "data", tmp_path / "data.zip"
        write_images(folder, names)
        if content is None:
            content = {"labels": [[name, index % 3] for index, name in enumerate(TOOL_NAMES)]}
        (folder / "dataset.json").write_text(content if isinstance(content, str) else json.dumps(content))
        if not archive:
            return str(folder)
        with zipfile.ZipFile(path, "w") as file:
            for each in reversed(sorted(folder.rglob("*.*"))):
                file.write(each, each.relative_to(folder).as_posix())
            file.writestr("__MACOSX/00000/._img00000000.png", b"no image")
        return str(path)

    return write


@pytest.mark.parametrize("archive", [False, True])
def test_output_of_the_dataset_tool_has_its_own_classes(archive, tool_output):
    path = tool_output(archive)
    options = DataOptions(dataset_name=path, label_column="label")
    data = ImageDataset(options)
    assert (len(data), data.num_classes) == (7, 3) and data.labels().tolist() == [0, 1, 2, 0, 1, 2, 0]
    for workers in (0, 2):
        batches = load_batches(data, [[6, 0], [3, 5], [1, 2], [4, 0]], workers, False)
        assert [images[:, 0, 1, 1].tolist() for images, _, _ in batches] == [[6, 0], [3, 5], [1, 2], [4, 0]]
    part = ImageDataset(DataOptions(dataset_name=path, label_column="label", dataset_split="train[4:]"))
    assert part.num_classes == 3 and part[[0, 2]][0][:, 0, 0, 0].tolist() == [4, 6]
    assert ImageDataset(DataOptions(dataset_name=path)).num_classes is None
    whole, positions = drawn(options)
    assert sorted(sum(whole, [])[:7]) == list(range(7)) and drawn(options, workers=2)[0] == whole
    assert drawn(options, first=5, position=positions[4])[0] == whole[5:]
    with pytest.raises(UserError, match="no configurations"):
        ImageDataset(DataOptions(dataset_name=path, dataset_config_name="x"))


@pytest.mark.parametrize("archive", [False, True])
@pytest.mark.parametrize(
    "content, message",
    [
        ({"labels": None}, "--label_column: .*dataset.json is missing or has no labels"),
        ({"labels": [[name, 0] for name in TOOL_NAMES[2:]]}, f"no entry for 2 of 7 images, such as {TOOL_NAMES[0]}"),
        ({"labels": [["../secret.png", 0]]}, r"names 1 files that are not there, such as \.\./secret.png"),
        ({"labels": [[name, 0] for name in TOOL_NAMES * 2]}, "7 files more than once"),
        ({"labels": [[name, [0.1, 0.2]] for name in TOOL_NAMES]}, "pairs of a file name and a class"),
        ({"labels": [[name, -1] for name in TOOL_NAMES]}, "pairs of a file name and a class"),
        ('{"labels": [["00000/im', "(?s)dataset.json cannot be loaded.*JSONDecodeError"),
    ],
)
def test_labels_that_do_not_fit_the_images_are_refused(archive, content, message, tool_output, tmp_path):
    write_images(tmp_path, ["secret.png"])
    path = tool_output(archive, content)
    for read in (ImageDataset, lambda options: ImageStream(options, 5)):
        with pytest.raises(UserError, match=message):
            read(DataOptions(dataset_name=path, label_column="label"))
    if "no entry" in message:
        assert len(ImageDataset(DataOptions(dataset_name=path))) == 7  # which needs no classes


def test_each_process_opens_an_archive_itself(tool_output):
    path = tool_output(True)
    data = ImageDataset(DataOptions(dataset_name=path))
    archive_of(path).close()  # that of this process
    ((images, _, _),) = load_batches(data, [[1, 2]], 1, False)
    assert images[:, 0, 0, 0].tolist() == [1, 2]


def test_a_damaged_archive_names_the_image(tool_output):
    path = tool_output(True)
    with zipfile.ZipFile(path) as archive:
        place = archive.getinfo(TOOL_NAMES[3]).header_offset
    with open(path, "r+b") as file:
        file.seek(place + 30 + len(TOOL_NAMES[3]) + 50)
        file.write(b"damaged!")
    with pytest.raises(UserError, match=f"(?s)Image .*{TOOL_NAMES[3]}.* cannot be loaded.*BadZipFile: Bad CRC"):
        ImageDataset(DataOptions(dataset_name=path))


@pytest.mark.parametrize("split", ["test", "test[1:]", "test[:1]+train[:1]"])
def test_what_save_to_disk_wrote_is_read(split, tmp_path):
    kind = ClassLabel(names=["cat", "dog"])
    features = Features({"image": Image(), "kind": kind})
    train, test = (
        Dataset.from_dict({"image": [picture((4, 4), seed=seed)] * 2, "kind": [0, 1]}, features=features)
        for seed in (0, 1)
    )
    DatasetDict(train=train, test=test).save_to_disk(tmp_path / "two")
    test.save_to_disk(tmp_path / "one")
    numbers = {"test": [1, 1], "test[1:]": [1], "test[:1]+train[:1]": [1, 0]}[split]
    options = DataOptions(dataset_name=str(tmp_path / "two"), label_column="kind", dataset_split=split)
    for data in both(options):
        images, _ = data.decode([row["image"] for row in data.source], [0] * len(numbers), numbers)
        for image, number in zip(images, numbers, strict=True):
            np.testing.assert_array_equal(image.permute(1, 2, 0), np.asarray(picture((4, 4), seed=number)))
    if "+" not in split:  # a folder without names of splits counts as that which is asked for
        alone = ImageDataset(DataOptions(dataset_name=str(tmp_path / "one"), label_column="kind", dataset_split=split))
        assert alone.labels().tolist() == [0, 1][-len(numbers) :]
    with pytest.raises(UserError, match="--dataset_split valid: the data set has 'train' and 'test'"):
        ImageDataset(DataOptions(dataset_name=str(tmp_path / "two"), dataset_split="valid"))


def test_order_depends_on_seed_and_step_alone():
    def indices(batch_size, num_parts, first=0, seed=0):
        batches = step_indices(10, batch_size, seed, first, 6, list(range(num_parts)), num_parts)
        return [index for batch in batches for index in batch]

    whole = indices(8, 1)
    assert indices(4, 2) == whole  # two processes or two accumulation steps
    assert indices(8, 1, first=3) == whole[24:]  # resumed
    assert sorted(whole[:10]) == list(range(10)) and sorted(whole[10:20]) == list(range(10))  # epochs, none left out
    assert whole[:10] != whole[10:20] and indices(8, 1, seed=1) != whole
    share = list(step_indices(10, 4, 0, 0, 2, [1], 2))  # of the second of two processes
    assert share == [whole[4:8], whole[12:16]]


# Streams --------------------------------------------------------------------------------------------------------------


@pytest.fixture
def numbered(parquet):
    """Options of 23 images whose gray is their number; their class is that modulo 3."""
    path = parquet([PILImage.new("L", (2, 2), index) for index in range(23)], [index % 3 for index in range(23)])
    return DataOptions(dataset_name=path, label_column="kind")


def drawn(options, batch_size=4, parts=(0,), num_parts=1, first=0, last=12, position=None, window=5, workers=0, seed=0):
    """Numbers of the images of each batch, and the positions."""
    stream = ImageStream(options, window)
    given = (batch_size, seed, first, last, list(parts), num_parts, position, workers)
    numbers, positions = [], []
    for images, labels, at in stream_batches(stream, *given):
        numbers.append(images[:, 0, 0, 0].tolist())
        assert labels.tolist() == [number % 3 for number in numbers[-1]]
        positions.append(at)
    return numbers, positions


def test_a_stream_is_shuffled_in_windows_and_has_every_image_once_an_epoch(numbered):
    whole, _ = drawn(numbered)
    order = [number for batch in whole for number in batch]
    assert len(order) == 48
    for epoch in range(2):
        for begin in range(0, 23, 5):
            window = order[23 * epoch + begin : 23 * epoch + min(begin + 5, 23)]
            assert sorted(window) == list(range(begin, min(begin + 5, 23)))
    assert order[:23] != sorted(order[:23]) and order[:23] != order[23:46]
    for seed in (1, 20261231, 2**31 - 1):
        other = [number for batch in drawn(numbered, seed=seed)[0] for number in batch]
        assert other != order and sorted(other[:23]) == list(range(23))
    stream = ImageStream(numbered, 5)
    assert (stream.mode, stream.resolution, stream.num_classes, stream.id2label[2]) == ("L", 2, 3, "eel")


def test_a_stream_is_resumed_at_any_step(numbered, tmp_path):
    whole, positions = drawn(numbered)
    for step in range(1, 12):
        torch.save(positions[step - 1], tmp_path / "position")
        position = torch.load(tmp_path / "position", weights_only=True)
        assert drawn(numbered, first=step, position=position)[0] == whole[step:]
        assert 4 * step - position["first"] <= 5 + 4  # no more than a window is read again
    position = None
    for step in range(12):  # resumed after each step
        [batch], [position] = drawn(numbered, first=step, last=step + 1, position=position)
        assert batch == whole[step]


def test_a_version_of_datasets_that_loses_its_place_is_refused(numbered, monkeypatch):
    monkeypatch.setattr("datasets.__version__", "5.0.0")
    with pytest.raises(UserError, match="datasets 5.0.0"):
        ImageStream(numbered, 5)


def test_processes_accumulation_and_threads_share_a_stream(numbered):
    whole = [number for batch in drawn(numbered)[0] for number in batch]
    shares = [drawn(numbered, 2, (part,), 2) for part in (0, 1)]
    together = [number for pair in zip(shares[0][0], shares[1][0]) for batch in pair for number in batch]
    assert together == whole
    assert [number for batch in drawn(numbered, 2, (0, 1), 2)[0] for number in batch] == whole
    assert drawn(numbered, workers=2)[0] == drawn(numbered)[0]
    resumed, _ = drawn(numbered, 2, (1,), 2, first=5, position=shares[0][1][4])  # by the place of the first process
    assert resumed == shares[1][0][5:]


def test_a_folder_is_read_and_streamed(tmp_path):
    for index in range(7):
        folder = tmp_path / ("cat", "dog")[index % 2]
        folder.mkdir(exist_ok=True)
        PILImage.new("L", (2, 2), index).save(folder / f"{index}.png")
    options = DataOptions(dataset_name=str(tmp_path), label_column="label")
    dataset, stream = ImageDataset(options), ImageStream(options, 100)
    (streamed,) = stream_batches(stream, 7, 0, 0, 1, [0], 1, None, 0)
    for images, labels in (streamed[:2], dataset[list(range(7))]):
        numbers = images[:, 0, 0, 0].tolist()
        assert sorted(numbers) == list(range(7)) and labels.tolist() == [number % 2 for number in numbers]
    assert dataset.id2label == stream.id2label == {0: "cat", 1: "dog"}


def test_an_image_that_cannot_be_read_is_named(tmp_path):
    path, files = str(tmp_path / "broken.parquet"), [{"bytes": b"no image", "path": f"{name}.png"} for name in "ab"]
    picture((4, 4)).save(tmp_path / "a.png")
    files[0]["bytes"] = (tmp_path / "a.png").read_bytes()
    features = Features({"img": Image(decode=False)})
    Dataset.from_dict({"img": files}, features=features).cast_column("img", Image()).to_parquet(path)
    options = DataOptions(dataset_name=path)
    with pytest.raises(UserError, match=r"Image 1 \(b.png\) of the data set cannot be loaded"):
        ImageDataset(options)[[0, 1]]
    with pytest.raises(UserError, match=r"Image 1 \(b.png\) of the data set cannot be loaded"):
        next(stream_batches(ImageStream(options, 5), 2, 0, 0, 1, [0], 1, None, 0))


def test_reading_ahead_passes_errors_on_and_ends_its_thread():
    def numbers():
        try:
            yield from range(3)
            raise ValueError("no more")
        finally:
            ended.append(True)

    ended = []
    made = ahead(numbers(), 1)
    assert [next(made) for _ in range(3)] == [0, 1, 2]
    with pytest.raises(ValueError, match="no more"):
        next(made)
    made = ahead(numbers(), 1)
    next(made)
    made.close()
    assert ended == [True, True]
