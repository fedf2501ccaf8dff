# Copyright 2026 The diffusers-ctm authors. Licensed under the Apache License, Version 2.0.
"""The page's endpoints on a real server: the shown Python makes what is shown, and no request stops the page."""

import argparse
import io
import os
import re
import socket
import subprocess
import sys
import zipfile
from pathlib import Path
from unittest import mock

import gradio as gr
import httpx
import numpy as np
import pytest
import torch
from gradio.components.image_editor import EditorData
from gradio.data_classes import FileData
from gradio_client import Client, handle_file
from PIL import Image, ImageDraw

import app
from demo import actions, controls, examples, page, plots, recipes, requests, uploads
from demo.checkpoints import CHECKPOINTS, Checkpoint, _likelihood, load, shipped
from demo.turns import STOPPED, TURN
from diffusers_ctm import CTMPipeline, CTMScheduler, EDMHeunScheduler, read_provenance
from helpers.loopback_hub import LoopbackHub, Repo
from helpers.places import ROOT
from helpers.serving import serving
from helpers.tiny_networks import make_unet_2d
from training.cli.errors import UserError
from training.hub.client import files_below
from training.report.pictures import grid, png


DIGITS = "digits-ctm"
FILES = ("sample", "trajectory", "steps_and_gamma", "compare", "inpaint", "edit")
FILES += ("interpolate_seeds", "interpolate_images", "guide")


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """The address of the page with the digits."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as changes:
        changes.setenv("GRADIO_TEMP_DIR", str(tmp_path_factory.mktemp("page")))
        changes.setitem(CHECKPOINTS, DIGITS, load("assets/digits-ctm"))
        blocks = app.build()
        _, address, _ = app.start(blocks, prevent_thread_lock=True, quiet=True, mcp_server=True)
        yield address.rstrip("/")
        blocks.close()
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def checkpoints_stay(server):
    with mock.patch.dict(CHECKPOINTS):
        yield


@pytest.fixture(scope="module")
def client(server, tmp_path_factory):
    return Client(
        server, verbose=False, download_files=str(tmp_path_factory.mktemp("downloads")), analytics_enabled=False
    )


@pytest.fixture(scope="module")
def drawings(client):
    """What the example buttons put into the drawing areas, as a client sends it."""
    inpaint, _ = client.predict(DIGITS, "lower half", api_name="/inpaint_example")
    edit, _ = client.predict(DIGITS, "ring", api_name="/edit_example")
    first, last, *_ = client.predict(DIGITS, api_name="/interpolate_example")
    return {
        "inpaint": drawing_of(inpaint["background"], *inpaint["layers"]),
        "edit": drawing_of(edit["background"]),
        "first": handle_file(first),
        "last": handle_file(last),
    }


def drawing_of(background, *layers):
    return {"background": handle_file(background), "layers": [*map(handle_file, layers)], "composite": None}


def arguments_of(name, drawings):
    """Arguments of an endpoint that are not its defaults."""
    return {
        "sample": (DIGITS, "all", 4, 0.5, 7, 12, True),
        "trajectory": (DIGITS, "3", 4, 5),
        "steps_and_gamma": (DIGITS, "8", 2),
        "compare": (DIGITS, "all", 1, 3, 4),
        "inpaint": (DIGITS, drawings["inpaint"], "3", 6, 1.0, 0, 3),
        "edit": (DIGITS, drawings["edit"], "0", 0.5, 3, 0.5, 0, 3),
        "interpolate_seeds": (DIGITS, "3", 4, 9, 2, 5),
        "interpolate_images": (DIGITS, drawings["first"], drawings["last"], "3", "8", 4),
        "guide": (DIGITS, "7", 3.0, 4, 1.0, 0, 4),
        "likelihood": (DIGITS, drawings["first"], "3", 0),
    }[name]


# What is shown --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FILES)
def test_the_python_makes_the_same_files(name, client, drawings, tmp_path, monkeypatch):
    arguments = arguments_of(name, drawings)
    picture, report, code = client.predict(*arguments, api_name=f"/{name}")
    archive = client.predict(*arguments, api_name=f"/{name}_files")
    with zipfile.ZipFile(archive) as file:
        file.extractall(tmp_path)
    assert (tmp_path / "reproduce.py").read_text().strip() == code and re.search(r"\d ms", report)
    given = {path.name: path.read_bytes() for path in (tmp_path / "samples").iterdir()}
    assert len(given) >= 3
    (tmp_path / "samples").rename(tmp_path / "given")
    (tmp_path / "assets").symlink_to(ROOT / "assets")
    monkeypatch.chdir(tmp_path)
    if name == "sample":
        subprocess.run([sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": str(ROOT)}, check=True)
    else:
        exec(compile(code, "reproduce.py", "exec"), {})
    made = {path.name: path.read_bytes() for path in (tmp_path / "samples").iterdir()}
    assert made == given  # the provenance in them included
    assert read_provenance(tmp_path / "samples" / "000.png")["digital_source_type"].startswith("http://cv.iptc.org/")
    if name in ("sample", "interpolate_seeds"):  # the others show more than the images
        images = [Image.open(io.BytesIO(given[key])) for key in sorted(given)]
        assert np.array_equal(np.asarray(grid(images)), np.asarray(Image.open(picture).convert("RGB")))


def pixels(path):
    return np.asarray(Image.open(path).convert("RGB"))


def test_noise_and_gamma(client):
    def run(steps, gamma, seed=0):
        return pixels(client.predict(DIGITS, "3", steps, gamma, seed, 4, api_name="/sample")[0])

    assert np.array_equal(run(1, 0.0), run(1, 1.0))  # there is nothing between the ends of one step
    assert not np.array_equal(run(2, 0.0), run(2, 1.0))
    first, second = run(1, 0.0, seed=5), run(1, 0.0, seed=6)
    half = first.shape[1] // 2  # the second image of one is the first of the other
    assert np.array_equal(first[:half, half + 2 :], second[:half, : half - 2])


def test_the_checkpoints_own_schedule(client):
    def run(steps, gamma, own, name="sample"):
        arguments = (DIGITS, "3", steps, gamma, 0, 4, own) if name == "sample" else (DIGITS, "3", steps, 0, 4, own)
        path, report, _ = client.predict(*arguments, api_name=f"/{name}")
        return pixels(path if name == "sample" else path[0]), report

    pipe = CHECKPOINTS[DIGITS].fresh()
    noise = [torch.Generator().manual_seed(seed) for seed in range(4)]
    tuned = np.asarray(grid(pipe(batch_size=4, class_labels=3, num_inference_steps=2, generator=noise).images))
    picture, report = run(2, 0.0, True)
    assert np.array_equal(picture[..., 0], tuned[..., 0]) and not np.array_equal(picture, run(2, 0.5, False)[0])
    assert "Tuned schedule: noise levels 80, 0.17; gamma 0.594." in report
    assert np.array_equal(run(2, 0.0, True, "compare")[0], picture)
    picture, report = run(3, 0.25, True)  # for which there is none
    assert np.array_equal(picture, run(3, 0.25, False)[0]) and "no schedule for 3 steps: this is gamma 0.25" in report
    with pytest.raises(gr.Error, match="true or false"):
        actions.sample(DIGITS, own_schedule="yes")


def test_evaluations_are_counted(client, drawings):
    report = client.predict(*arguments_of("compare", drawings), api_name="/compare")[1]
    assert (
        "the CTM, 1 network evaluation each" in report
        and "35 network evaluations each" in report
        and "digits-edm" in report
    )
    assert "16 network evaluations" in client.predict(DIGITS, "1", 0, api_name="/steps_and_gamma")[1]
    assert "3 times 8 network evaluations" in client.predict(DIGITS, "1", 4, 0, api_name="/trajectory")[1]


def test_known_pixels_stay(client, drawings):
    images = files_of(client, "inpaint", (DIGITS, drawings["inpaint"], "3", 4, 1.0, 0, 3))
    given, mask = images.pop("image.png"), images.pop("mask.png")
    assert (mask[:4] == 0).all() and (mask[4:] == 255).all()
    for image in images.values():
        assert np.array_equal(image[:4], given[:4])
    assert len({image.tobytes() for image in images.values()}) == 3


def files_of(client, name, arguments):
    with zipfile.ZipFile(client.predict(*arguments, api_name=f"/{name}_files")) as file:
        names = [one for one in file.namelist() if one.endswith(".png")]
        return {one: np.asarray(Image.open(io.BytesIO(file.read(one)))) for one in names}


def test_strength(client, drawings):
    def distance(strength):
        images = files_of(client, "edit", (DIGITS, drawings["edit"], "0", strength, 2, 0.0, 0, 3))
        given = images.pop("image.png").astype(float)
        return np.mean([np.abs(image - given).mean() for image in images.values()])

    assert distance(0.1) < distance(0.5) < distance(1.0)


def test_between_two_seeds_stand_their_images(client):
    between = files_of(client, "interpolate_seeds", (DIGITS, "3", 4, 9, 2, 5))
    for seed, name in ((4, "samples/000.png"), (9, "samples/004.png")):
        alone = files_of(client, "sample", (DIGITS, "3", 2, 0.0, seed, 1))["samples/000.png"].astype(int)
        assert np.abs(alone - between[name]).max() <= 1
    assert not np.array_equal(between["samples/000.png"], between["samples/004.png"])


def test_between_two_pictures_stand_they(client, drawings):
    between = files_of(client, "interpolate_images", arguments_of("interpolate_images", drawings))
    for given, made in (("image.png", "samples/000.png"), ("other.png", "samples/003.png")):
        assert np.abs(between[given].astype(int) - between[made]).mean() < 12


def test_guidance_leads_to_the_class(client):
    network = recipes.load_saved(ROOT / "assets" / "digits-features")

    def share(scale):
        images = files_of(client, "guide", (DIGITS, "3", scale, 8, 1.0, 0, 8))
        batch = torch.from_numpy(np.stack(list(images.values())))[:, None]
        return (network.classify(batch) == 3).float().mean().item()

    assert share(0.0) < 0.4 and share(10.0) > 0.8


def test_a_digit_is_likelier_than_noise(client):
    def bits(which):
        image, label = client.predict(DIGITS, which, api_name="/likelihood_example")
        report = client.predict(DIGITS, handle_file(image), label, 0, api_name="/likelihood")[1]
        assert "of 200 images of the data set digits" in report  # which it carries
        return float(re.search(r"\*\*([\d.]+) bits", report)[1])

    assert bits("image") + 1 < bits("noise")


def test_likelihood_is_that_of_the_package(client, drawings):
    report = client.predict(*arguments_of("likelihood", drawings), api_name="/likelihood")[1]
    pipe = CHECKPOINTS[DIGITS].fresh()
    image = uploads.fitted(uploads.open_upload(drawings["first"]["path"]), pipe)
    noise = torch.Generator().manual_seed(0)
    expected = recipes.log_likelihood(pipe, image, 3, generator=noise, rtol=1e-6, atol=1e-6).bits_per_dim.item()
    assert float(re.search(r"\*\*([\d.]+) bits", report)[1]) == pytest.approx(expected, abs=0.02)


# The API --------------------------------------------------------------------------------------------------------------


def test_every_action_is_an_endpoint_with_words(client, server):
    endpoints = client.view_api(return_format="dict")["named_endpoints"]
    examples = {"inpaint_example", "edit_example", "interpolate_example", "likelihood_example"}
    expected = {"likelihood", *FILES, *(f"{name}_files" for name in FILES), *examples}
    assert {name.lstrip("/") for name in endpoints} == expected
    assert all(len(endpoint["description"]) > 20 for endpoint in endpoints.values())
    tools = {one["name"]: one for one in httpx.get(f"{server}/gradio_api/mcp/schema").json()}
    assert sorted(tools) == sorted(name.lstrip("/") for name in endpoints)  # each once, by the name of its endpoint
    assert len({tool["description"] for tool in tools.values()}) == len(tools)
    tool = tools["sample"]["inputSchema"]["properties"]
    assert "noise" in tools["sample"]["description"] and "0 is deterministic" in tool["gamma"]["description"]
    assert ".zip" in tools["sample_files"]["description"] and tools["sample_files"]["inputSchema"]["properties"] == tool
    assert "enum" in tool["model"] and "enum" not in tool["label"]  # other checkpoints have other classes


ABSURD = [
    ((DIGITS, "all", 1000, 0.5, 0, 16), "maximum value 40"),
    ((DIGITS, "all", 0, 0.5, 0, 16), "minimum value 1"),
    ((DIGITS, "all", 2, -0.5, 0, 16), "minimum value 0"),
    ((DIGITS, "all", 2.5, 0.5, 0, 16), "Steps must be a whole number"),
    ((DIGITS, "all", None, 0.5, 0, 16), "a `slider` component"),
    ((DIGITS, "all", [1, 2], 0.5, 0, 16), "Slider|slider"),
    ((DIGITS, "all", "many", 0.5, 0, 16), "Slider|slider"),
    ((DIGITS, "all", 2, 0.5, -1, 16), "minimum value 0"),
    ((DIGITS, "all", 2, 0.5, 10**30, 16), "maximum value"),
    ((DIGITS, "all", 2, 0.5, 0, 10**6), "maximum value 36"),
    ((DIGITS, "eleven", 2, 0.5, 0, 16), "Choose a class: 0, 1"),
    ((DIGITS, "10", 2, 0.5, 0, 16), "Choose a class"),
    ((DIGITS, "9" * 10**6, 2, 0.5, 0, 16), "Choose a class"),
    ((DIGITS, {"a": 1}, 2, 0.5, 0, 16), "Choose a class"),
    (("../../etc", "all", 2, 0.5, 0, 16), "not in the list of choices"),
    ((["digits-ctm"], "all", 2, 0.5, 0, 16), "no checkpoint|choices|Error"),
]


@pytest.mark.parametrize("arguments, message", ABSURD, ids=range(len(ABSURD)))
def test_absurd_arguments_are_refused_in_words(client, arguments, message):
    with pytest.raises(Exception, match=message):
        client.predict(*arguments, api_name="/sample")
    assert client.predict(DIGITS, "3", 1, 0.0, 0, 1, api_name="/sample")[0]


@pytest.mark.parametrize("value", [float("nan"), float("inf"), True, "1", None, [1]])
def test_what_is_no_number_is_refused(server, value):
    with pytest.raises(gr.Error, match="gamma must be a number from 0 to 1"):
        actions.sample(DIGITS, "all", 2, value, 0, 1)


def test_bad_pictures_are_refused_in_words(client, tmp_path):
    bad = {
        "text.png": (b"no picture", "cannot be read"),
        "drawing.svg": (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "cannot be read|SVG"),
        "empty.png": (b"", "cannot be read|empty"),
        "cut.png": (png(Image.new("RGB", (64, 64)))[:60], "cannot be read"),
        "wide.png": (png(Image.new("1", (20000, 20000))), "up to 4096 pixels on a side"),
        "flat.png": (png(Image.new("1", (20000, 2))), "20000x2 pixels; the limit is 4096"),
        "deep.png": (png(Image.new("I;16", (8, 8))), "more than 8 bits"),
    }
    (tmp_path / "blank.png").write_bytes(png(Image.new("RGB", (9, 9))))
    refused = [
        ("likelihood", (None, "3", 0), "Put in a picture first"),
        ("edit", (None, "3", 0.5, 1, 0.0, 0, 1), "Draw something first"),
        ("inpaint", (drawing_of(tmp_path / "blank.png"), "3", 1, 1.0, 0, 1), "Draw over the part"),
    ]
    for name, (content, message) in bad.items():
        (tmp_path / name).write_bytes(content)
        refused.append(("likelihood", (handle_file(tmp_path / name), "3", 0), message))
        refused.append(("edit", (drawing_of(tmp_path / name), "3", 0.5, 1, 0.0, 0, 1), message))
    for action, arguments, message in refused:
        with pytest.raises(Exception, match=message):
            client.predict(DIGITS, *arguments, api_name=f"/{action}")
    assert client.predict(DIGITS, "3", 1, 0.0, 0, 1, api_name="/sample")[0]


def test_a_file_that_is_too_long_is_not_taken(server):
    files = {"files": ("long.png", b"0" * (uploads.MOST_BYTES + 1))}
    assert httpx.post(f"{server}/gradio_api/upload", files=files).status_code == 413


def test_transparent_and_animated_pictures(client, tmp_path):
    Image.new("RGBA", (40, 20), (255, 255, 255, 0)).save(tmp_path / "transparent.png")
    frames = [Image.new("L", (8, 8), value) for value in (255, 0)]
    frames[0].save(tmp_path / "two.gif", save_all=True, append_images=frames[1:])
    for name, value in (("transparent.png", 0), ("two.gif", 255)):  # the digits' background is black
        arguments = (DIGITS, drawing_of(tmp_path / name), "3", 0.5, 1, 0.0, 0, 1)
        assert np.array_equal(files_of(client, "edit", arguments)["image.png"], np.full((8, 8), value))


@pytest.mark.parametrize(
    "path",
    [
        "/etc/passwd",
        ROOT / "app.py",
        ROOT / "assets/digits-ctm/model_index.json",
        ROOT / "assets/digits-ctm/unet/diffusion_pytorch_model.safetensors",
        "/proc/self/environ",
    ],
)
def test_no_file_is_readable(server, path):
    for address in (f"file={path}", f"file={ROOT}/assets/../{path}", f"file={str(path).replace('/', '%2F')}"):
        assert httpx.get(f"{server}/gradio_api/{address}").status_code in (403, 404)
    given = {"path": str(path), "meta": {"_type": "gradio.FileData"}}  # as if it had been uploaded
    drawing = {"background": given, "layers": [given], "composite": given}
    for name, data in (("likelihood", [DIGITS, given, "3", 0]), ("edit", [DIGITS, drawing, "3", 0.5, 1, 0.0, 0, 1])):
        event = httpx.post(f"{server}/gradio_api/call/{name}", json={"data": data}).json()["event_id"]
        answer = httpx.get(f"{server}/gradio_api/call/{name}/{event}", timeout=60).text
        assert "event: error" in answer and "not uploaded by a user" in answer, answer


def test_drawings_in_memory_are_few(server):
    with gr.Blocks():
        drawing = uploads.Drawing()

    def send(name, kind, index, content=b"x"):
        data = {"type": kind, "index": index, "file": b"", "id": name}
        drawing.accept_blobs(uploads.AcceptBlobs(data=data, files=[("file", content)]))

    for i in range(100):
        send(str(i), "background", None)
    assert len(drawing.blob_storage) == uploads.MOST_DRAWINGS and "99" in drawing.blob_storage
    with pytest.raises(gr.Error, match="8 layers"):
        send("100", "layer", 10**9)
    with pytest.raises(gr.Error, match="too large"):
        send("100", "layer", 0, b"0" * (uploads.MOST_BYTES + 1))


def test_layers_are_few_and_small(server, tmp_path):
    Image.new("1", (2000, 1000)).save(tmp_path / "layer.png")
    with gr.Blocks():
        drawing = uploads.Drawing()
    file = FileData(path=str(tmp_path / "layer.png"))
    found = drawing.preprocess(EditorData(background=file, layers=[file] * 8, composite=file))
    assert [layer.size for layer in found["layers"]] == [(uploads.CANVAS, uploads.CANVAS)] * 8
    assert found["background"].size == (2000, 1000) and found["composite"] is None
    with pytest.raises(gr.Error, match="8 layers at most"):
        drawing.preprocess(EditorData(layers=[file] * 9))


def test_drawing_over_a_third_of_a_pixel_hides_it():
    layer = Image.new("RGBA", (uploads.CANVAS, uploads.CANVAS))
    layer.paste((1, 2, 3, 255), (0, 0, 32, 12))  # of pixels of 32 x 32
    layer.paste((1, 2, 3, 255), (64, 0, 96, 8))
    mask = np.asarray(uploads.mask_of({"layers": [layer]}, (8, 8)))
    assert mask[0, 0] == 255 and mask.sum() == 255


# Links, checkpoints, options ------------------------------------------------------------------------------------------


def test_values_of_a_link(server):
    with gr.Blocks():
        slider, number, label = controls.gamma(0.0), controls.seed(), controls.class_choice(every=True)
        own = controls.own_schedule("gamma")
    assert controls.restored(slider, "0.35", DIGITS) == 0.35 and controls.restored(number, "12", DIGITS) == 12
    assert [controls.restored(slider, text, DIGITS) for text in ("2", "nan", "x", "-0.1")] == [None] * 4
    assert controls.restored(number, "1e99", DIGITS) is None and controls.restored(number, "inf", DIGITS) is None
    assert controls.restored(label, "7", DIGITS)["value"] == "7" and controls.restored(label, "<b>", DIGITS) is None
    assert [controls.restored(own, text, DIGITS)["value"] for text in ("true", "false")] == [True, False]
    assert own.visible and "carries for 2 and 4 steps" in own.info and controls.restored(own, "yes", DIGITS) is None
    CHECKPOINTS["plain"] = Checkpoint("plain", tiny())
    assert own.properties_for("plain")["visible"] is False and label.properties_for("plain")["visible"] is False
    assert controls.restored(own, "true", "plain") is None and not controls.restored(own, "false", "plain")["value"]


def with_classes(names, **options):
    unet = make_unet_2d(random=False, num_class_embeds=len(names), in_channels=1, out_channels=1, sample_size=8)
    return Checkpoint("named", CTMPipeline(unet, CTMScheduler(), id2label=dict(enumerate(names)), **options))


LONG_NAME = "cash machine, cash dispenser, " + ", ".join(["automated teller machine"] * 5)


def test_every_class_can_be_chosen_by_what_the_page_calls_it():
    checkpoint = with_classes(["crane", "cat", "Cat", "crane", "all", LONG_NAME])
    assert checkpoint.classes == ["crane (0)", "cat", "Cat", "crane (3)", "all (4)", LONG_NAME]
    assert [requests.one_class(checkpoint, name) for name in checkpoint.classes] == [0, 1, 2, 3, 4, 5]
    assert requests.one_class(checkpoint, "CRANE (3)") == requests.one_class(checkpoint, "3") == 3
    assert requests.classes(checkpoint, "all", 6) == [0, 1, 2, 3, 4, 5]
    for name in ("crane", "CAT", "dog", "6", "9" * 5000):
        with pytest.raises(gr.Error, match="Choose a class: crane \\(0\\), cat"):
            requests.one_class(checkpoint, name)


def test_classes_without_images_in_training_are_not_offered():
    CHECKPOINTS["named"] = checkpoint = with_classes(["a", "b", "c", "d"], trained_classes=[1, 3])
    assert requests.classes(checkpoint, "all", 3) == [1, 3, 1] and requests.one_class(checkpoint, "d") == 3
    assert controls.class_choices("named", every=True)["choices"] == ["all", "b", "d"]
    assert {examples.label_at(checkpoint, k) for k in range(8)} == {"b", "d"}
    with pytest.raises(gr.Error, match="Choose a class: b, d"):
        requests.one_class(checkpoint, "a")
    asked = mock.Mock(side_effect=recipes.sample)
    with mock.patch.object(recipes, "sample", asked):
        examples.own_sample(checkpoint, 2)
    assert asked.call_args.args[1] == [1]


@pytest.mark.parametrize("size", [(8, 16), (16, 8), (8, 8)], ids=str)
def test_drawings_lie_where_they_are_drawn(size):
    """A mask drawn over what is white is white there; the examples too, for images of every shape."""
    CHECKPOINTS["wide"] = checkpoint = Checkpoint("wide", tiny(1, size))
    drawn, layer = Image.new("RGBA", (256, 256), "black"), Image.new("RGBA", (256, 256))
    for box in ((0, 0, 255, 95), (64, 0, 95, 255)):
        ImageDraw.Draw(drawn).rectangle(box, "white")
        ImageDraw.Draw(layer).rectangle(box, (200, 60, 160, 255))
    picture, mask = uploads.fitted(drawn, checkpoint.pipe), uploads.mask_of({"layers": [layer]}, checkpoint.size)
    assert picture.size == size[::-1] and np.array_equal(np.asarray(picture), np.asarray(mask))
    example, _ = examples.inpaint_example("wide", "every other row")
    mask = np.asarray(uploads.mask_of(example, checkpoint.size))
    assert np.array_equal(mask, np.where(np.arange(size[0])[:, None] % 2, 255, np.zeros(size)))
    sample = examples.own_sample(checkpoint, 5).resize(size[::-1], Image.Resampling.NEAREST)
    assert np.array_equal(np.asarray(uploads.fitted(example["background"], checkpoint.pipe)), np.asarray(sample))


class Flagging:
    def __call__(self, images):
        return images, [i % 2 == 0 for i in range(len(images))]


def tiny(channels=3, size=8, **options):
    unet = make_unet_2d(random=False, in_channels=channels, out_channels=channels, sample_size=size)
    pipe = CTMPipeline(unet, CTMScheduler(), **options)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def test_a_color_checkpoint_without_classes():
    CHECKPOINTS["color"] = Checkpoint("color", tiny())
    drawing, _ = examples.inpaint_example("color", "middle")
    strokes, label = examples.edit_example("color", "ring")
    first, last, *labels = examples.interpolate_example("color")
    rgba = first.convert("RGBA")
    for made, count in (
        (actions.sample("color", "all", 2, 0.5, 0, 3), 3),
        (actions.trajectory("color", label, 2, 0), 18),
        (actions.steps_and_gamma("color", label, 0), 25),
        (actions.compare("color", label, 1, 0, 2), 4),
        (actions.inpaint("color", drawing, label, 2, 1.0, 0, 2), 2),
        (actions.edit("color", strokes, label, 0.5, 2, 0.0, 0, 2), 2),
        (actions.interpolate_seeds("color", label, 0, 1, 1, 3), 3),
        (actions.interpolate_images("color", rgba, last.convert("RGBA"), *labels, 3), 3),
    ):
        images = getattr(made.images, "images", made.images)
        assert len(images) == count and images[0].mode == "RGB"
    assert "the CTM's exact score" in actions.compare("color", label, 1, 0, 2).report
    found = actions.likelihood("color", rgba, label, 0)
    assert "of 32 samples of this checkpoint" in found.report
    with pytest.raises(gr.Error, match="cannot be guided here"):
        actions.guide("color", label, 3.0, 1, 1.0, 0, 2)


def test_flagged_images_are_black_and_said():
    CHECKPOINTS["checked"] = Checkpoint("checked", tiny(safety_checker=Flagging()))
    made, both = actions.sample("checked", "all", 1, 0.0, 0, 4), actions.compare("checked", "all", 1, 0, 2)
    assert "flagged 2 of 4 images" in made.report
    for images in (made.images.images, both.images):
        assert [np.asarray(image).max() == 0 for image in images] == [True, False, True, False]


def test_a_later_movement_ends_a_run_and_no_other(server):
    CHECKPOINTS["color"], seen = Checkpoint("color", tiny()), []

    def move_on(*_):
        seen.append(TURN.get())
        if len(seen) == 3:
            assert httpx.post(f"{server}/gradio_api/run/stop", json={"data": ["ada-1"]}).status_code == 200

    CHECKPOINTS["color"].pipe.unet.register_forward_pre_hook(move_on)
    call = page.in_turn(page.guarded(actions.sample, lambda made: made.report))
    arguments = ("color", "all", 9, 0.0, 0, 1, False)
    assert call(*arguments, "ada-1") == gr.skip() and seen == ["ada-1"] * 3  # of nine steps
    for turn in ("bob-1", "ada-2"):
        seen.clear()
        assert "9 network evaluations" in call(*arguments, turn) and seen == [turn] * 9
    assert call(*arguments, "ada-1") == gr.skip() and len(seen) == 9  # one that waited ends before it starts
    for turn in (*map(str, range(2000)), "x" * 10**6, "", None):
        actions.stop(turn)
    assert len(STOPPED) == 1024 and "ada-1" not in STOPPED and max(map(len, STOPPED)) == 64
    assert TURN.get() is None and "9 network evaluations" in actions.sample(*arguments).report  # the API has no turns


def test_requests_do_not_share_a_scheduler():
    checkpoint = CHECKPOINTS[DIGITS]
    one, two, before = checkpoint.fresh(), checkpoint.fresh(), checkpoint.pipe.scheduler
    recipes.heun(one, [3], 2, [0])
    assert one.unet is two.unet and type(one.scheduler) is EDMHeunScheduler
    assert checkpoint.pipe.scheduler is before and type(two.scheduler) is CTMScheduler


def test_the_shipped_checkpoints():
    assert shipped()[0] == "assets/mnist-ctm" and "assets/digits-edm" not in shipped()
    digits = CHECKPOINTS[DIGITS]
    assert digits.name == DIGITS and digits.teacher[0] == "assets/digits-edm"
    assert digits.classifier == ("assets/digits-features", [str(k) for k in range(10)])
    assert Checkpoint("assets/digits-ctm", tiny()).classifier is None  # color images
    rows = plots.distances(digits.evaluation)
    assert {row["gamma"] for row in rows} == {"0", "0.5", "1", "Heun"}
    assert sum(row["evaluations"] == 1 for row in rows) == 3  # one step belongs to every gamma
    emoji = load("assets/emoji-ctm")
    assert emoji.teacher[0] == "assets/emoji-edm" and emoji.channels == 3 and emoji.size == (64, 64)
    assert len(emoji.classes) == 9 and emoji.classes[8] == "flags"  # "no class" is not offered
    assert emoji.classifier == ("assets/emoji-features", emoji.classes)
    what, bits = emoji.likelihood
    assert what == "images of the data set twemoji" and len(bits) == 200 and min(bits) < max(bits) < 0
    assert "cc-by-4.0" in emoji.notice and "Twitter, Inc and other contributors" in emoji.notice


def test_an_address_at_which_nothing_can_listen_is_refused_before_anything_is_loaded(monkeypatch):
    monkeypatch.setattr(app, "load", lambda source: pytest.fail("loaded"))
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        message = f"Cannot listen at 127.0.0.1, port {port}: .*in use.* Give another --port"
        with pytest.raises(SystemExit, match=message):
            app.main(["--port", str(port)])
    with pytest.raises(SystemExit, match=r"Cannot listen at 192\.0\.2\.1: .*--host"):  # of no machine (RFC 5737)
        app.main(["--host", "192.0.2.1"])
    private = [app.check_address(host, port) for host in ("127.0.0.1", "localhost", "0.0.0.0")]
    assert private == [True, True, False]


def test_a_checkpoint_that_does_not_fit(tmp_path):
    tiny(channels=4).save_pretrained(tmp_path / "four")
    tiny(size=1024).save_pretrained(tmp_path / "large")
    for name, message in (
        (str(tmp_path / "none"), "cannot be loaded"),
        ("assets/digits-edm", "is no CTM but a CTMPipeline with EDMHeunScheduler"),
        (str(tmp_path / "four"), "4 channels"),
        (str(tmp_path / "large"), "1024, 1024.*up to 512 pixels"),
    ):
        with pytest.raises(UserError, match=message):
            load(name)
        with pytest.raises(SystemExit, match=message):
            app.main(["--model", name])


@pytest.mark.parametrize("images", [[], ["x"], [float("nan")], None, 3])
def test_a_strange_report_of_likelihoods_is_left_out(images):
    report = {"results": [{"sampler": "ctm", "method": "ode", "images": images}], "options": {"dataset_name": "a/b.c"}}
    assert _likelihood(report) is None and _likelihood({}) is None and _likelihood({"results": 1}) is None
    report["results"][0]["images"] = [1, 2.5]
    assert _likelihood(report) == ("images of the data set b", [1.0, 2.5])


def test_a_large_network_compares_with_fewer(monkeypatch):
    monkeypatch.setattr(actions, "LONGEST_COMPARISON", 0)
    what, bits = actions.among(Checkpoint("color", tiny()), lambda *_, **__: None)
    assert what == "samples of this checkpoint" and len(bits) == 8


def test_a_checkpoint_says_what_it_asks(tmp_path):
    tiny(requires_safety_checker=True).save_pretrained(tmp_path)
    (tmp_path / "README.md").write_text("---\nlicense: cc-by-4.0\n---\n")
    (tmp_path / "NOTICE.md").write_text("Graphics by somebody.")
    checkpoint = load(str(tmp_path))
    notices = ("cc-by-4.0", "Graphics by somebody", "shown unchecked", "synthetic")
    assert all(words in checkpoint.notice for words in notices)
    assert checkpoint.source == tmp_path.name  # not where it lies
    for options in (["--host", "0.0.0.0"], ["--share"], ["--root_path", "/ctm"]):
        with pytest.raises(SystemExit, match="asks for a safety checker and has none"):
            app.main(["--model", str(tmp_path), *options])


def test_options(tmp_path, capsys):
    (tmp_path / "users").write_text("ada:love:lace\n\nbob:b\n")
    assert app.parse(["--auth", str(tmp_path / "users")]).auth == [("ada", "love:lace"), ("bob", "b")]
    (tmp_path / "of_notepad").write_bytes("ädä:löve\r\n".encode("utf-8-sig"))
    assert app.parse(["--auth", str(tmp_path / "of_notepad")]).auth == [("ädä", "löve")]
    (tmp_path / "utf16").write_bytes("ada:love\r\n".encode("utf-16"))
    with pytest.raises(argparse.ArgumentTypeError, match="utf16 cannot be read: 'utf-8' codec"):
        app.user_and_password(str(tmp_path / "utf16"))
    (tmp_path / "wrong").write_text("ada\n")
    (tmp_path / "latin").write_text("ada:\xfc\n", encoding="latin-1")
    for arguments in (
        ["--auth", str(tmp_path / "wrong")],
        ["--auth", str(tmp_path / "latin")],
        ["--auth", str(tmp_path / "none")],
        ["--threads", "0"],
        ["--port", "99999"],
        ["--root_path", "ctm"],
        ["--help"],
    ):
        with pytest.raises(SystemExit):
            app.parse(arguments)
    assert "unencrypted" in capsys.readouterr().out


def test_behind_a_web_server_the_page_names_its_files_by_the_outer_path(tmp_path, monkeypatch):
    monkeypatch.setenv("GRADIO_TEMP_DIR", str(tmp_path))
    blocks = app.build()
    _, address, _ = app.start(blocks, prevent_thread_lock=True, quiet=True, root_path="/ctm")
    try:
        config = httpx.get(f"{address}config", headers={"host": "example.com", "x-forwarded-proto": "https"}).json()
        assert config["root"] == "https://example.com/ctm"
    finally:
        blocks.close()


def test_nothing_is_sent_to_anybody(server):
    assert httpx.get(f"{server}/config").json()["analytics_enabled"] is False


def test_a_checkpoint_of_the_hub_behind_a_password(tmp_path):
    """`python app.py --model user/name --auth FILE`, in a process of its own."""
    pipe, model, made = tiny(), tmp_path / "model", tmp_path / "made"
    pipe.save_pretrained(model)
    made.mkdir()
    (model / "README.md").write_text("---\nlicense: mit\n---\n")
    (tmp_path / "users").write_text("ada:secret\n")
    with LoopbackHub() as hub:
        hub.repos["models/team/tiny"] = Repo()
        hub.repos["models/team/tiny"].commit({key: Path(path).read_bytes() for key, path in files_below(model).items()})
        environment = hub.environment(tmp_path / "cache") | {"TMPDIR": str(made)}
        options = ("--model", "team/tiny", "--auth", str(tmp_path / "users"))
        with serving(*options, environment=environment) as (address, _):
            assert httpx.get(f"{address}/config").status_code == 401
            assert httpx.post(f"{address}/gradio_api/call/sample", json={"data": ["team/tiny"]}).status_code == 401
            options = {"verbose": False, "analytics_enabled": False, "download_files": str(tmp_path)}
            client = Client(address, auth=("ada", "secret"), **options)
            picture, report, code = client.predict("team/tiny", "all", 1, 0.0, 0, 2, api_name="/sample")
            assert "2 images" in report and 'from_pretrained("team/tiny")' in code
            with pytest.raises(Exception, match="not in the list of choices"):
                client.predict(DIGITS, "all", 1, 0.0, 0, 2, api_name="/sample")  # nothing but what was asked
            assert list(made.glob("ctm-page-*/*"))
    assert not list(made.glob("ctm-page-*"))  # what it made is gone with it
    expected = recipes.sample(pipe, None, 1, 0.0, range(2)).images
    assert np.array_equal(np.asarray(grid(expected)), pixels(picture))
