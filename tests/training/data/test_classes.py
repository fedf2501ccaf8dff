# Copyright 2026 The diffusers-ctm authors. Licensed under the Apache License, Version 2.0.
"""Classes of data sets and networks that number them differently, and classes without images."""

import pytest
import torch
from datasets import ClassLabel, Dataset, Features, Image, Value
from diffusers import DiffusionPipeline
from PIL import Image as PILImage

from diffusers_ctm import CTMPipeline, CTMScheduler, CTMUNet2DModel
from diffusers_ctm.class_labels import label_ids
from helpers.runs import NETWORK, fresh_accelerate  # noqa: F401
from training import likelihood, train_ctm, train_edm
from training.cli.errors import UserError
from training.cli.shared_options import DataOptions
from training.data.classes import numbers_by_name
from training.data.images import ImageDataset
from training.data.sources import digits
from training.data.stream import ImageStream
from training.likelihood import LikelihoodConfig
from training.train_ctm import CTMConfig
from training.train_edm import EDMConfig


CTM, EDM = "assets/digits-ctm", "assets/digits-edm"

QUIET = {"report_to": "none", "sample_every": 0, "checkpointing_steps": 0, "max_train_steps": 1, "train_batch_size": 4}


def numbered(names, of_network, used=None, num_classes=None):
    of_network = of_network and dict(enumerate(of_network))
    count = num_classes or len(of_network)
    return list(numbers_by_name(dict(enumerate(names)), count, of_network, used, "--model").values())


@pytest.mark.parametrize(
    "names, of_network, numbers",
    [
        (["7", "8", "9"], [str(i) for i in range(10)], [7, 8, 9]),
        (["dog", "cat"], ["cat", "dog", "eel"], [1, 0]),
        (["Dog", "CAT"], ["cat", "dog", "eel"], [1, 0]),
        (["a", "A"], ["A", "a"], [1, 0]),  # the case counts where it tells classes apart
        (["crane", "jay", "crane"], ["crane", "jay", "crane"], [0, 1, 2]),  # as two classes of ImageNet
        (["0", "1", "10", "2"], [f"kind {i}" for i in range(12)], [0, 1, 10, 2]),  # folders, sorted as text
    ],
)
def test_classes_are_found_by_name(names, of_network, numbers):
    assert numbered(names, of_network) == numbers


def test_numbers_as_names_are_the_numbers_of_a_network_without_names():
    assert numbered(["7", "8", "9"], None, num_classes=10) == [7, 8, 9]
    assert numbered(["07", "08"], None, num_classes=10) == [7, 8]
    assert numbered(["cat", "dog"], None, num_classes=10) == [0, 1]
    assert numbered(["2019", "2020"], None, num_classes=10) == [0, 1]  # these are names


def test_names_that_the_network_lacks_are_listed():
    with pytest.raises(UserError, match="--model has no class fox, yak, which the data set has. It knows cat, dog"):
        numbered(["cat", "fox", "yak"], ["cat", "dog"])
    assert numbered(["cat", "fox"], ["dog", "cat"], used=[0]) == [1, -1]  # a class without images does no harm
    with pytest.raises(UserError, match="no class a0, a1.* and 8 more, which"):
        numbered([f"a{i}" for i in range(20)], ["cat"])


@pytest.mark.parametrize(
    "names, of_network", [(["jay", "crane"], ["crane", "jay", "crane"]), (["cat", "Cat"], ["cat"])]
)
def test_names_that_do_not_tell_the_class(names, of_network):
    with pytest.raises(UserError, match="do not tell which classes of --model they are"):
        numbered(names, of_network)


def test_a_name_of_several_classes_is_no_class_to_sample():
    names = {0: "A", 1: "a", 2: "crane", 3: "crane", 4: "Yak"}
    assert label_ids(["a", "A", "yak"], 5, names) == [1, 0, 4]
    with pytest.raises(ValueError, match=r"'crane' is the name of the classes \[2, 3\]"):
        label_ids("crane", 5, names)


def test_a_part_between_commas_names_a_class():
    """As in diffusers' DiTPipeline, but that a name of several classes is refused. The names are ImageNet's."""
    names = ["goldfish, Carassius auratus", "missile", "projectile, missile", "polecat, fitch", "skunk, polecat"]
    names = dict(enumerate([*names, "Cardigan, Cardigan Welsh corgi", "cardigan", "Ant, ant, "]))
    found = label_ids(["goldfish", "Carassius auratus", names[0], "GOLDFISH", "FITCH"], 8, names)
    assert found == [0, 0, 0, 0, 3]
    assert label_ids(["missile", "Missile", "Cardigan", "cardigan", "ANT"], 8, names) == [1, 1, 5, 6, 7]
    with pytest.raises(ValueError, match=r"'polecat' is the name of the classes \[3, 4\]; pass a number"):
        label_ids("polecat", 8, names)
    for wrong in ("gold", "goldfish,", "Carassius", ""):
        with pytest.raises(ValueError, match="is not the name of a class. Known names: "):
            label_ids(wrong, 8, names)
    assert numbered(["skunk", "goldfish"], list(names.values())) == [4, 0]


