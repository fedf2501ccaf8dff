# Copyright 2026 The diffusers-ctm authors. Licensed under the Apache License, Version 2.0.
"""Training on the latents of an autoencoder, from its folder to a few-step pipeline of pixels and its card."""

import io
import json
import os
import shutil
import zipfile
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState
from diffusers import AutoencoderKL, DiffusionPipeline
from safetensors.torch import load_file

from demo import recipes
from diffusers_ctm.autoencoder import moments
from helpers.autoencoders import make_autoencoder
from helpers.comparing import close, seeded
from helpers.runs import NETWORK, SMALL, assert_same_weights, fresh_accelerate, in_processes  # noqa: F401
from training import ema, evaluate, likelihood, train_ctm, train_edm
from training.cli.errors import UserError
from training.cli.files import read_json, write_json
from training.cli.shared_options import DataOptions
from training.data import latents
from training.data.images import ImageDataset, to_sample
from training.data.latents import LatentDataset
from training.hub.card import make_card
from training.hub.record import recorded_license
from training.hub.staging import stage
from training.networks.autoencoder import load_autoencoder
from training.networks.pipelines import load_model, without_classes
from training.train_ctm import CTMConfig
from training.train_edm import EDMConfig


DATA = {"dataset_split": "train[:80]", "random_flip": True}
HALVING = {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}


def small_kl(**changes):
    """An autoencoder of gray images of 8x8 pixels: 4 x 4 x 4 latents of deviation near 1."""
    options = {"in_channels": 1, "out_channels": 1, "block_out_channels": (4, 8), "scaling_factor": 4.0, **HALVING}
    return make_autoencoder("KL", **{**options, **changes})


@pytest.fixture(scope="module")
def vae(tmp_path_factory):
    """A folder with an autoencoder and its card."""
    folder = tmp_path_factory.mktemp("autoencoders") / "small-kl"
    small_kl().save_pretrained(folder)
    (folder / "README.md").write_text("---\nlicense: openrail\n---\n")
    return str(folder)


def train(folder, vae, **options):
    return train_edm.main(
        EDMConfig(output_dir=str(folder), vae=vae, **{"max_train_steps": 4, **DATA, **SMALL, **NETWORK, **options})
    )


@pytest.fixture(scope="module")
def teacher(tmp_path_factory, vae):
    """A tiny teacher of latents, which were encoded beside it, and what it learned from."""
    AcceleratorState._reset_state(reset_partial_state=True)
    folder, seen = tmp_path_factory.mktemp("teacher") / "run", []
    noised = train_edm.noised
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train_edm, "noised", lambda images, *rest: (seen.append(images), noised(images, *rest))[1])
        path = train(folder, vae, sample_every=4)
    return SimpleNamespace(path=path, folder=folder, latents=f"{folder}-latents", seen=seen)


def distill(source, folder, **options):
    options = {"max_train_steps": 4, "max_solver_steps": 2, "learning_rate": 1e-2, **DATA, **SMALL, **options}
    options = {"objective": ["ctm"], "latents": source.latents, "teacher": source.path, **options}
    return train_ctm.main(CTMConfig(output_dir=str(folder), **options))


@pytest.fixture(scope="module")
def student(tmp_path_factory, teacher):
    """Its student, measured at the end, with a checkpoint on the way."""
    AcceleratorState._reset_state(reset_partial_state=True)
    folder = tmp_path_factory.mktemp("student") / "run"
    options = {"checkpointing_steps": 2, "sample_every": 4, "eval_every": 4, "eval_samples": 70}
    return SimpleNamespace(path=distill(teacher, folder, **options), folder=folder)


def load(path):
    pipe = DiffusionPipeline.from_pretrained(path)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def assert_same_autoencoder(pipe, network):
    weights = pipe.vae.state_dict()
    assert weights.keys() == network.state_dict().keys()
    assert all(torch.equal(weights[name], weight) for name, weight in network.state_dict().items())


