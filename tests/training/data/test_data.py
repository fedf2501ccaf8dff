# Copyright 2026 The diffusers-ctm authors. Licensed under the Apache License, Version 2.0.
"""Images of any source and mode at one size, and the order in which a run reads them."""

import datasets
import numpy as np
import pytest
import torch
from datasets import ClassLabel, Dataset, Features, Image, Value
from PIL import Image as PILImage
from PIL import ImageFilter
from sklearn.datasets import load_digits

from training.cli.errors import UserError
from training.cli.shared_options import DataOptions
from training.data.batches import step_indices
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
        ({"label_column": "note"}, "--label_column note must hold"),
        ({"dataset_name": "nowhere/at-all"}, "--dataset_name nowhere/at-all cannot be loaded"),
        ({"dataset_name": "digits", "dataset_split": "valid"}, r"--dataset_split valid: .*'train\[-10%:\]'.*Unknown"),
        ({"dataset_name": "digits", "dataset_split": "train[1,2]"}, r"--dataset_split train\[1,2\]: the digits have"),
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
    assert order != [number for batch in drawn(numbered, seed=1)[0] for number in batch]
    stream = ImageStream(numbered, 5)
    assert (stream.mode, stream.resolution, stream.num_classes, stream.id2label[2]) == ("L", 2, 3, "eel")


def test_a_stream_is_resumed_at_any_step(numbered, tmp_path):
    whole, positions = drawn(numbered)
    for step in range(1, 12):
        torch.save(positions[step - 1], tmp_path / "position")
        position = torch.load(tmp_path / "position", weights_only=True)
        assert drawn(numbered, first=step, position=position)[0] == whole[step:]
        assert 4 * step - position["first"] <= 5 + 4  # no more than a window is read again


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
    with pytest.raises(UserError, match="Image 1 of the data set cannot be loaded"):
        ImageDataset(options)[[0, 1]]
    with pytest.raises(UserError, match="Image b.png of the data set cannot be loaded"):
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
