# Copyright 2026 The diffusers-ctm authors. Licensed under the Apache License, Version 2.0.
"""What a PNG file says of how it was made is true: run again from it, it gives the same image."""

import json
import os
import xml.etree.ElementTree as ElementTree

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline
from PIL import Image, PngImagePlugin

import diffusers_ctm
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
    LossGuidance,
    read_provenance,
    save_images,
)
from diffusers_ctm.provenance import FIELDS, png_text
from helpers.comparing import seeded


TERMS = "http://cv.iptc.org/newscodes/digitalsourcetype/"
SYNTHETIC, COMPOSITE = TERMS + "trainedAlgorithmicMedia", TERMS + "compositeWithTrainedAlgorithmicMedia"
SOFTWARE = f"diffusers-ctm {diffusers_ctm.__version__}"


@pytest.fixture
def pipe(make_unet):
    pipe = CTMPipeline(make_unet(num_class_embeds=3), CTMScheduler())
    pipe.set_progress_bar_config(disable=True)
    return pipe


def pixels(path):
    with Image.open(path) as image:
        return np.asarray(image)


def test_a_file_says_how_to_make_its_image_again(pipe, tmp_path):
    output = pipe(class_labels=[2, 0], num_inference_steps=3, gamma=[0.5, 0.2, 0.0], generator=seeded(7))
    paths = save_images(output, tmp_path / "{index:02d}-{seed}-{class_label}.png")
    assert [path.name for path in paths] == ["00-7-2.png", "01-7-0.png"]
    for i, path in enumerate(paths):
        found = read_provenance(path)
        special = {"guidance_scale", "guidance", "generator", "dtype"}
        assert set(found) == set(FIELDS) - special - {"model", "revision"}  # made in memory, it has neither
        assert found["digital_source_type"] == SYNTHETIC and found["software"] == SOFTWARE
        assert (found["pipeline"], found["scheduler"]) == ("CTMPipeline", "CTMScheduler")
        again = pipe(
            class_labels=[read_provenance(other)["class_label"] for other in paths],
            sigmas=found["sigmas"][:-1],
            gamma=found["gamma"],
            generator=seeded(found["seed"]),
            output_type="np",
        ).images
        assert found["num_inference_steps"] == pipe.scheduler.num_inference_steps == 3
        assert (found["batch_index"], found["batch_size"]) == (i, 2)
        difference = (again[found["batch_index"]] * 255).round() - pixels(path)
        assert np.abs(difference).max() <= 1  # levels are written with six digits


def made_from(record, unet, *given):
    """The image of a record, by a pipeline that knows nothing else; `given` is what was edited."""
    cls = getattr(diffusers_ctm, record["pipeline"])
    scheduler = getattr(diffusers_ctm, record["scheduler"])(**record["scheduler_config"])
    pipe = cls(unet, scheduler, null_class=2)
    pipe.set_progress_bar_config(disable=True)
    options = {name: record[name] for name in ("gamma", "guidance_scale") if name in record}
    if cls is CTMPipeline and "gamma" in record:  # given targets are told by their gamma
        options["final_sigma"] = record["sigmas"][-1]
    labels = [record["class_label"]] * record.get("batch_size", 1)
    generator = seeded(record["seed"])
    images = pipe(*given, class_labels=labels, sigmas=record["sigmas"][:-1], generator=generator, **options).images
    return np.asarray(images[record.get("batch_index", 0)])