def test_a_teacher_learns_latents_drawn_anew(teacher, vae):
    assert os.listdir(teacher.latents) == ["latents-00000-of-00001.safetensors"]
    seen = torch.cat(teacher.seen)
    assert seen.shape == (32, 4, 4, 4)
    # Each is near the mean of an image or of its mirror image, as near as a draw of the moments is.
    network = small_kl()
    pixels = to_sample(ImageDataset(DataOptions(dataset_split="train[:80]"))[list(range(80))][0])
    with torch.no_grad():
        mean, std = moments(network, torch.cat([pixels, pixels.flip(-1)]))
    apart = (seen[:, None] / 4.0 - mean) / std
    spread = apart.square().flatten(2).mean(2).amin(1)  # of each, 1 if drawn; 0 were the means
    assert 0.5 < spread.mean() < 1.5 and spread.max() < 3


def test_pipelines_draw_images_of_pixels(teacher, student):
    for one in (teacher, student):
        pipe = load(one.path)
        assert_same_autoencoder(pipe, small_kl())
        assert (pipe.image_size, pipe.state_size, pipe.unet.config.in_channels) == ((8, 8), (4, 4), 4)
        options = {"class_labels": ["3", "7"], "num_inference_steps": 2, "generator": seeded()}
        states = pipe(**options, output_type="latent").images
        images = pipe(**options | {"generator": seeded()}).images
        assert [(image.size, image.mode) for image in images] == [((8, 8), "L")] * 2
        with torch.no_grad():
            decoded = small_kl().decode(states / 4.0).sample
        shown = torch.stack([torch.from_numpy(np.array(image)) for image in images])[:, None]
        close(shown.float(), 255 * (decoded / 2 + 0.5).clamp(0, 1), atol=0.51)
    assert not os.path.exists(f"{student.folder}-latents")  # those of --latents were used
    assert sorted(os.listdir(student.folder / "samples")) == ["step-000004-1-step.png", "step-000004-4-steps.png"]
    measured = read_json(str(student.folder), "metrics.jsonl")
    assert measured["step"] == 4 and measured["frechet"].keys() == {"1-step", "4-steps"}  # by features of gray 8x8


def test_resumed_is_uninterrupted_bit_for_bit(teacher, student, tmp_path):
    shutil.copytree(student.folder / "checkpoint-2", tmp_path / "run" / "checkpoint-2")
    before = {path.name: path.stat().st_mtime_ns for path in Path(teacher.latents).iterdir()}
    part = distill(teacher, tmp_path / "run", resume_from_checkpoint="latest", dataloader_num_workers=1)
    assert_same_weights(student.path, part)
    assert {path.name: path.stat().st_mtime_ns for path in Path(teacher.latents).iterdir()} == before


def test_a_teacher_without_its_autoencoder_is_given_it(teacher, student, vae, tmp_path):
    """As a converted one is. The student is the same; not to say so is an error before anything is written."""
    shutil.copytree(teacher.path, tmp_path / "bare", ignore=shutil.ignore_patterns("vae"))
    bare = SimpleNamespace(path=str(tmp_path / "bare"), latents=teacher.latents)
    (tmp_path / "bare" / "training.json").unlink()
    (tmp_path / "bare" / "README.md").write_text("---\nlicense: cc-by-nc-4.0\n---\n")
    assert_same_weights(student.path, distill(bare, tmp_path / "run", vae=vae))
    record = read_json(str(tmp_path / "run" / "pipeline"), "training.json")
    assert record["vae"] == {"name": "small-kl", "on_hub": False, "revision": None, "license": "openrail"}
    assert record["teacher"]["license"] == record["license"] == "cc-by-nc-4.0"  # the strictest
    with pytest.raises(UserError, match="--latents .* needs the autoencoder that made them: give --vae, or a teacher"):
        distill(bare, tmp_path / "none")
    said = r"images of shape \(1, 8, 8\), --.* makes \(4, 4, 4\). These are latents, and their autoencoder is missing"
    with pytest.raises(UserError, match=f"{said}. Give --vae"):
        distill(bare, tmp_path / "none", latents=None)
    assert not (tmp_path / "none").exists()
    alone = shutil.copytree(student.path, tmp_path / "alone", ignore=shutil.ignore_patterns("vae"))
    index = read_json(alone, "model_index.json")
    write_json({**index, "vae": [None, None]}, "model_index.json", alone)
    options = {"dataset_split": DATA["dataset_split"], "label_column": "label", "output_dir": str(tmp_path / "none")}
    for models in ({"teacher": bare.path}, {"model": str(alone)}):
        with pytest.raises(UserError, match=f"{said}. Save its pipeline with its `vae`"):
            evaluate.main(evaluate.EvaluateConfig(**models, **options, features=["digits"], device="cpu"))


