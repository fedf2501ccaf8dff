# Copyright 2026 The diffusers-ctm authors. Licensed under the Apache License, Version 2.0.
"""Calls of one pipeline in threads: each as if it were alone."""

import contextlib
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from diffusers import EDMDPMSolverMultistepScheduler, EDMEulerScheduler

from diffusers_ctm import (
    ClassifierGuidance,
    CTMImg2ImgPipeline,
    CTMInpaintPipeline,
    CTMInversionPipeline,
    CTMPipeline,
    CTMRestorationPipeline,
    CTMScheduler,
    EDMHeunScheduler,
    MaskOperator,
    steps_gamma_grid,
    trajectory_strip,
)
from diffusers_ctm.autoencoder import decode, for_gradients
from helpers.autoencoders import Folding
from helpers.comparing import seeded
from helpers.exact import ExactNetwork, GaussianData, randn


SCHEDULERS = [CTMScheduler, EDMHeunScheduler, EDMEulerScheduler, EDMDPMSolverMultistepScheduler]
GAMMAS = (0.0, 0.4, 1.0)
IMAGE = randn(1, 3, 4, 4, seed=5, dtype=torch.float32).clamp(-1, 1) / 2 + 0.5
KEPT = (randn(1, 1, 4, 4, seed=6) > 0).float()


def pipeline(cls=CTMPipeline, scheduler=CTMScheduler, wait=0.0005, **options):
    unet = ExactNetwork(GaussianData(0.3), sigma_data=0.6, class_shift=[-0.5, 0.0, 0.5])
    unet.register_forward_pre_hook(lambda *_: time.sleep(wait))  # lets the other threads come between
    pipe = cls(unet, CTMScheduler(sigma_data=0.6), **options)
    pipe.scheduler = scheduler.from_config(pipe.scheduler.config)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def options_of(k, **more):
    """Arguments of call number `k`: number of steps, class and noise differ."""
    return {"num_inference_steps": 1 + k % 5, "class_labels": k % 3, "generator": seeded(k), **more}


def latent(k):
    return {**options_of(k), "gamma": GAMMAS[k % 3], "output_type": "latent"}


def inverted(pipe, k):
    return pipe(IMAGE, k % 3, num_inference_steps=1 + k % 5).latents


def decoded(pipe, k):
    return pipe.decode(randn(2, 3, 4, 4, seed=k, dtype=torch.float32), k % 3, 1 + k % 5, output_type="latent").images


def interpolated(pipe, k):
    return pipe.interpolate(IMAGE, IMAGE.flip(-1), [0.2, 0.7], k % 3, 1 + k % 3, output_type="latent").images


# name: (class, call number k -> tensor)
CALLS = {
    "noise to images": (CTMPipeline, lambda pipe, k: pipe(**latent(k)).images),
    "image to image": (CTMImg2ImgPipeline, lambda pipe, k: pipe(IMAGE, 0.3 + 0.1 * (k % 4), **latent(k)).images),
    "inpainting": (CTMInpaintPipeline, lambda pipe, k: pipe(IMAGE, KEPT, **latent(k)).images),
    "restoration": (CTMRestorationPipeline, lambda pipe, k: pipe(IMAGE * KEPT, MaskOperator(KEPT), **latent(k)).images),
    "inversion": (CTMInversionPipeline, inverted),
    "decode": (CTMInversionPipeline, decoded),
    "interpolate": (CTMInversionPipeline, interpolated),
    "strip": (
        CTMPipeline,
        lambda pipe, k: torch.cat(trajectory_strip(pipe, **options_of(k), gamma=1.0, output_type="latent").states),
    ),
    "grid": (
        CTMPipeline,
        lambda pipe, k: torch.cat(steps_gamma_grid(pipe, (1, 1 + k % 4), (0, 1), k % 3, seeded(k), "latent")),
    ),
}


def in_threads(call, count=40):
    with ThreadPoolExecutor(4) as threads:
        return list(threads.map(call, range(count)))


def as_alone(pipe, call):
    alone = [call(pipe, k) for k in range(40)]
    for one, expected in zip(in_threads(lambda k: call(pipe, k)), alone, strict=True):
        assert torch.equal(one, expected)


@pytest.mark.parametrize("name", CALLS)
def test_calls_in_threads_give_what_each_gives_alone(name):
    cls, call = CALLS[name]
    as_alone(pipeline(cls), call)


@pytest.mark.parametrize("scheduler", SCHEDULERS[1:])
def test_so_do_other_samplers(scheduler):
    as_alone(pipeline(scheduler=scheduler), lambda pipe, k: pipe(**options_of(k), output_type="latent").images)


def test_pipelines_of_one_scheduler_and_one_guidance():
    """What `from_pipe` makes shares the scheduler; here a guidance, told the number of classes, is shared too."""
    pipe = pipeline()
    more = pipeline()
    more.unet.config.num_class_embeds = 4  # one class more, which the classifier does not know
    guidance = ClassifierGuidance(lambda x_0: x_0.flatten(1)[:, :3])

    def call(k):
        if k % 2:
            with pytest.raises(ValueError, match="classifier knows 3 classes and the network 4"):
                more(**latent(k), guidance=guidance)
            return None
        return CTMPipeline.from_pipe(pipe)(**latent(k), guidance=guidance).images

    for one, expected in zip(in_threads(call), map(call, range(40)), strict=True):
        assert one is expected is None or torch.equal(one, expected)


