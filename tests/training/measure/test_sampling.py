# Copyright 2026 The diffusers-ctm authors. Licensed under the Apache License, Version 2.0.
"""Settings cost and give what they say, and all start from the same noise."""

import numpy as np
import pytest
import torch
from tqdm.auto import tqdm

from diffusers_ctm import CTMPipeline, CTMScheduler, EDMHeunScheduler
from helpers.comparing import close
from training.measure.sampling import Sampling, Setting, class_labels, draw, settings_of


def test_one_step_is_one_setting_whatever_gamma():
    settings = settings_of({"ctm", "heun"}, [1, 3], [0.0, 1.0], [2, 5])
    ctm, heun = settings[:3], settings[3:]
    assert ctm == [Setting("ctm", 1, 0.0), Setting("ctm", 3, 0.0), Setting("ctm", 3, 1.0)]
    assert heun == [Setting("heun", 2), Setting("heun", 5)] == settings_of({"heun"}, [1, 3], [0.0], [2, 5])
    assert [one.name for one in settings] == [
        "1 step", "3 steps, gamma 0", "3 steps, gamma 1", "teacher, Heun 2", "teacher, Heun 5"
    ]  # fmt: skip
    (guided,) = settings_of({"heun"}, [1], [0.0], [2], teacher_is_guided=True)
    assert guided.name == "guided teacher, Heun 2" and guided.nfe == 2 * heun[0].nfe == 6


@pytest.fixture
def pipe(make_unet):
    pipe = CTMPipeline(make_unet(in_channels=1, out_channels=1), CTMScheduler())
    pipe.set_progress_bar_config(disable=True)
    return pipe


def test_settings_cost_what_they_say_and_start_from_the_same_noise(pipe, monkeypatch):
    starts, prepare = [], CTMPipeline.prepare_latents
    monkeypatch.setattr(
        CTMPipeline, "prepare_latents", lambda self, *rest: starts.append(prepare(self, *rest)) or starts[-1]
    )
    pipelines = {"ctm": pipe, "heun": CTMPipeline(pipe.unet, EDMHeunScheduler())}
    for setting in settings_of(pipelines, [1, 3], [0.0, 1.0], [2]):
        draw(pipelines[setting.sampler], setting, 3, None, 1, 2)
        assert pipelines[setting.sampler].num_timesteps == setting.nfe
    assert len(starts) == 4 and all(torch.equal(start, starts[0]) for start in starts)


def test_gamma_has_no_effect_in_one_step_and_passes_over_presets(pipe):
    images = [draw(pipe, Setting("ctm", 1, gamma), 4, None, 0, 0) for gamma in (None, 0.0, 0.5, 1.0)]
    assert images[0].dtype == torch.uint8 and images[0].float().std() > 1
    assert all(torch.equal(image, images[0]) for image in images)
    assert not torch.equal(images[0], draw(pipe, Setting("ctm", 1), 4, None, 0, 1))
    pipe.scheduler = CTMScheduler(presets={"1": {"sigmas": [2.0]}})
    assert torch.equal(draw(pipe, Setting("ctm", 1, 0.5), 4, None, 0, 0), images[0])
    assert not torch.equal(draw(pipe, Setting("ctm", 1), 4, None, 0, 0), images[0])  # the checkpoint's own way


def test_pixels_are_those_of_the_saved_picture(pipe):
    drawn = draw(pipe, Setting("ctm", 3, 0.5), 5, None, 2, 1)
    generator = torch.Generator().manual_seed(2 * 1_000_003 + 1)
    pictures = pipe(batch_size=5, num_inference_steps=3, gamma=0.5, generator=generator).images
    assert np.array_equal(np.stack([np.asarray(picture) for picture in pictures]), drawn[:, 0].numpy())


def test_classes_are_those_of_the_data_or_take_turns():
    real = torch.tensor([0, 0, 0, 1, 2, 2])
    assert class_labels([0, 1, 2], real, 12).bincount().tolist() == [6, 2, 4]
    many = torch.arange(1_000).square() % 7  # shares 1, 2, 2, 0, 2, 0, 0 of 7
    for count in (70, 333, 1_000, 1_400):
        close(
            class_labels(list(range(7)), many, count).bincount(minlength=7) / count,
            many.bincount(minlength=7) / 1_000,
            0,
            1.5 / count,
        )
    assert class_labels([0, 3, 4], None, 7).tolist() == [0, 3, 4, 0, 3, 4, 0]
    assert class_labels(None, real, 7) is None


def test_batches_are_even_and_have_the_classes_of_the_data(make_unet, pipe, monkeypatch):
    pipe.unet = make_unet(in_channels=1, out_channels=1, num_class_embeds=2)
    shown = []
    monkeypatch.setattr(
        "training.measure.sampling.draw",
        lambda pipe, setting, count, labels, *rest: shown.append(labels) or draw(pipe, setting, count, labels, *rest),
    )
    sampling = Sampling({"ctm": pipe}, torch.nn.Flatten(), torch.tensor([0, 0, 0, 1] * 100), 250, 100)
    features, seconds = sampling.features(Setting("ctm", 1, 0.0), 0, tqdm(disable=True))
    assert features.shape == (250, 64) and seconds > 0
    assert [len(labels) for labels in shown] == [83, 83, 84]
    assert torch.cat(shown).bincount()[1] == pytest.approx(250 / 4, abs=1)