def test_latents_that_edm2s_tool_encoded_train_as_those_encoded_here(vae, tmp_path, monkeypatch):
    seen, noised = [], train_edm.noised
    monkeypatch.setattr(train_edm, "noised", lambda images, *rest: (seen.append(images), noised(images, *rest))[1])
    options = {"random_flip": False, "max_train_steps": 2, "vae_unit_range": True}
    here = train(tmp_path / "here", vae, **options)
    [shard] = (tmp_path / "here-latents").iterdir()
    encoded = [values[:, 0].float() for values in (load_file(shard)[name] for name in ("mean", "std"))]
    with torch.no_grad():
        images = to_sample(ImageDataset(DataOptions(dataset_split="train[:80]"))[list(range(80))][0])
        for values, expected in zip(encoded, moments(small_kl(), images, normalized=False), strict=True):
            close(values, expected, rtol=1e-3, atol=1e-3)  # kept in float16
    with zipfile.ZipFile(tmp_path / "tool.zip", "w") as archive:
        for number, pair in enumerate(zip(*encoded, strict=True)):  # so that batches are equal to the bit
            np.save(file := io.BytesIO(), torch.cat(pair).numpy())
            archive.writestr(f"00000/img-mean-std-{number:08d}.npy", file.getvalue())
        archive.writestr("dataset.json", json.dumps({"labels": None}))
    content = (tmp_path / "tool.zip").read_bytes()
    others = train(tmp_path / "others", vae, latents=str(tmp_path / "tool.zip"), **options)
    assert len(seen) == 4 and all(torch.equal(*pair) for pair in zip(seen[:2], seen[2:]))
    assert_same_weights(here, others)
    assert (tmp_path / "tool.zip").read_bytes() == content
    assert sorted(os.listdir(tmp_path)) == ["here", "here-latents", "others", "tool.zip"]
    pipe = load(others)
    assert pipe.config.normalize_images is False  # so that decoded images have the colors of the data
    teacher = SimpleNamespace(path=others, latents=str(tmp_path / "tool.zip"))
    distill(teacher, tmp_path / "student", random_flip=False, max_train_steps=1)
    with pytest.raises(UserError, match="Give --vae_unit_range true with --vae"):
        train(tmp_path / "mixed", vae, latents=str(tmp_path / "tool.zip"), **options | {"vae_unit_range": False})
    assert not (tmp_path / "mixed" / "pipeline").exists()


def test_snapshots_of_averages_hold_one_autoencoder(teacher, tmp_path):
    run = tmp_path / "run"
    distill(teacher, run, posthoc_ema=[0.05, 0.1], posthoc_ema_every=2)
    files = list((run / "ema-snapshots").glob("*/vae/*.safetensors"))
    assert len(files) == 4 and len({file.stat().st_ino for file in files}) == 1
    average = ema.main(ema.PostHocConfig(run=str(run), sigma_rel=0.08))
    vaes = [AutoencoderKL.from_pretrained(path, subfolder="vae").state_dict() for path in (average, run / "pipeline")]
    torch.testing.assert_close(*vaes, rtol=0, atol=0)
    assert DiffusionPipeline.from_pretrained(files[0].parents[1])().images[0].size == (8, 8)