@pytest.fixture(scope="module")
def high_digits(tmp_path_factory):
    """Six images each of 7, 8 and 9: as folders, and as a parquet file with all ten names, in the same order."""
    folder = tmp_path_factory.mktemp("digits")
    source, columns = digits(), {"image": [], "label": []}
    for label in (7, 8, 9):
        chosen = source.select([i for i, other in enumerate(source["label"][:]) if other == label][:6])
        for number, image in enumerate(chosen["image"]):
            (folder / "folders" / "train" / str(label)).mkdir(parents=True, exist_ok=True)
            image.save(folder / "folders" / "train" / str(label) / f"{number}.png")
            columns["image"].append(image)
            columns["label"].append(label)
    Dataset.from_dict(columns, features=source.features).to_parquet(str(folder / "all.parquet"))
    return folder / "folders", folder / "all.parquet"


def test_likelihood_tells_the_network_the_class_of_that_name(high_digits, capsys):
    def bits(path, **changes):
        config = {"model": CTM, "dataset_name": str(path), "label_column": "label", "num_images": 18, "num_draws": 2}
        return likelihood.main(LikelihoodConfig(**config, methods=["elbo"], **changes))[0]["images"]

    folders, parquet = map(bits, high_digits)
    assert folders == parquet
    said = "numbered by name, as --model has them: 7 from 0 to 7, 8 from 1 to 8, 9 from 2 to 9."
    assert capsys.readouterr().out.count(said) == 1  # the other data set had the network's numbers
    both = bits(high_digits[0], teacher=EDM)
    assert both == folders


def test_a_student_learns_the_classes_of_its_teacher(high_digits, tmp_path, monkeypatch):
    labels, batch = [], train_ctm.TrainingRun._batch

    def noted(run, images, own, random):
        labels.append(own)
        return batch(run, images, own, random)

    monkeypatch.setattr(train_ctm.TrainingRun, "_batch", noted)
    options = {"teacher": EDM, "dataset_name": str(high_digits[0]), "label_column": "label", "max_solver_steps": 1}
    folder = train_ctm.main(CTMConfig(output_dir=str(tmp_path), **options, **QUIET))
    seen = torch.cat(labels)
    assert len(seen) == 4 and set(seen.tolist()) <= {7, 8, 9}
    pipe = DiffusionPipeline.from_pretrained(folder)
    assert pipe.config.id2label == {i: str(i) for i in range(10)} and pipe.classes == [7, 8, 9]
    drawn = pipe(batch_size=40, output_type="latent").provenance
    assert {record["class_label"] for record in drawn} == {7, 8, 9}


def write(path, names, labels, kind=None):
    """Gray images of 8x8 whose brightness is their class's place in the alphabet."""
    shade = {"cat": 20, "dog": 90, "eel": 160}
    pictures = [PILImage.new("L", (8, 8), shade.get(names[label], 250) if names else label) for label in labels]
    features = Features({"image": Image(), "label": kind or ClassLabel(names=names)})
    Dataset.from_dict({"image": pictures, "label": labels}, features=features).to_parquet(str(path))
    return str(path)


def edm(folder, data, **options):
    config = EDMConfig(
        output_dir=str(folder), dataset_name=data, label_column="label", **{**NETWORK, **QUIET, **options}
    )
    return train_edm.main(config)


@pytest.mark.parametrize("source", ["checkpoint-2", "pipeline"])
def test_a_second_stage_numbers_classes_as_the_first(tmp_path, source, monkeypatch):
    first = write(tmp_path / "first.parquet", ["cat", "dog", "eel"], [0, 1, 2, 0, 1, 2])
    edm(tmp_path / "first", first, max_train_steps=2, checkpointing_steps=2)
    other = write(tmp_path / "other.parquet", ["eel", "cat"], [0, 1, 0, 1])
    seen = []
    batch = train_edm.TrainingRun._batch

    def noted(run, images, labels, random):
        seen.extend(zip(images[:, 0, 0, 0].tolist(), labels.tolist()))
        return batch(run, images, labels, random)

    monkeypatch.setattr(train_edm.TrainingRun, "_batch", noted)
    init_from = str(tmp_path / "first" / source)
    pipe = DiffusionPipeline.from_pretrained(edm(tmp_path / "second", other, init_from=init_from))
    assert set(seen) == {(20, 0), (160, 2)}  # cat and eel
    assert pipe.config.id2label == {0: "cat", 1: "dog", 2: "eel"} and pipe.classes == [0, 2]
    with pytest.raises(UserError, match="--init_from .* has no class fox, .* It knows cat, dog, eel"):
        edm(tmp_path / "third", write(tmp_path / "fox.parquet", ["cat", "fox"], [0, 1, 0, 1]), init_from=init_from)


