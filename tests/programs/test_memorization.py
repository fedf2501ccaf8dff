"""Nearest training images against brute force, and the program on models that repeat images and that do not."""

import json

import numpy as np
import pytest
import torch
from datasets import ClassLabel, Dataset, Features, Image
from diffusers import UNet2DModel
from PIL import Image as PILImage

from diffusers_ctm import CTMPipeline, CTMScheduler, CTMUNet2DModel, EDMHeunScheduler
from helpers.tiny_networks import make_unet_2d
from training import memorization as memorisation
from training.cli.errors import UserError
from training.cli.options import parse_config
from training.cli.shared_options import DataOptions
from training.data.images import ImageDataset
from training.measure.neighbors import Pixels, find_neighbours
from training.memorization import MemorisationConfig


GREY = 133  # the first image, and what the model that repeats makes, up to rounding
SIGMA_DATA = 0.3


def save_parquet(path, pixels):
    """Images (n, 8, 8, 3) as the split train of a file, labels in turn."""
    schema = Features({"image": Image(), "label": ClassLabel(names=["a", "b"])})
    columns = {"image": [PILImage.fromarray(image) for image in pixels], "label": [i % 2 for i in range(len(pixels))]}
    Dataset.from_dict(columns, features=schema).to_parquet(str(path))


def gaussian(count, seed):
    pixels = np.random.default_rng(seed).normal(0, SIGMA_DATA, (count, 8, 8, 3))
    return np.clip(np.round((pixels + 1) * 127.5), 0, 255).astype(np.uint8)


def save_model(folder, sigma_data, ctm=True, bias=0.0):
    """With F = bias: for sigma_data 0.3 exact for the data, for a tiny sigma_data always the same image."""
    unet = make_unet_2d(CTMUNet2DModel if ctm else UNet2DModel, random=False)
    torch.nn.init.zeros_(unet.conv_out.weight)
    torch.nn.init.constant_(unet.conv_out.bias, bias)
    scheduler = (CTMScheduler if ctm else EDMHeunScheduler)(sigma_data=sigma_data, sigma_max=2.0)
    CTMPipeline(unet, scheduler).save_pretrained(str(folder))
    return str(folder)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """A folder with the splits train (200 images, the first of them grey) and test (100)."""
    folder = tmp_path_factory.mktemp("data")
    train = gaussian(200, 0)
    train[0] = GREY
    save_parquet(folder / "train-0.parquet", train)
    save_parquet(folder / "test-0.parquet", gaussian(100, 1))
    return str(folder)


@pytest.mark.parametrize("mirror", [False, True])
@pytest.mark.parametrize("batch_size", [7, 200])
def test_nearest_two_are_those_of_brute_force(data, mirror, batch_size):
    dataset = ImageDataset(DataOptions(dataset_name=data))
    images, _ = dataset[list(range(200))]
    ramp = (30 * torch.arange(8)).to(torch.uint8).expand(1, 3, 8, 8)
    queries = torch.cat([images[[3, 50]], images[[9]].flip(-1), ramp])
    itself = torch.tensor([3, 50, 9, 17])
    found = find_neighbours(
        {"free": (queries, None), "others": (queries, itself)}, dataset, Pixels(), mirror, batch_size
    )
    for name, group in found.items():
        for i, query in enumerate(queries.double()):
            distances = []
            for j, image in enumerate(images.double()):
                both = [(query - image).square().mean().sqrt().item()]
                both += [(query - image.flip(-1)).square().mean().sqrt().item()] if mirror else []
                distances.append((min(both), j, both.index(min(both)) == 1))
            if name == "others":
                del distances[itself[i]]
            first, second = sorted(distances)[:2]
            torch.testing.assert_close(
                group.distances[i], torch.tensor([first[0], second[0]]).double(), rtol=1e-6, atol=1e-5
            )
            assert (group.indices[i], group.mirrored[i]) == first[1:]
    assert found["free"].indices[:2].tolist() == [3, 50] and found["free"].copies[:2].all()
    assert (found["free"].indices[2] == 9 and found["free"].copies[2]) == mirror
    assert not found["others"].copies[:3].any()


def test_copies_are_those_nearer_than_a_third_of_the_second_nearest():
    neighbours = memorisation.Neighbours(
        torch.tensor([[1.0, 3.1], [1.0, 2.9], [0.0, 5.0], [4.0, 4.0]]), torch.zeros(4), torch.zeros(4)
    )
    assert neighbours.copies.tolist() == [True, False, True, False]
    assert neighbours.summary() == {"median": 1.0, "percentile_5": pytest.approx(0.15), "min": 0.0, "copies": 0.5}


def test_a_model_that_repeats_is_told_from_one_that_knows_the_distribution(data, tmp_path):
    options = {"dataset_name": data, "num_samples": 100, "held_out_split": "test", "num_pictures": 3}
    bias = (GREY / 127.5 - 1) / 1e-3  # g = c_out F, and c_out is sigma_data at high noise
    copier = save_model(tmp_path / "copier", 1e-3, bias=bias)
    exact = save_model(tmp_path / "exact", SIGMA_DATA, ctm=False)
    report = memorisation.main(
        MemorisationConfig(model=copier, teacher=exact, output_dir=str(tmp_path / "out"), **options)
    )
    rows = {row["name"]: row["pixels"] for row in report["results"]}
    assert rows["1 step"]["copies"] == rows["18 steps, gamma 0"]["copies"] == 1.0
    assert rows["1 step"]["median"] < 1
    assert rows["teacher, Heun 18"]["copies"] == rows["held-out images"]["copies"] == 0
    seen, unseen = rows["training images, each without itself"]["median"], rows["held-out images"]["median"]
    assert rows["teacher, Heun 18"]["median"] == pytest.approx(unseen, rel=0.03)
    assert seen == pytest.approx(unseen, rel=0.03)  # leaving one out stands for images held out

    assert json.loads((tmp_path / "out" / "memorisation.json").read_text())["results"] == report["results"]
    table = (tmp_path / "out" / "memorisation.md").read_text()
    assert "100.0%" in table and "held-out images (100)" in table
    with PILImage.open(tmp_path / "out" / "memorisation.png") as picture:
        assert picture.size[0] > 2 * 3 * 48


def test_features_are_measured_beside_pixels(data, tmp_path):
    model = save_model(tmp_path / "model", SIGMA_DATA)
    options = {"dataset_name": data, "num_samples": 20, "steps": [1], "features": "digits", "random_flip": True}
    report = memorisation.main(MemorisationConfig(model=model, output_dir=str(tmp_path / "out"), **options))
    assert all({"pixels", "features"} <= set(row) for row in report["results"])
    assert report["results"][0]["features"] != report["results"][0]["pixels"]
    assert "mirror" in (tmp_path / "out" / "memorisation.md").read_text()


def test_what_cannot_be_measured_is_refused(data, tmp_path, capsys):
    with pytest.raises(UserError, match="--model is needed"):
        MemorisationConfig(dataset_name=data)
    with pytest.raises(SystemExit):
        parse_config(MemorisationConfig, ["--model", "m", "--gamma", "2"])
    assert "--gamma" in capsys.readouterr().err
    save_parquet(tmp_path / "two.parquet", gaussian(2, 0))
    with pytest.raises(UserError, match="3 or more"):
        memorisation.main(MemorisationConfig(model="m", dataset_name=str(tmp_path / "two.parquet")))