LEVELS = {"sigmas": [80.0, 5.0, 0.6]}
AGAIN = {
    "classes": ({"num_inference_steps": 2}, {}),
    "noise in between": ({"num_inference_steps": 4, "gamma": 0.7}, {}),
    "gamma near 1": ({"gamma": [0.99999, 0.9999999, 0.0], **LEVELS}, {}),
    "a generator each": ({"num_inference_steps": 3, "gamma": 0.7, "generator": [4, 5, 6]}, {}),
    "jumps": ({"sigmas": [80.0, 60.0, 5.0], "target_sigmas": [0.06, 0.007, 0.002]}, {}),
    "jumps that end higher": ({"target_sigmas": [1.0, 0.4, 0.3], **LEVELS}, {}),
    "noise that is left": ({"final_sigma": 0.3, "gamma": 0.5, **LEVELS}, {}),
    "to zero": ({"final_sigma": 0.0, "num_inference_steps": 3, "gamma": 1.0}, {}),
    "classifier-free guidance": ({"num_inference_steps": 2, "guidance_scale": 2.5}, {}),
    "a preset": ({"num_inference_steps": 2}, {"presets": {"2": {"sigmas": [70, 1.5], "target_sigmas": [0.01, 0.002]}}}),
    "clipped": ({"num_inference_steps": 3, "gamma": 1.0}, {"clip_sample": True}),
    "other ends": ({"num_inference_steps": 3, "gamma": 0.9}, {"sigma_min": 0.1, "sigma_max": 40.0}),
    "Heun": ({"num_inference_steps": 3}, None),
    "Heun with churn": ({"num_inference_steps": 3}, {"s_churn": 2.0, "s_noise": 1.01, "s_tmin": 0.1}),
    "image to image": ({"strength": 0.6, "num_inference_steps": 3, "gamma": 0.4}, {}),
    "image to image by Heun": ({"sigma": 3.0, "num_inference_steps": 2}, None),
}  # fmt: skip


@pytest.mark.parametrize("name", AGAIN)
@pytest.mark.parametrize("seed", [9, 10])
def test_a_record_alone_makes_the_image_again(make_unet, name, seed, tmp_path):
    """Of classes that were drawn, which the record says."""
    (options, numbers), unet = AGAIN[name], make_unet(num_class_embeds=3)
    cls, given = CTMPipeline, ()
    if "image" in name:
        cls, given = CTMImg2ImgPipeline, (torch.rand(1, 3, 8, 8, generator=seeded()),)
    scheduler = EDMHeunScheduler if "Heun" in name else CTMScheduler
    pipe = cls(unet, scheduler(**numbers or {}), null_class=2)
    seeds = options.get("generator")
    generator = [seeded(one + seed) for one in seeds] if seeds else seeded(seed)
    paths = save_images(pipe(*given, batch_size=3, **{**options, "generator": generator}), tmp_path / "{index}.png")
    for path in paths:
        difference = made_from(read_provenance(path), unet, *given).astype(int) - pixels(path)
        assert np.abs(difference).max() <= 1


def test_drawn_classes_leave_the_noise_alone(pipe):
    """What draws classes is told by the generator's state and does not move it, nor does it share its bits."""
    drawn = [pipe(batch_size=64, num_inference_steps=1, generator=seeded(seed)).provenance for seed in (0, 0, 1)]
    labels = [[record["class_label"] for record in records] for records in drawn]
    assert labels[0] == labels[1] != labels[2] and set(labels[0]) == {0, 1, 2}
    assert labels[0] != torch.randint(3, (64,), generator=seeded(0)).tolist()
    each = pipe(generator=[seeded(seed) for seed in range(30)], num_inference_steps=1).provenance
    assert {record["class_label"] for record in each} == {0, 1, 2}
    one = seeded(3)  # one that is listed for all goes on drawing
    assert len({record["class_label"] for record in pipe(generator=[one] * 30).provenance}) == 3
    torch.manual_seed(0)
    free = [[record["class_label"] for record in pipe(batch_size=30).provenance] for _ in range(2)]
    assert free[0] != free[1]