def test_a_first_stage_of_other_latents_is_refused(teacher, student, tmp_path, capsys):
    """The shapes are the same, and images would be wrong."""

    def other(name, network, **index):
        folder = shutil.copytree(teacher.path, tmp_path / name)
        network.save_pretrained(folder / "vae")
        write_json({**read_json(folder, "model_index.json"), **index}, "model_index.json", folder)
        return SimpleNamespace(path=str(folder), latents=None)

    others = [
        other("weights", small_kl(seed=1)),
        other("scale", small_kl(scaling_factor=2.0)),
        other("shift", small_kl(shift_factor=0.2)),
        other("range", small_kl(), normalize_images=False),
    ]
    before = sorted(os.listdir(tmp_path))
    for source in (student.folder / "checkpoint-2", student.path, teacher.path):
        for one in others:
            with pytest.raises(UserError, match=f"--init_from {source} learned latents of another autoencoder than"):
                distill(one, tmp_path / "run", init_from=str(source))
    with pytest.raises(UserError, match="checkpoint-2 learned latents, this run pixels. Give the --vae of that run"):
        train(tmp_path / "run", None, init_from=str(student.folder / "checkpoint-2"))
    assert sorted(os.listdir(tmp_path)) == before
    half = load(student.path).to(torch.float16)
    half.vae.decoder.conv_out.bias.data += 1  # decoders may differ
    half.save_pretrained(tmp_path / "half")
    old = shutil.copytree(student.folder / "checkpoint-2", tmp_path / "old")  # of a version that did not keep it
    state = torch.load(old / "run_state.pt", weights_only=True)
    del state["example"]
    torch.save(state, old / "run_state.pt")
    for source in (student.folder / "checkpoint-2", tmp_path / "half", old):
        distill(teacher, tmp_path / f"from-{source.name}", init_from=str(source), max_train_steps=1)
        assert ("old does not say whose latents it learned" in capsys.readouterr().out) == (source == old)


def test_latents_are_learned_without_a_teacher(teacher, vae, tmp_path):
    network = {name: value for name, value in NETWORK.items() if name != "dropout"}
    path = distill(teacher, tmp_path / "run", teacher=None, vae=vae, solver_model="ema", max_train_steps=1, **network)
    assert_same_autoencoder(load(path), small_kl())
    record = read_json(path, "training.json")
    assert record["teacher"] is None and record["vae"]["name"] == "small-kl" and record["license"] == "openrail"


def train_in_a_process(folder, vae, options):
    AcceleratorState._reset_state(reset_partial_state=True)
    train(folder, vae, **options)


