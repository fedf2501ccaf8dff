import numpy as np
import pytest
import torch
from datasets import ClassLabel, Dataset, Features, Image, Value
from PIL import Image as PILImage

from training.config import DataOptions, UserError
from training.data import ImageDataset, StepSampler, to_sample


def picture(size, mode="RGB", seed=0):
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    return PILImage.fromarray(pixels).convert(mode)


@pytest.fixture
def parquet(tmp_path):
    """A function that writes pictures, labels and a name to a parquet file."""

    def write(pictures, labels=None, **columns):
        features = {"img": Image(), **{name: Value("string") for name in columns}}
        values = {"img": pictures, **columns}
        if labels is not None:
            features["kind"] = ClassLabel(names=["cat", "dog", "eel"])
            values["kind"] = labels
        path = str(tmp_path / "data.parquet")
        Dataset.from_dict(values, features=Features(features)).to_parquet(path)
        return path

    return write


def test_digits_are_all_there_with_their_grey_levels():
    from sklearn.datasets import load_digits

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


def test_local_folder_of_images(tmp_path):
    for name in ("a", "b"):
        (tmp_path / "train" / name).mkdir(parents=True)
        picture((5, 5)).save(tmp_path / "train" / name / "1.png")
    data = ImageDataset(DataOptions(dataset_name=str(tmp_path), label_column="label"))
    assert len(data) == 2 and data.id2label == {0: "a", 1: "b"}


def test_images_are_scaled_and_cropped_to_the_centre(parquet):
    wide = PILImage.new("RGB", (12, 6), "black")
    wide.paste((255, 255, 255), (3, 0, 9, 6))  # the centre square is white
    data = ImageDataset(DataOptions(dataset_name=parquet([wide]), resolution=3, image_mode="L"))
    images, labels = data[[0]]
    assert images.shape == (1, 1, 3, 3) and images.min() == 255 and labels is None


@pytest.mark.parametrize(
    "options, message",
    [
        ({"image_column": "photo"}, "--image_column photo is not a column.*img"),
        ({"image_column": "note"}, "--image_column note holds no images"),
        ({"label_column": "species"}, "--label_column species is not a column.*kind"),
        ({"label_column": "note"}, "--label_column note must hold"),
        ({"dataset_split": "test"}, "--dataset_name"),
        ({"dataset_name": "digits", "dataset_split": "train[:9]"}, "digits has the split 'train' only"),
        ({"dataset_name": "digits", "dataset_config_name": "small"}, "no configurations"),
    ],
)
def test_wrong_columns_are_named(parquet, options, message):
    path = parquet([picture((4, 4))], [1], note=["x"])
    options = {"dataset_name": path, **options}
    if options.get("dataset_split") == "test":
        options["dataset_name"] = "nowhere/at-all"
    with pytest.raises(UserError, match=message):
        ImageDataset(DataOptions(**options))


def test_data_without_images_and_labels_of_any_whole_type(tmp_path):
    path = str(tmp_path / "data.parquet")
    Dataset.from_dict({"note": ["x"]}).to_parquet(path)
    with pytest.raises(UserError, match="no column of images.*note"):
        ImageDataset(DataOptions(dataset_name=path))
    features = Features({"img": Image(), "kind": Value("uint8")})
    Dataset.from_dict({"img": [picture((4, 4))] * 2, "kind": [0, 6]}, features=features).to_parquet(path)
    data = ImageDataset(DataOptions(dataset_name=path, label_column="kind"))
    assert data.num_classes == 7 and data[[1]][1].tolist() == [6]


@pytest.mark.parametrize("value", [None, -1])
def test_images_without_a_class_are_refused(tmp_path, value):
    path = str(tmp_path / "data.parquet")
    for kind in (Value("int64"), ClassLabel(names=["cat", "dog"])):
        features = Features({"img": Image(), "kind": kind})
        Dataset.from_dict({"img": [picture((4, 4))] * 3, "kind": [0, value, 1]}, features=features).to_parquet(path)
        with pytest.raises(UserError, match="--label_column kind has no class .* for 1 of 3 images"):
            ImageDataset(DataOptions(dataset_name=path, label_column="kind"))


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
    with pytest.raises(UserError, match="32-bit grey"):
        data._fit(floats)


def test_order_depends_on_seed_and_step_alone():
    def indices(batch_size, num_parts, first=0, last=6, seed=0):
        parts = list(range(num_parts))
        batches = list(StepSampler(10, batch_size, seed, first, last, parts, num_parts))
        return [i for batch in batches for i in batch]

    whole = indices(8, 1)
    assert indices(4, 2) == whole  # two processes or two accumulation steps
    assert indices(8, 1, first=3) == whole[24:]  # resumed
    assert sorted(whole[:10]) == list(range(10)) and sorted(whole[10:20]) == list(range(10))  # epochs, none left out
    assert whole[:10] != whole[10:20] and indices(8, 1, seed=1) != whole
    own = list(StepSampler(10, 4, 0, 0, 2, [1], 2))  # what the second of two processes gets
    assert own[0] == whole[4:8] and own[1] == whole[12:16]