def test_a_seed_is_written_only_where_it_makes_the_image_again(pipe):
    def seeds(**options):
        return [record.get("seed") for record in pipe(class_labels=1, **options).provenance]

    def stop(pipe, step, timestep, tensors):
        pipe._interrupt = True
        return {}

    def replace(pipe, step, timestep, tensors):
        return {"latents": tensors["latents"] + 1} if step == 0 else tensors

    def write_in_place(pipe, step, timestep, tensors):
        tensors["latents"][:, :, :4] = 0

    latents, one = torch.randn(2, 3, 8, 8), seeded(5)
    assert seeds(generator=seeded(5), num_inference_steps=2, callback_on_step_end=replace) == [None]
    assert seeds(generator=seeded(5), num_inference_steps=2, callback_on_step_end=write_in_place) == [None]
    with torch.inference_mode():
        assert seeds(generator=seeded(5), callback_on_step_end=write_in_place) == [None]
    assert seeds(generator=seeded(5), callback_on_step_end=lambda pipe, step, timestep, tensors: tensors) == [5]
    assert seeds(generator=seeded(5), batch_size=2) == [5, 5]
    assert seeds(generator=seeded(5), latents=latents) == [None, None]
    assert seeds(generator=[seeded(5), seeded(6)], latents=latents) == [None, None]
    assert seeds(generator=[one, seeded(6), one]) == [None, 6, None]
    assert seeds(generator=seeded(5), num_inference_steps=2, callback_on_step_end=stop) == [None]


def test_guidance_and_precision_are_said(pipe):
    def record(**options):
        return pipe(class_labels=1, **options).provenance[0]

    guided = record(guidance=LossGuidance(lambda x: x.sum((1, 2, 3)), 0.1))
    assert guided["guidance"] == "LossGuidance" and "guidance_scale" not in guided and "dtype" not in guided
    inverter = CTMInversionPipeline.from_pipe(pipe)
    assert not {"guidance", "scheduler_config"} & set(inverter.decode(torch.randn(1, 3, 8, 8), 0, 1).provenance[0])
    assert "guidance" not in record()
    pipe.unet.to(torch.bfloat16)
    assert record()["dtype"] == "bfloat16"


def test_a_guidance_scale_that_a_callback_changed_is_said_step_by_step(make_unet):
    pipe = CTMPipeline(make_unet(num_class_embeds=3), CTMScheduler(), null_class=2)

    def raised(pipe, step, timestep, tensors):
        pipe._guidance_scale += 0.5
        return tensors

    options = {"class_labels": 1, "num_inference_steps": 3, "generator": seeded(5)}
    [record] = pipe(guidance_scale=1.0, callback_on_step_end=raised, **options).provenance
    assert record["guidance_scale"] == [1.0, 1.5, 2.0] and record["seed"] == 5


def test_one_generator_per_image_gives_one_seed_each(pipe):
    records = pipe(class_labels=1, generator=[seeded(4), seeded(5)]).provenance
    assert [(record["seed"], "batch_index" in record) for record in records] == [(4, False), (5, False)]
    used = seeded(4)
    torch.rand(1, generator=used)
    assert ["seed" in record for record in pipe(class_labels=1, generator=[used, seeded(5)]).provenance] == [
        False,
        True,
    ]
    assert "seed" not in pipe(class_labels=1, generator=used).provenance[0]
    assert "seed" not in pipe(class_labels=1).provenance[0]


def test_the_run_that_was_made_is_what_is_said(pipe):
    pipe.scheduler = CTMScheduler(presets={"2": {"sigmas": [70.0, 1.5], "gamma": [0.25, 0.0]}})
    record = pipe(class_labels=1, num_inference_steps=2).provenance[0]
    assert record["sigmas"] == [70.0, 1.5, 0.002] and record["gamma"] == [0.25, 0.0]
    pipe.scheduler = EDMHeunScheduler()
    record = pipe(class_labels=1, num_inference_steps=4).provenance[0]
    assert (record["scheduler"], record["num_inference_steps"]) == ("EDMHeunScheduler", 4) and "gamma" not in record