def test_two_processes_are_one(vae, tmp_path, monkeypatch):
    monkeypatch.setattr(latents, "SHARD", 30)  # three files
    options = {"dropout": 0.0, "learning_rate": 1e-3, "ema_decay": 0.0, "optimizer": "adam", "adam_epsilon": 1e-3}
    for processes, folder in ((1, "one"), (2, "two")):
        size = {"train_batch_size": 8 // processes, "max_train_steps": 2, "checkpointing_steps": 2}
        in_processes(processes, train_in_a_process, tmp_path / folder, vae, {**options, **size})
        assert len(list((tmp_path / folder / "checkpoint-2").glob("random_states_*.pkl"))) == processes
        assert len(os.listdir(tmp_path / f"{folder}-latents")) == 3
    assert_same_weights(*(str(tmp_path / name / "pipeline") for name in ("one", "two")), rtol=1e-4, atol=2e-5)


def test_both_are_measured_as_images(teacher, student, tmp_path):
    options = {"steps": [1], "gammas": [0.0], "teacher_steps": [2], "num_samples": 70, "seeds": [0]}
    options |= {"features": ["digits"], "paired_samples": 70, "paired_steps": 3, "kid": False, "device": "cpu"}
    options |= {"dataset_split": DATA["dataset_split"], "label_column": "label", "output_dir": str(tmp_path)}
    report = evaluate.main(evaluate.EvaluateConfig(model=student.path, teacher=teacher.path, **options))
    assert report["reference"]["channels"] == 1 and report["reference"]["resolution"] == 8
    assert {row["sampler"] for row in report["results"]} == {"ctm", "heun"}
    assert all(row["frechet"]["mean"] > 0 for row in report["results"])


def test_likelihood_is_said_to_be_of_latents(teacher, student, capsys):
    options = {"methods": ["elbo"], "num_images": 2, "num_draws": 2, "label_column": "label", "device": "cpu"}
    rows = likelihood.main(likelihood.LikelihoodConfig(model=student.path, teacher=teacher.path, **options))
    assert [row["name"] for row in rows] == ["CTM, exact score, of latents", "teacher, of latents"]
    assert "| CTM, exact score, of latents |" in capsys.readouterr().out


def test_guidance_of_the_programs_sees_images(student, monkeypatch):
    pipe = load_model(student.path, [0.0])
    free, options = without_classes(pipe)
    images = free(batch_size=2, output_type="pt", generator=seeded(), **options).images
    assert images.shape == (2, 1, 8, 8) and free.vae is pipe.vae
    seen = []

    def logits(images):
        seen.append(images.shape)
        return images.flatten(1)[:, :10]

    classifier = SimpleNamespace(requires_grad_=lambda value: SimpleNamespace(logits=logits))
    monkeypatch.setattr(recipes, "load_saved", lambda name: classifier)
    output = recipes.guide_by_classifier(pipe, "a classifier", 3, 1.0, 1, 0.0, [0, 1])
    assert set(seen) == {(2, 1, 8, 8)} and output.images[0].size == (8, 8)


# Records and cards ----------------------------------------------------------------------------------------------------


def test_record_and_card_name_the_autoencoder_and_inherit_its_license(teacher, student, tmp_path):
    named = {"name": "small-kl", "on_hub": False, "revision": None, "license": "openrail"}
    for one, sentence in ((teacher, "Trained from scratch."), (student, "Distilled from `run`.")):
        record = read_json(one.path, "training.json")
        assert record["vae"] == named  # the student's by its teacher's record
        assert record["license"] == "openrail" and recorded_license(one.path).id == "openrail"
        assert "latents" not in record["options"]
        staged = tmp_path / one.folder.parent.name
        stage(one.path, str(staged))
        assert sorted(os.listdir(staged / "vae")) == ["config.json", "diffusion_pytorch_model.safetensors"]
        card = make_card(str(staged), "team/latents", recorded_license(one.path), record, {})
        said = "It works on the latents of the autoencoder of `small-kl`, whose license is openrail."
        assert f"{sentence}\n{said}" in card
        assert "| Images | 8x8 pixels, gray |" in card and "license: openrail" in card
    plain = {name: value for name, value in record.items() if name != "vae"}
    assert "autoencoder" not in make_card(str(staged), "team/latents", recorded_license(one.path), plain, {})


def test_an_autoencoder_of_which_no_record_tells_is_its_teachers(teacher, tmp_path):
    shutil.copytree(teacher.path, tmp_path / "found")
    (tmp_path / "found" / "training.json").unlink()
    (tmp_path / "found" / "README.md").write_text("---\nlicense: mit\n---\n")
    found = SimpleNamespace(path=str(tmp_path / "found"), latents=teacher.latents)
    record = read_json(distill(found, tmp_path / "run", max_train_steps=1), "training.json")
    assert record["vae"] == record["teacher"] == {"name": "found", "on_hub": False, "revision": None, "license": "mit"}


# What does not fit ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options, message",
    [
        ({"vae": "VAE"}, "--vae is not needed: --teacher .* brings its own autoencoder. Leave it out"),
        (
            {"distance": "features", "distance_network": "digits"},
            "--distance must be l2 or pseudo_huber: another sees images, and the run learns latents",
        ),
        ({"discriminator_weight": 1.0}, "--discriminator_weight must be 0: the discriminator sees images"),
        ({"streaming": True, "dataset_split": "train"}, "--streaming must be false: latents are encoded once"),
        ({"resolution": 16, "latents": None}, r"gives latents of shape \(4, 8, 8\), --teacher makes \(4, 4, 4\)"),
        ({"resolution": 9}, "--resolution 9: the autoencoder .* takes multiples of 2"),
        ({"image_mode": "RGB"}, "--image_mode: the autoencoder .* takes images with 1 channels"),
        ({"random_flip": False}, "--latents .* was made otherwise: random_flip True, here False"),
        ({"dataset_split": "train[:70]"}, r"--latents .* was made otherwise: dataset_split train\[:80\], here"),
    ],
)
def test_what_does_not_fit_is_said_before_anything_is_encoded(teacher, vae, tmp_path, options, message, monkeypatch):
    monkeypatch.setattr(LatentDataset, "prepare", lambda self: pytest.fail("it encodes"))
    options = {name: vae if value == "VAE" else value for name, value in options.items()}
    with pytest.raises(UserError, match=message):
        distill(teacher, tmp_path / "run", **options)
    assert not os.listdir(tmp_path)