def test_a_resumed_run_numbers_classes_as_before(tmp_path):
    """The names of a data set may change their order between, as folders' do when one is renamed."""
    path = tmp_path / "data.parquet"
    labels = [0, 1, 2] * 2
    options = {"max_train_steps": 4, "checkpointing_steps": 2, "checkpoints_total_limit": 0}
    whole = edm(tmp_path / "whole", write(path, ["cat", "dog", "eel"], labels), **options)
    (tmp_path / "part").mkdir()
    (tmp_path / "whole" / "checkpoint-2").rename(tmp_path / "part" / "checkpoint-2")
    write(path, ["eel", "cat", "dog"], [(label + 1) % 3 for label in labels])  # the same images of the same classes
    part = edm(tmp_path / "part", str(path), resume_from_checkpoint="latest", **options)
    one, other = (DiffusionPipeline.from_pretrained(folder) for folder in (whole, part))
    assert other.config.id2label == one.config.id2label
    assert all(map(torch.equal, one.unet.state_dict().values(), other.unet.state_dict().values()))


def test_more_classes_than_the_network_knows_are_refused(tmp_path):
    """Plain numbers, and names where the network has none; a class without images does not count."""
    known = edm(tmp_path / "teacher", write(tmp_path / "three.parquet", None, [0, 1, 2, 0], Value("int64")))
    for column in (
        write(tmp_path / "five.parquet", None, [0, 1, 4, 3], Value("int64")),
        write(tmp_path / "named.parquet", ["cat", "dog", "eel", "fox"], [0, 1, 2, 3]),
    ):
        options = {"dataset_name": column, "label_column": "label", "teacher": known, "output_dir": str(tmp_path / "r")}
        with pytest.raises(UserError, match="--label_column label has . classes, --teacher knows 3. Leave out"):
            train_ctm.main(CTMConfig(**options, **QUIET))
    assert not (tmp_path / "r").exists()
    spare = write(tmp_path / "spare.parquet", ["cat", "dog", "eel", "fox"], [0, 1, 2, 0])
    data = ImageDataset(DataOptions(dataset_name=spare, label_column="label"))
    data.number_classes(3, None, "--teacher")
    assert data.num_classes == 3


def test_two_networks_that_number_the_same_classes_differently(tmp_path):
    data = ImageDataset(
        DataOptions(dataset_name=write(tmp_path / "d.parquet", ["cat", "dog"], [0, 1, 1, 1]), label_column="label")
    )
    data.number_classes(3, {0: "eel", 1: "cat", 2: "dog"}, "--model")
    assert data.labels().tolist() == data[[0, 1, 2, 3]][1].tolist() == [1, 2, 2, 2] and data.classes == [1, 2]
    data.number_classes(4, {0: "fox", 1: "cat", 2: "dog", 3: "yak"}, "--init_from")  # agrees where it matters
    with pytest.raises(UserError, match="--init_from and --teacher number the same classes differently: cat from 1"):
        data.number_classes(3, {0: "cat", 1: "dog", 2: "eel"}, "--teacher")


# Gaps -----------------------------------------------------------------------------------------------------------------


def test_classes_without_images_are_not_drawn(tmp_path):
    path = write(tmp_path / "d.parquet", None, [1, 2, 1, 2], Value("int64"))
    pipe = DiffusionPipeline.from_pretrained(edm(tmp_path / "run", path))
    assert pipe.num_classes == 3 and pipe.classes == [1, 2]
    records = pipe(batch_size=60, num_inference_steps=1, output_type="latent").provenance
    assert {record["class_label"] for record in records} == {1, 2}


def test_many_classes_without_images_need_a_word(tmp_path):
    path = write(tmp_path / "d.parquet", None, [5, 90, 5, 90], Value("int64"))
    with pytest.raises(UserError, match="89 of 91 classes have no image, 0, 1, .*--num_classes 91"):
        edm(tmp_path / "run", path)
    pipe = DiffusionPipeline.from_pretrained(edm(tmp_path / "run", path, num_classes=100))
    assert pipe.num_classes == 100 and pipe.classes == [5, 90]
    with pytest.raises(UserError, match="holds the class 90, and there are 90 classes"):
        edm(tmp_path / "other", path, num_classes=90)


def test_a_number_of_classes_is_for_plain_numbers(tmp_path):
    path = write(tmp_path / "d.parquet", ["cat", "dog"], [0, 1, 0, 1])
    with pytest.raises(UserError, match="--num_classes 3 is for plain numbers; --label_column label names 2 classes"):
        ImageDataset(DataOptions(dataset_name=path, label_column="label", num_classes=3))
    plain = write(tmp_path / "p.parquet", None, [0, 3, 1, 0], Value("int64"))
    stream = ImageStream(DataOptions(dataset_name=plain, label_column="label", num_classes=4), 2)
    assert stream.num_classes == 4 and stream.classes is stream.trained_classes is None


def test_a_class_without_images_is_warned_of(make_unet, caplog):
    unet = make_unet(CTMUNet2DModel, num_class_embeds=3)
    pipe = CTMPipeline(unet, CTMScheduler(), trained_classes=[0, 2])
    pipe(class_labels=[1, 2])
    assert "no image of the classes [1] in training" in caplog.text
    for wrong in ([], [3], [-1]):
        with pytest.raises(ValueError, match="trained_classes=.* must hold classes of the network, which has 3"):
            CTMPipeline(unet, CTMScheduler(), trained_classes=wrong)