@pytest.mark.parametrize(
    ("cls", "call"),
    [
        (CTMImg2ImgPipeline, lambda pipe, image: pipe(image, class_labels=0)),
        (CTMInpaintPipeline, lambda pipe, image: pipe(image, torch.ones(8, 8), 1, class_labels=0)),
        (
            CTMRestorationPipeline,
            lambda pipe, image: pipe(image[:, :1], GrayscaleOperator(), num_inference_steps=1, class_labels=0),
        ),
        (CTMInversionPipeline, lambda pipe, image: pipe.decode(image, 0, num_inference_steps=1)),
    ],
)
def test_what_was_made_from_given_images_is_composite(pipe, cls, call):
    pipe = cls.from_pipe(pipe)
    pipe.set_progress_bar_config(disable=True)
    output = call(pipe, torch.rand(1, 3, 8, 8, generator=seeded()))
    assert type(output) is CTMPipelineOutput
    assert output.provenance[0]["digital_source_type"] == COMPOSITE and output.provenance[0]["class_label"] == 0


def test_the_model_is_named_without_its_place(pipe, tmp_path):
    folder = tmp_path / "private" / "my-run" / "pipeline"
    pipe.save_pretrained(folder)
    record = DiffusionPipeline.from_pretrained(folder)(class_labels=0).provenance[0]
    assert record["model"] == "my-run" and "revision" not in record
    assert str(tmp_path) not in str(record) and "private" not in str(record)

    loaded = DiffusionPipeline.from_pretrained(folder)
    commit = "0123456789abcdef" * 2 + "01234567"
    loaded.register_to_config(_name_or_path="user/name")
    loaded.unet.register_to_config(_name_or_path=f"/home/me/hub/models--user--name/snapshots/{commit}/unet")
    record = loaded(class_labels=0).provenance[0]
    assert (record["model"], record["revision"]) == ("user/name", commit)


def test_other_software_reads_it(pipe, tmp_path):
    """The XMP packet is well-formed RDF with IPTC's property, in the chunk where XMP belongs."""
    (path,) = save_images(pipe(class_labels=0), tmp_path / "one.png", {"software": 'a "quoted" <name> & more'})
    content = path.read_bytes()
    start = content.index(b"iTXtXML:com.adobe.xmp\0") + 4
    assert content[start:].startswith(b"XML:com.adobe.xmp\0\0\0\0\0<?xpacket begin=")  # not compressed, as XMP asks
    packet = content[content.index(b"<x:xmpmeta") : content.index(b"</x:xmpmeta>") + len(b"</x:xmpmeta>")]
    description = ElementTree.fromstring(packet).find(".//{http://www.w3.org/1999/02/22-rdf-syntax-ns#}Description")
    attributes = description.attrib
    assert attributes["{http://iptc.org/std/Iptc4xmpExt/2008-02-29/}DigitalSourceType"] == SYNTHETIC
    assert attributes["{http://ns.adobe.com/xap/1.0/}CreatorTool"] == 'a "quoted" <name> & more'
    with Image.open(path) as image:
        assert image.text["DigitalSourceType"] == SYNTHETIC and image.text["Steps"] == "1"


def test_files_of_others(tmp_path):
    Image.new("L", (4, 4)).save(tmp_path / "plain.png")
    assert read_provenance(tmp_path / "plain.png") == {}
    info = PngImagePlugin.PngInfo()
    info.add_itxt(
        "XML:com.adobe.xmp", f"<x><Iptc4xmpExt:DigitalSourceType>{COMPOSITE}</Iptc4xmpExt:DigitalSourceType></x>"
    )
    info.add_text("Seed", "not json")
    info.add_text("Comment", "hello")
    Image.new("L", (4, 4)).save(tmp_path / "theirs.png", pnginfo=info)
    assert read_provenance(tmp_path / "theirs.png") == {"digital_source_type": COMPOSITE, "seed": "not json"}
    resource = f'<x><Iptc4xmpExt:DigitalSourceType rdf:resource="{SYNTHETIC}"/></x>'.encode()
    Image.new("L", (4, 4)).save(tmp_path / "theirs.jpg", xmp=resource)
    assert read_provenance(tmp_path / "theirs.jpg") == {"digital_source_type": SYNTHETIC}
    with pytest.raises(OSError):
        read_provenance(tmp_path / "absent.png")