def test_autoencoders_that_cannot_be_used(teacher, vae, tmp_path):
    def refused(folder, message, **options):
        with pytest.raises(UserError, match=message):
            train(tmp_path / "run", str(folder), **options)
        assert not (tmp_path / "run").exists() and not (tmp_path / "run-latents").exists()

    refused("nowhere", "--vae nowhere cannot be loaded. It must be a folder or a Hub repository with an autoencoder")
    bare = shutil.copytree(teacher.path, tmp_path / "bare", ignore=shutil.ignore_patterns("vae"))
    refused(bare, "--vae .*bare holds no autoencoder")
    several = tmp_path / "several"
    for name in ("one", "two"):
        shutil.copytree(vae, several / name)
    refused(several, r"holds one \(AutoencoderKL\), two \(AutoencoderKL\). One autoencoder can be used")
    sound = tmp_path / "sound"
    sound.mkdir()
    (sound / "config.json").write_text(json.dumps({"_class_name": "AutoencoderOobleck"}))
    refused(sound, r"holds the top \(AutoencoderOobleck\). .* of the classes AsymmetricAutoencoderKL, AutoencoderDC")
    damaged = shutil.copytree(vae, tmp_path / "damaged")
    weights = Path(damaged, "diffusion_pytorch_model.safetensors")
    weights.write_bytes(weights.read_bytes()[:-50])
    refused(damaged, "--vae .*damaged cannot be loaded")
    refused(vae, "--vae_revision main is for repositories on the Hub", vae_revision="main")
    refused(
        vae,
        "--resolution must be a multiple of 4 for 3 --block_out_channels, got 6 for latents",
        resolution=12,
        block_out_channels=[8, 8, 8],
    )
    refused(vae, "--vae must be left out with --streaming", streaming=True)
    color = tmp_path / "color"
    small_kl(in_channels=3, out_channels=3).save_pretrained(color)
    refused(color, "takes images with 3 channels, and the data set's have 1")
    with pytest.raises(UserError, match="--vae_revision needs --vae"):
        EDMConfig(vae_revision="main")

    # Beside a teacher
    two = shutil.copytree(teacher.path, tmp_path / "two")
    shutil.copytree(two / "vae", two / "movq")
    with pytest.raises(UserError, match=r"--teacher .*two holds movq \(AutoencoderKL\), vae \(AutoencoderKL\)"):
        distill(SimpleNamespace(path=str(two), latents=None), tmp_path / "run")
    with pytest.raises(UserError, match="--teacher makes .* It makes images: leave --vae out"):
        pixels = train(tmp_path / "pixels", None)
        distill(SimpleNamespace(path=pixels, latents=None), tmp_path / "run", vae=vae)
    shutil.rmtree(tmp_path / "pixels")
    wide = shutil.copytree(teacher.path, tmp_path / "wide")
    shutil.rmtree(wide / "vae")
    small_kl(latent_channels=8).save_pretrained(wide / "vae")
    with pytest.raises(UserError, match=r"\(8, 4, 4\), --teacher makes \(4, 4, 4\). Give the autoencoder that made"):
        distill(SimpleNamespace(path=str(wide), latents=None), tmp_path / "run")
    assert not (tmp_path / "run").exists() and not (tmp_path / "run-latents").exists()


def test_how_a_pipeline_uses_its_autoencoder_is_kept(teacher, vae, tmp_path):
    assert load_autoencoder(vae, None).normalize_images and load_autoencoder(teacher.path, None).normalize_images
    other = shutil.copytree(teacher.path, tmp_path / "other")
    write_json({**read_json(other, "model_index.json"), "normalize_images": False}, "model_index.json", other)
    found = load_autoencoder(str(other), None)
    assert found.pipeline_options["normalize_images"] is False
    assert not found.normalize_images and found.digest() != load_autoencoder(vae, None).digest()
    assert load_autoencoder(teacher.path, None).digest() == load_autoencoder(vae, None).digest()
    assert not any(weight.requires_grad for weight in found.network.parameters()) and not found.network.training