def test_callbacks_and_records_are_of_their_own_call():
    pipe = pipeline(add_provenance=True)

    def call(k):
        seen = []

        def callback(own, step, timestep, tensors):
            seen.append((len(own.scheduler.timesteps), own.num_timesteps, own.scheduler.step_index, float(timestep)))
            assert timestep == own.scheduler.timesteps[step]

        output = pipe(**options_of(k), gamma=GAMMAS[k % 3], callback_on_step_end=callback)
        steps = 1 + k % 5
        assert [row[:3] for row in seen] == [(steps, steps, step + 1) for step in range(steps)]
        return output.provenance[0] | {"text": output.images[0].info["Seed"]}

    for k, record in enumerate(in_threads(call)):
        assert (record["seed"], record["num_inference_steps"], record["class_label"]) == (k, 1 + k % 5, k % 3)
        assert record["gamma"] == [pytest.approx(GAMMAS[k % 3])] * (1 + k % 5) and record["text"] == str(k)


@pytest.mark.parametrize("cls", SCHEDULERS)
def test_a_lone_call_shows_its_schedule_in_the_scheduler_that_one_holds(cls):
    pipe = pipeline(scheduler=cls)
    scheduler, during = pipe.scheduler, []

    def callback(own, step, timestep, tensors):
        assert own is not pipe and own.scheduler is not scheduler and own.unet is pipe.unet
        during.append((len(scheduler.timesteps), scheduler.step_index, pipe.num_timesteps))
        if step == 2:
            raise KeyError("stop")

    with pytest.raises(KeyError):
        pipe(class_labels=0, num_inference_steps=3, callback_on_step_end=callback)
    calls = 5 if cls is EDMHeunScheduler else 3
    assert during == [(calls, step + 1, calls) for step in range(3)]
    assert scheduler.step_index == 3  # where the error came
    pipe(class_labels=0, num_inference_steps=2)
    assert pipe.scheduler is scheduler and scheduler.num_inference_steps == 2
    by_hand = cls.from_config(scheduler.config)
    by_hand.set_timesteps(2)
    assert torch.equal(by_hand.sigmas, scheduler.sigmas) and torch.equal(by_hand.timesteps, scheduler.timesteps)
    assert scheduler.step_index == pipe.num_timesteps == len(by_hand.timesteps)


def test_what_a_call_sets_ends_up_in_the_pipeline():
    pipe = pipeline()
    pipe._all_hooks = ["old"]
    pipe.maybe_free_model_hooks = lambda: None

    def callback(own, step, timestep, tensors):
        own.note, own._all_hooks = step, ["new"]  # as offloading renews its hooks

    pipe(class_labels=0, num_inference_steps=2, callback_on_step_end=callback)
    assert pipe.note == 1 and pipe._all_hooks == ["new"]


def test_interrupt_from_outside_stops_all_calls_of_the_pipeline_and_no_other():
    pipe, other = pipeline(), pipeline()
    reached, told = threading.Semaphore(0), threading.Event()

    def call(one):
        steps = []

        def callback(own, step, timestep, tensors):
            steps.append(step)
            if step == 1:
                reached.release()
                assert told.wait(60)

        one(class_labels=0, num_inference_steps=5, callback_on_step_end=callback)
        return len(steps)

    with ThreadPoolExecutor(3) as threads:
        calls = [threads.submit(call, one) for one in (pipe, pipe, other)]
        assert all(reached.acquire(timeout=60) for _ in calls)
        pipe._interrupt = True
        told.set()
        assert [one.result() for one in calls] == [2, 2, 5]
    assert pipe.interrupt and not other.interrupt
    pipe(class_labels=0, num_inference_steps=3)
    assert not pipe.interrupt and pipe.scheduler.step_index == 3


def test_a_closure_over_the_pipeline_stops_it():
    pipe = pipeline()

    def callback(own, step, timestep, tensors):
        pipe._interrupt = step == 1

    pipe(class_labels=0, num_inference_steps=4, callback_on_step_end=callback)
    assert len(pipe.unet.calls) == 2 and pipe.interrupt


# An autoencoder that threads share ------------------------------------------------------------------------------------


class Slow(Folding):
    """Notes the dtypes of its input and its weights while it decodes, which takes longer for some."""

    def decode(self, raw, return_dict):
        before = self.gain.dtype
        time.sleep(0.005 * (1 + raw.max().item() % 3))  # another thread may cast the weights now
        self.noted.append((raw.dtype, before, self.gain.dtype))
        return super().decode(raw, return_dict)


@pytest.mark.parametrize("use", ["decode", "both"])
@pytest.mark.parametrize("upcast", [True, False])
def test_no_thread_sees_weights_that_another_casts(upcast, use):
    vae = Slow(gain=2.0, force_upcast=upcast).half()
    vae.noted = []

    def call(k):
        with for_gradients(vae) if use == "both" and k % 2 else contextlib.nullcontext():
            return decode(vae, torch.full((1, 4, 2, 2), float(k)))

    with ThreadPoolExecutor(4) as threads:
        images = list(threads.map(call, range(12)))
    assert [image.unique().tolist() for image in images] == [[k / 2] for k in range(12)]
    assert all(len(set(dtypes)) == 1 for dtypes in vae.noted)
    assert {dtypes[0] for dtypes in vae.noted} == {
        torch.float32 if upcast or k % 2 and use == "both" else torch.float16 for k in range(2)
    }
    assert vae.dtype == torch.float16


def test_threads_decode_at_once_where_nothing_is_cast():
    vae, inside = Folding(force_upcast=True), threading.Barrier(2, timeout=10)
    plain = vae.decode
    vae.decode = lambda *args, **options: (inside.wait(), plain(*args, **options))[1]
    with ThreadPoolExecutor(2) as threads:
        assert len(list(threads.map(lambda k: decode(vae, torch.zeros(1, 4, 2, 2)), range(2)))) == 2