def test_a_file_that_pillow_refuses_is_an_oserror(tmp_path, monkeypatch):
    info = PngImagePlugin.PngInfo()
    info.add_text("Comment", "a" * (PngImagePlugin.MAX_TEXT_CHUNK + 1), zip=True)
    Image.new("L", (4, 4)).save(tmp_path / "long.png", pnginfo=info)
    with pytest.raises(OSError, match="long.png cannot be read: .*too large"):
        read_provenance(tmp_path / "long.png")
    Image.new("L", (40, 40)).save(tmp_path / "huge.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with pytest.raises(OSError, match="huge.png cannot be read: .*exceeds limit"):
        read_provenance(tmp_path / "huge.png")


def file_that_says(folder, **text):
    """The PNG file of somebody who writes into it what he likes."""
    info = PngImagePlugin.PngInfo()
    for keyword, value in {"DigitalSourceType": SYNTHETIC, **text}.items():
        info.add_text(keyword, value)
    Image.new("L", (2, 2)).save(folder / "theirs.png", pnginfo=info)
    return folder / "theirs.png"


@pytest.mark.parametrize("label", ["../../escaped", "/tmp/escaped", "..", "a\\b", "C:a", "a\n"])
def test_a_file_does_not_choose_the_folder_that_it_is_saved_in(label, tmp_path):
    theirs = Image.open(file_that_says(tmp_path, Class=json.dumps(label)))
    for pattern in ("{class_label}.png", "{class_label}/x.png"):
        with pytest.raises(ValueError, match=r"class_label=.* cannot stand in a file name"):
            save_images(theirs, tmp_path / "out" / pattern)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["theirs.png"]
    assert save_images(theirs, tmp_path / "{index}.png") == [tmp_path / "0.png"]
    given = save_images(theirs, tmp_path / "{class_label}.png", {"class_label": "sea cow's (2)"})
    assert given == [tmp_path / "sea cow's (2).png"]


@pytest.mark.parametrize("value", ["[" * 100_000, "NaN", "1e999", "{"])
def test_what_is_no_json_stays_text(value, tmp_path):
    theirs = file_that_says(tmp_path, Seed=value)
    assert read_provenance(theirs)["seed"] == value
    (again,) = save_images(Image.open(theirs), tmp_path / "again.png")
    assert read_provenance(again)["seed"] == value


def test_pil_images_carry_it_if_asked(make_unet, tmp_path):
    pipe = CTMPipeline(make_unet(), CTMScheduler(), add_provenance=True)
    pipe.save_pretrained(tmp_path / "saved")
    pipe = DiffusionPipeline.from_pretrained(tmp_path / "saved")
    output = pipe(num_inference_steps=2, gamma=0.5, generator=seeded(3))
    assert output.images[0].info == png_text(output.provenance[0])
    (path,) = save_images(output.images, tmp_path / "from-pil.png")  # without the output
    assert read_provenance(path) == output.provenance[0] and read_provenance(path)["model"] == "saved"
    plain = DiffusionPipeline.from_pretrained(tmp_path / "saved", add_provenance=False)
    assert plain(generator=seeded(3)).images[0].info == {}


def test_pixels_and_kinds_of_images(tmp_path):
    values = torch.rand(2, 1, 4, 4, generator=seeded())
    expected = (values * 255).round().byte().squeeze(1).numpy()
    for name, images in (
        ("tensor", values),
        ("array", values.permute(0, 2, 3, 1).numpy()),
        ("pil", [Image.fromarray(image) for image in expected]),
        ("output", CTMPipelineOutput(images=values)),
    ):
        paths = save_images(images, tmp_path / f"{name}-{{index}}.png", {"seed": 1})
        assert np.array_equal(np.stack([pixels(path) for path in paths]), expected)
        said = {"digital_source_type": SYNTHETIC, "software": SOFTWARE, "seed": 1}
        assert [read_provenance(path) for path in paths] == [said, said]
    (path,) = save_images(Image.fromarray(expected[0]), tmp_path / "deep" / "one.png")
    assert np.array_equal(pixels(path), expected[0])


def test_what_is_given_goes_first(pipe, tmp_path):
    output = pipe(class_labels=[0, 1])
    given = [{"seed": 5, "digital_source_type": COMPOSITE}, {"gamma": [1.0]}]
    first, second = map(read_provenance, save_images(output, tmp_path / "{index}.png", given))
    assert first == {**output.provenance[0], **given[0]} and second == {**output.provenance[1], **given[1]}


# Nothing is overwritten -----------------------------------------------------------------------------------------------


def test_files_that_exist_stay(tmp_path):
    images = torch.rand(3, 1, 4, 4)
    (tmp_path / "1.png").write_text("mine")
    with pytest.raises(FileExistsError, match=r"1.png exists; choose another path_pattern, or pass overwrite=True"):
        save_images(images, tmp_path / "{index}.png")
    assert os.listdir(tmp_path) == ["1.png"] and (tmp_path / "1.png").read_text() == "mine"  # none was written
    save_images(images, tmp_path / "{index}.png", overwrite=True)
    assert sorted(os.listdir(tmp_path)) == ["0.png", "1.png", "2.png"] and len(read_provenance(tmp_path / "1.png")) == 2


def test_a_file_that_appears_meanwhile_stays(tmp_path, monkeypatch):
    save = Image.Image.save

    def slow(self, path, **options):
        save(self, path, **options)
        (tmp_path / "0.png").write_text("theirs")

    monkeypatch.setattr(Image.Image, "save", slow)
    with pytest.raises(FileExistsError):
        save_images(torch.rand(1, 1, 4, 4), tmp_path / "0.png")
    assert os.listdir(tmp_path) == ["0.png"] and (tmp_path / "0.png").read_text() == "theirs"


def test_a_write_that_fails_leaves_nothing(tmp_path, monkeypatch):
    def full(self, path, **options):
        path.write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(Image.Image, "save", full)
    with pytest.raises(OSError, match="disk full"):
        save_images(torch.rand(1, 1, 4, 4), tmp_path / "0.png")
    assert os.listdir(tmp_path) == []


IMAGES = torch.rand(2, 3, 4, 4)
BAD = {
    "one name": ((IMAGES, "same.png"), "gives several images one name; put {index} in it"),
    "jpeg": ((IMAGES, "{index}.jpg"), "must end with .png"),
    "unknown field": ((IMAGES, "{index}-{prompt}.png"), r"cannot be filled with .*KeyError"),
    "no seed for a format": ((IMAGES, "{index}-{seed:03d}.png"), "cannot be filled with .*TypeError"),
    "latents": ((2 * IMAGES - 1, "{index}.png"), r"floats in \[0, 1\]; those of output_type='latent'"),
    "NaN": ((IMAGES * torch.nan, "{index}.png"), r"floats in \[0, 1\]"),
    "bytes": (((IMAGES * 255).byte().permute(0, 2, 3, 1).numpy(), "{index}.png"), r"floats in \[0, 1\]"),
    "no images": ((["a.png"], "{index}.png"), "images must be PIL images, an array .* got list"),
    "four channels": ((torch.rand(1, 4, 4, 4), "{index}.png"), r"got ndarray of shape \(1, 4, 4, 4\)"),
    "one record for two": ((IMAGES, "{index}.png", [{}]), "provenance has 1 entries for 2 images"),
    "unknown key": ((IMAGES, "{index}.png", {"prompt": "a"}), "provenance has no prompt; it holds digital_source_type"),
    "no JSON": ((IMAGES, "{index}.png", {"gamma": {0.5}}), r"provenance\['gamma'\] must be a value that JSON knows"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_bad_input(name, tmp_path):
    (images, pattern, *rest), message = BAD[name]
    with pytest.raises(ValueError, match=message):
        save_images(images, tmp_path / pattern, *rest)
    assert os.listdir(tmp_path) == []
