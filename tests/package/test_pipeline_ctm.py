# Copyright 2026 The diffusers-ctm authors. Licensed under the Apache License, Version 2.0.
"""CTMPipeline on exact networks, where the right image is known, and on tiny real ones."""

import io
import math

import numpy as np
import pytest
import torch
from accelerate import cpu_offload
from diffusers import (
    DDIMScheduler,
    DiffusionPipeline,
    EDMDPMSolverMultistepScheduler,
    EDMEulerScheduler,
    ModelMixin,
    UNet2DModel,
)
from diffusers.callbacks import MultiPipelineCallbacks, PipelineCallback
from diffusers.configuration_utils import ConfigMixin

from diffusers_ctm import (
    CTMImg2ImgPipeline,
    CTMInpaintPipeline,
    CTMInversionPipeline,
    CTMPipeline,
    CTMRestorationPipeline,
    CTMScheduler,
    CTMUNet2DModel,
    EDMHeunScheduler,
    GrayscaleOperator,
    LossGuidance,
    log_likelihood,
    steps_gamma_grid,
    trajectory_strip,
)
from diffusers_ctm.preconditioning import Preconditioning
from diffusers_ctm.two_times import input_dtype
from helpers.comparing import close, seeded
from helpers.exact import ExactDenoiserNetwork, ExactNetwork, GaussianData, randn
from helpers.tiny_networks import make_unet_2d


DATA = GaussianData(0.3, mean=0.2)
SHIFTS = [-1.5, -0.5, 0.5, 1.5]
NAMES = {0: "Ant", 1: "bee", 2: "sea cow", 3: "Dog"}


def pipeline(unet=None, scheduler=None, **options):
    pipe = CTMPipeline(unet or exact_network(), scheduler or CTMScheduler(sigma_data=0.6), **options)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def exact_network(cls=ExactNetwork, **options):
    return cls(DATA, sigma_data=0.6, **options)


def of_classes():
    """A pipeline whose images lie around the shift of their class."""
    return pipeline(ExactNetwork(GaussianData(0.1), sigma_data=0.6, class_shift=SHIFTS), id2label=NAMES)


def classes_of(images):
    """The classes that `images` of `of_classes()` show."""
    return [SHIFTS.index(round(float(m) - 0.5) + 0.5) for m in images.mean((1, 2, 3))]


def latents(batch=2, channels=3, size=4):
    return randn(batch, channels, size, size, seed=3, dtype=torch.float32)


# The right image ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scale", [1.0, 1000.0])
@pytest.mark.parametrize("steps", [None, 1, 4])
def test_the_exact_network_gives_the_exact_image(steps, scale):
    pipe = pipeline(exact_network(timestep_scale=scale), CTMScheduler(sigma_data=0.6, timestep_scale=scale))
    images = pipe(latents=latents(), num_inference_steps=steps, output_type="latent").images
    assert images.dtype == torch.float32
    close(images, DATA.jump(80 * latents(), 80.0, 0.002))
    assert (
        pipe.num_timesteps == len(pipe.unet.calls) == (steps or 1)
    )  # one evaluation per step; one step is the default


@pytest.mark.parametrize("options", [{"gamma": 0.0}, {"gamma": 0.6}, {"gamma": 1.0}, {"gamma": [1.0, 0.0, 0.3]}])
def test_equals_the_loop_written_by_hand(make_unet, options):
    pipe = pipeline(make_unet(num_class_embeds=4), CTMScheduler(sigma_data=0.7, timestep_scale=1000.0))
    labels = torch.tensor([2, 0])
    images = pipe(
        class_labels=labels, num_inference_steps=3, generator=seeded(8), output_type="latent", **options
    ).images

    generator, gammas = seeded(8), np.broadcast_to(options["gamma"], 3)
    preconditioning, x = Preconditioning(0.7, 1000.0), 80 * torch.randn(2, 3, 8, 8, generator=generator)
    levels = [(80 ** (1 / 7) + i / 3 * (0.002 ** (1 / 7) - 80 ** (1 / 7))) ** 7 for i in range(4)]
    for t, t_next, gamma in zip(levels[:-1], levels[1:], gammas, strict=True):
        s = 0.002 + math.sqrt(1 - gamma**2) * (t_next - 0.002)
        with torch.no_grad():
            x = preconditioning.jump(pipe.unet, x, torch.tensor(t), torch.tensor(s), class_labels=labels)
        if gamma and t_next > 0.0021:
            x = x + math.sqrt(t_next**2 - s**2) * torch.randn(x.shape, generator=generator)
    close(images, x, rtol=1e-4, atol=2e-4)  # the network is steep in 250 ln t, which is float32
    assert pipe.scheduler.config.gamma == 0.0  # what a call asks for is not kept


OTHERS = {
    # class, steps, and how far from the exact image that many steps may end
    "Heun": (EDMHeunScheduler, 80, 5e-3),
    "Euler": (EDMEulerScheduler, 200, 3e-2),
    "DPM": (EDMDPMSolverMultistepScheduler, 60, 1e-2),
}


@pytest.mark.parametrize("scale", [1.0, 1000.0])
@pytest.mark.parametrize("network", [ExactNetwork, ExactDenoiserNetwork])
@pytest.mark.parametrize("name", OTHERS)
def test_other_samplers_put_in_place(name, network, scale, tmp_path):
    """A CTM asked for its denoiser, and an EDM teacher, by every scheduler that knows EDM preconditioning."""
    scheduler_class, steps, tolerance = OTHERS[name]
    x = latents(64)
    exact = DATA.jump(80 * x.double(), 80.0, 0.0)
    CTMScheduler(sigma_data=0.6, timestep_scale=scale, prediction_type="edm").save_pretrained(tmp_path)
    for config in (CTMScheduler(sigma_data=0.6, timestep_scale=scale).config, CTMScheduler.load_config(tmp_path)):
        pipe = pipeline(exact_network(network, timestep_scale=scale), EDMHeunScheduler.from_config(config))
        pipe.scheduler = scheduler_class.from_config(config)
        images = pipe(latents=x, num_inference_steps=steps, output_type="latent").images
        close(images, exact, rtol=0, atol=tolerance)
        assert abs(images.std() / exact.std() - 1) < 0.02 and abs(images.std() / 0.3 - 1) < 0.05
        assert all(s is None for _, s in pipe.unet.calls)
        # and back, by way of its config
        back = pipeline(exact_network(timestep_scale=scale), CTMScheduler.from_config(pipe.scheduler.config))
        close(back(latents=x, output_type="latent").images, exact, rtol=0, atol=1e-4)


def test_default_number_of_steps():
    pipe = pipeline(scheduler=EDMHeunScheduler(sigma_data=0.6))
    pipe(latents=latents())
    assert pipe.num_timesteps == 35
    pipe.scheduler = EDMEulerScheduler.from_config(pipe.scheduler.config)
    pipe(latents=latents())
    assert pipe.num_timesteps == 18


# Noise and batches ----------------------------------------------------------------------------------------------------


def test_the_generator_decides():
    pipe = pipeline()

    def sample(generator, gamma):
        options = {"num_inference_steps": 3, "gamma": gamma, "output_type": "latent"}
        return pipe(batch_size=2, generator=generator, **options).images

    for gamma in (0.0, 0.7):
        assert torch.equal(sample(seeded(4), gamma), sample(seeded(4), gamma))
        assert not torch.equal(sample(seeded(4), gamma), sample(seeded(5), gamma))
    torch.manual_seed(0)
    assert not torch.equal(sample(None, 0.0), sample(None, 0.0))
    torch.manual_seed(0)
    first = sample(None, 0.7)
    torch.manual_seed(0)
    assert torch.equal(sample(None, 0.7), first)


@pytest.mark.parametrize("gamma", [0.0, 0.7])
def test_a_list_of_generators_is_each_image_alone(gamma):
    pipe, options = of_classes(), {"num_inference_steps": 3, "gamma": gamma, "output_type": "latent"}
    together = pipe(generator=[seeded(i) for i in range(6)], **options).images  # labels are drawn from them, too
    assert len(together) == 6 and len(set(classes_of(together))) > 1
    for i in range(6):
        assert torch.equal(pipe(generator=seeded(i), **options).images, together[i : i + 1])


def test_latents_are_unit_noise():
    pipe = pipeline()
    given = pipe(latents=latents(), output_type="latent").images
    assert torch.equal(pipe(latents=latents().double(), output_type="latent").images, given)
    drawn = torch.randn(2, 3, 4, 4, generator=seeded(9))
    by_generator = pipe(batch_size=2, generator=seeded(9), output_type="latent").images
    assert torch.equal(pipe(latents=drawn, output_type="latent").images, by_generator)
    # with latents the generator gives the noise of the steps alone
    options = {"num_inference_steps": 2, "gamma": 1.0, "output_type": "latent"}
    assert not torch.equal(
        pipe(latents=drawn, generator=seeded(1), **options).images,
        pipe(latents=drawn, generator=seeded(2), **options).images,
    )
    before = drawn.clone()
    pipe(latents=drawn, **options)
    assert torch.equal(drawn, before)  # the caller's tensor is left alone


@pytest.mark.parametrize(
    "arguments, count",
    [
        ({}, 1),
        ({"batch_size": 3}, 3),
        ({"class_labels": [1, 2, 0, 3]}, 4),
        ({"class_labels": 1}, 1),
        ({"class_labels": [1], "batch_size": 3}, 3),
        ({"class_labels": "bee", "batch_size": 3}, 3),
        ({"class_labels": 1, "latents": 2}, 2),
        ({"latents": 2}, 2),
        ({"generator": 3}, 3),
        ({"class_labels": 2, "generator": 3}, 3),
        ({"class_labels": [1, 2], "generator": 2, "latents": 2, "batch_size": 2}, 2),
    ],
)
def test_batch_size_follows_from_what_is_given(arguments, count):
    arguments = dict(arguments)
    if "latents" in arguments:
        arguments["latents"] = latents(arguments["latents"])
    if "generator" in arguments:
        arguments["generator"] = [seeded(i) for i in range(arguments["generator"])]
    assert len(of_classes()(**arguments).images) == count


# Classes --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "labels, expected",
    [
        (2, [2]),
        ("sea cow", [2]),
        ("SEA COW", [2]),
        (["dog", "Ant", 1], [3, 0, 1]),
        ((3, 0), [3, 0]),
        (torch.tensor([3, 1]), [3, 1]),
        (torch.tensor(3), [3]),
        (np.array([0, 2]), [0, 2]),
        (np.int64(1), [1]),
    ],
)
def test_labels(labels, expected):
    pipe = of_classes()
    assert pipe.get_label_ids(labels if not torch.is_tensor(labels) else labels.tolist()) == expected
    assert classes_of(pipe(class_labels=labels, output_type="latent").images) == expected


def test_random_labels_come_from_the_generator():
    pipe = of_classes()
    first = classes_of(pipe(batch_size=40, generator=seeded(1), output_type="latent").images)
    assert set(first) == {0, 1, 2, 3}
    assert classes_of(pipe(batch_size=40, generator=seeded(1), output_type="latent").images) == first
    assert classes_of(pipe(batch_size=40, generator=seeded(2), output_type="latent").images) != first
    torch.manual_seed(0)
    assert set(classes_of(pipe(batch_size=40, output_type="latent").images)) == {0, 1, 2, 3}


@pytest.mark.parametrize(
    "labels, message",
    [
        ("cat", "class_labels='cat' is not the name of a class. Known names: Ant, bee, Dog, sea cow"),
        (["bee", "cat"], "class_labels='cat' is not the name of a class"),
        (4, "is not a class; this network knows 0 to 3"),
        ([0, -7], "is not a class; this network knows 0 to 3"),
        ([1.5], "class_labels must be whole numbers or names"),
        (1.0, "class_labels must be whole numbers or names"),
        (torch.tensor([1.0]), "class_labels must be whole numbers or names"),
        (np.array([0.0]), "class_labels must be whole numbers or names"),
        (True, "class_labels must be whole numbers or names"),
        ([[1, 2]], "class_labels must be whole numbers or names"),
        ({1, 2}, "class_labels must be a number, a name or a list"),
        ([], "class_labels is empty"),
        ([0, 1, 2], "class_labels has 3 entries for batch_size=2; pass one or 2"),
    ],
)
def test_labels_that_are_refused(labels, message):
    with pytest.raises(ValueError, match=message):
        of_classes()(class_labels=labels, batch_size=2)


def test_labels_without_classes_or_names():
    with pytest.raises(ValueError, match="this network is unconditional"):
        pipeline()(class_labels=1)
    no_names = pipeline(ExactNetwork(GaussianData(0.1), sigma_data=0.6, class_shift=SHIFTS))
    with pytest.raises(ValueError, match="carries no names, pass a number"):
        no_names(class_labels="bee")
    for wrong in (["ant", "bee"], {"ant": 0}, 3):
        with pytest.raises(ValueError, match="id2label must be a dict of names by number of the class"):
            pipeline(id2label=wrong)


# Steps ----------------------------------------------------------------------------------------------------------------


def test_gamma_per_step_and_levels_of_ones_own():
    pipe, levels = pipeline(), [80.0, 9.0, 0.7]
    pipe(latents=latents(), sigmas=levels, gamma=[0.0, 0.8, 0.5])
    seen = torch.tensor(pipe.unet.calls)
    middle = 0.002 + 0.6 * (0.7 - 0.002)
    close(seen, [(80.0, 9.0), (9.0, middle), (0.7, 0.002)])
    pipe.unet.calls.clear()
    pipe(latents=latents(), timesteps=[math.log(level) / 4 for level in levels], gamma=[0.0, 0.8, 0.5])
    close(torch.tensor(pipe.unet.calls), seen)
    pipe.scheduler = EDMHeunScheduler.from_config(pipe.scheduler.config)
    pipe.unet.calls.clear()
    pipe(latents=latents(), sigmas=levels)
    close(torch.tensor([float(t) for t, _ in pipe.unet.calls]), [80.0, 9.0, 9.0, 0.7, 0.7])


def test_target_levels_and_the_end_reach_the_scheduler():
    pipe = pipeline()
    pipe(latents=latents(), sigmas=[80.0, 9.0], target_sigmas=[4.0, 0.002])
    close(torch.tensor(pipe.unet.calls), [(80.0, 4.0), (9.0, 0.002)])
    noisy = pipe(latents=latents(), num_inference_steps=3, final_sigma=0.5, output_type="latent").images
    close(noisy, DATA.jump(80 * latents(), 80.0, 0.5))
    pipe.unet.calls.clear()
    clean = pipe(latents=latents(), num_inference_steps=3, final_sigma=0.0, output_type="latent").images
    close(clean, DATA.jump(80 * latents(), 80.0, 0.0), atol=3e-5)
    assert len(pipe.unet.calls) == 3


def test_presets_of_the_checkpoint_are_used(make_unet, tmp_path):
    presets = {"1": {"sigmas": [40.0]}, "2": {"sigmas": [70.0, 1.5], "gamma": [0.6, 0.0]}}
    pipe = pipeline(make_unet(), CTMScheduler(presets=presets))
    pipe.save_pretrained(tmp_path)
    again = DiffusionPipeline.from_pretrained(tmp_path)
    start, plain = latents(size=8), pipeline(make_unet(), CTMScheduler())

    def sample(pipe, **options):
        pipe.set_progress_bar_config(disable=True)
        return pipe(latents=start, generator=seeded(), output_type="latent", **options).images

    for one in (pipe, again, CTMPipeline.from_pipe(again)):
        assert torch.equal(sample(one), sample(plain, sigmas=[40.0]))  # one step is the default number
        assert torch.equal(sample(one, num_inference_steps=2), sample(plain, **presets["2"]))
        for options in ({"num_inference_steps": 2, "gamma": 0.0}, {"sigmas": [80.0, 3.0]}, {"num_inference_steps": 3}):
            assert torch.equal(sample(one, **options), sample(plain, **options))
    with pytest.raises(ValueError, match="EDMHeunScheduler takes no `target_sigmas`; CTMScheduler does"):
        CTMPipeline.from_pipe(pipe, scheduler=EDMHeunScheduler())(target_sigmas=[1.0])


def test_runs_leave_nothing_behind():
    pipe, options = pipeline(), {"latents": latents(), "output_type": "latent", "num_inference_steps": 3}
    first = pipe(**options, gamma=0.0).images
    pipe(**options, gamma=1.0)
    pipe(latents=latents(5), sigmas=[2.0])
    with pytest.raises(RuntimeError, match="stop"):
        pipe(**options, callback_on_step_end=raise_stop)
    assert torch.equal(pipe(**options, gamma=0.0).images, first)

    heun = pipeline(scheduler=EDMHeunScheduler(sigma_data=0.6))
    first = heun(**options).images
    with pytest.raises(RuntimeError, match="stop"):
        heun(**options, callback_on_step_end=raise_stop)  # between predictor and corrector
    assert torch.equal(heun(**options).images, first)


def raise_stop(*args):
    raise RuntimeError("stop")


# Callbacks ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cls", [CTMScheduler, EDMHeunScheduler, EDMEulerScheduler, EDMDPMSolverMultistepScheduler])
def test_a_run_starts_at_its_first_step(cls, monkeypatch):
    """Not at the one whose timestep is nearest, which is a question to the device."""
    pipe = pipeline(make_unet_2d(), CTMScheduler())
    pipe.scheduler = cls.from_config(pipe.scheduler.config)
    monkeypatch.setattr(pipe.scheduler, "index_for_timestep", None)
    pipe(num_inference_steps=3)
    assert pipe.scheduler.step_index == pipe.num_timesteps


def test_callback_sees_every_step():
    pipe, seen = pipeline(), []

    def callback(pipe, step, timestep, tensors):
        seen.append((step, timestep, tensors["latents"].clone(), set(tensors)))
        return {}

    images = pipe(latents=latents(), num_inference_steps=4, callback_on_step_end=callback, output_type="latent").images
    assert [step for step, *_ in seen] == [0, 1, 2, 3]
    assert torch.equal(torch.stack([timestep for _, timestep, *_ in seen]), pipe.scheduler.timesteps)
    assert all(names == {"latents"} for *_, names in seen) and torch.equal(seen[-1][2], images)
    for i in range(4):  # the states of the exact trajectory
        sigma = float(pipe.scheduler.sigmas[i + 1])
        close(seen[i][2], DATA.jump(80 * latents(), 80.0, sigma), atol=1e-5 * (1 + sigma))


def test_callback_may_change_the_latents():
    pipe = pipeline()
    options = {"latents": latents(), "num_inference_steps": 2, "output_type": "latent"}
    other = 5 * randn(2, 3, 4, 4, seed=6, dtype=torch.float32)

    def at_the_first_step(pipe, step, timestep, tensors):
        return {"latents": other} if step == 0 else tensors

    images = pipe(**options, callback_on_step_end=at_the_first_step).images
    close(images, DATA.jump(other, float(pipe.scheduler.sigmas[1]), 0.002))
    assert torch.equal(pipe(**options, callback_on_step_end=lambda *args: None).images, pipe(**options).images)


@pytest.mark.parametrize(
    ("answer", "got"),
    [
        (lambda latents: latents, "Tensor"),
        (lambda latents: {"latent": latents}, r"a dict with the shapes \{'latent': \(2, 3, 4, 4\)\}"),
        (lambda latents: {"latents": latents, "prompt_embeds": None}, "'prompt_embeds'"),
        (lambda latents: {"latents": latents[:1]}, r"\{'latents': \(1, 3, 4, 4\)\}"),
        (lambda latents: {"latents": None}, "'latents'"),
    ],
    ids=["tensor", "misspelled", "not ours", "fewer", "nothing"],
)
def test_a_callback_that_returns_something_else_is_an_error(answer, got):
    def callback(pipe, step, timestep, tensors):
        return answer(tensors["latents"])

    message = rf"must return None, or .'latents': a tensor of shape \(2, 3, 4, 4\).; got .*{got}"
    with pytest.raises(ValueError, match=message):
        pipeline()(latents=latents(), callback_on_step_end=callback)
    with pytest.raises(ValueError, match=message):
        CTMInversionPipeline.from_pipe(pipeline()).decode(latents(), callback_on_step_end=callback)


def test_latents_of_a_callback_keep_the_precision():
    def halved(pipe, step, timestep, tensors):
        return {"latents": tensors["latents"].bfloat16()}

    images = pipeline()(latents=latents(), callback_on_step_end=halved, output_type="latent").images
    assert images.dtype == torch.float32


def test_callback_objects():
    class Shift(PipelineCallback):
        tensor_inputs = ["latents"]

        def callback_fn(self, pipeline, step_index, timestep, callback_kwargs):
            if step_index == 1:
                callback_kwargs["latents"] = callback_kwargs["latents"] + 1
            return callback_kwargs

    pipe, options = pipeline(), {"latents": latents(), "num_inference_steps": 2, "output_type": "latent"}
    plain = pipe(**options).images
    close(pipe(**options, callback_on_step_end=Shift()).images, plain + 1)
    close(pipe(**options, callback_on_step_end=MultiPipelineCallbacks([Shift(), Shift()])).images, plain + 2)
    Shift.tensor_inputs = ["noise"]
    with pytest.raises(ValueError, match="may hold"):
        pipe(**options, callback_on_step_end=Shift())


@pytest.mark.parametrize("scheduler_class", [CTMScheduler, EDMHeunScheduler])
def test_interrupt_stops_after_the_step(scheduler_class):
    pipe, states = pipeline(scheduler=scheduler_class(sigma_data=0.6)), []
    assert not pipe.interrupt

    def callback(pipe, step, timestep, tensors):
        states.append(tensors["latents"])
        pipe._interrupt = step == 1
        return tensors

    options = {"latents": latents(), "num_inference_steps": 4, "output_type": "latent"}
    images = pipe(**options, callback_on_step_end=callback).images
    assert pipe.interrupt and len(pipe.unet.calls) == len(states) == 2 and torch.equal(images, states[1])
    assert torch.equal(pipe(**options).images, pipeline(scheduler=scheduler_class(sigma_data=0.6))(**options).images)
    assert not pipe.interrupt


# Output ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("channels, mode", [(1, "L"), (3, "RGB")])
def test_output_types(channels, mode):
    wide = ExactNetwork(GaussianData(0.8), sigma_data=0.6, channels=channels, size=(4, 6))  # beyond [-1, 1]
    pipe = pipeline(wide)
    start = randn(2, channels, 4, 6, dtype=torch.float32)
    images = {name: pipe(latents=start, output_type=name).images for name in ("latent", "pt", "np", "pil")}
    exact = GaussianData(0.8).jump(80 * start, 80.0, 0.002)
    close(images["latent"], exact)
    assert images["latent"].abs().max() > 1
    in_range = ((exact + 1) / 2).clamp(0, 1)
    close(images["pt"], in_range)
    assert isinstance(images["np"], np.ndarray)
    close(torch.from_numpy(images["np"]), in_range.permute(0, 2, 3, 1))
    assert len(images["pil"]) == 2
    for image, array in zip(images["pil"], images["np"], strict=True):
        assert image.mode == mode and image.size == (6, 4)
        assert np.array_equal(np.asarray(image).reshape(4, 6, channels), (array * 255).round().astype(np.uint8))
    assert pipe(latents=start).images[0].mode == mode  # PIL is the default
    close(pipe(latents=start, output_type="pt", return_dict=False)[0], images["pt"])
    assert isinstance(pipe(latents=start, return_dict=False), tuple)


def test_half_precision_network_keeps_the_state_in_float32(make_unet):
    unet = make_unet(num_class_embeds=4)
    options = {"class_labels": [1, 2], "num_inference_steps": 4, "gamma": 0.5, "output_type": "latent"}
    pipe = pipeline(unet, CTMScheduler())
    expected = pipe(**options, generator=seeded()).images
    pipe.to(torch.bfloat16)
    seen, shown = [], []
    unet.register_forward_pre_hook(lambda module, args: seen.append([a.dtype for a in args]))
    unet.register_forward_pre_hook(lambda module, args: shown.append(args[0]))
    images = pipe(**options, generator=seeded()).images
    assert seen == [[torch.bfloat16, torch.float32, torch.float32]] * 4  # times are never rounded
    assert images.dtype == torch.float32 and not torch.equal(images, images.bfloat16().float())
    start = 80 * torch.randn(2, 3, 8, 8, generator=seeded())
    assert torch.equal(shown[0], (start * float(1 / np.sqrt(80**2 + 0.5**2))).bfloat16())  # rounded once, after scaling
    assert (images - expected).abs().max() < 0.1 * expected.abs().max()


# Networks that give NaN -----------------------------------------------------------------------------------------------


class Broken(ExactNetwork):
    """NaN, or `value`, from its call number `bad` on, in one pixel of the first image; class 1 is "no class"."""

    def __init__(self, bad, value=math.nan):
        super().__init__(DATA, sigma_data=0.6, class_shift=[0.0, 0.0])
        self.bad, self.value = bad, value

    def forward(self, *args, **kwargs):
        output = super().forward(*args, **kwargs)[0].clone()
        if len(self.calls) >= self.bad:
            output[0, 0, 0, 0] = self.value
        return (output,)


GUIDANCE = {"guidance": LossGuidance(lambda x_0: x_0.square().sum((1, 2, 3)))}
LEVELS = [80.0, 5.0, 0.5]
GIVEN = {
    CTMPipeline: (),
    CTMImg2ImgPipeline: (torch.zeros(1, 3, 4, 4),),
    CTMInpaintPipeline: (torch.zeros(1, 3, 4, 4), torch.ones(1, 1, 4, 4)),
    CTMRestorationPipeline: (torch.zeros(1, 1, 4, 4), GrayscaleOperator()),
}


@pytest.mark.parametrize("options", [{}, GUIDANCE, {"guidance_scale": 2.0}, {**GUIDANCE, "guidance_scale": 2.0}])
@pytest.mark.parametrize("output_type", ["latent", "pil"])
@pytest.mark.parametrize("cls", GIVEN)
def test_a_network_that_gives_nan_is_an_error(cls, output_type, options):
    asked = []
    for bad, value in ((1, math.nan), (2, math.inf), (3, -math.inf)):
        pipe = cls(
            Broken(bad, value),
            CTMScheduler(sigma_data=0.6),
            null_class=1,
            safety_checker=lambda images: asked.append(images),
        )
        pipe.set_progress_bar_config(disable=True)
        with pytest.raises(
            ValueError, match=f"network gave NaN .*in step {bad} of 3, at noise level {LEVELS[bad - 1]:g}"
        ):
            pipe(*GIVEN[cls], class_labels=[0, 0], sigmas=LEVELS, output_type=output_type, **options)
    assert not asked
    pipe = cls(Broken(4), CTMScheduler(sigma_data=0.6), null_class=1)  # it breaks later than that
    pipe.set_progress_bar_config(disable=True)
    pipe(*GIVEN[cls], class_labels=[0, 0], sigmas=LEVELS, **options)


@pytest.mark.parametrize(
    "cls, count", [(EDMHeunScheduler, 5), (EDMEulerScheduler, 3), (EDMDPMSolverMultistepScheduler, 3)]
)
def test_so_do_other_samplers_and_callbacks(cls, count):
    pipe = pipeline(Broken(2))
    pipe.scheduler = cls.from_config(pipe.scheduler.config)
    with pytest.raises(
        ValueError, match=f"The network gave NaN .*in step 2 of {count}, at noise level .*torch.bfloat16"
    ):
        pipe(class_labels=0, num_inference_steps=3)

    def to_nan(pipe, step, timestep, tensors):
        return {"latents": tensors["latents"] * (math.nan if step == 0 else 1.0)}

    with pytest.raises(ValueError, match=f"The network, or the callback, gave NaN .*in step 1 of {count}"):
        pipeline(Broken(9), pipe.scheduler)(class_labels=0, num_inference_steps=3, callback_on_step_end=to_nan)


def test_other_ways_to_sample_say_so_too():
    inverter = CTMInversionPipeline.from_pipe(pipeline(Broken(3).eval()))
    for call, where in (
        (lambda: inverter(torch.zeros(1, 3, 4, 4), 0, 4), r"step 2 of 4, at noise level 0\.\d+"),  # two calls each
        (lambda: inverter.decode(latents(), 0, 4), "step 2 of 4, at noise level 17"),
        (lambda: steps_gamma_grid(inverter, (1, 4), (0, 1), 0, seeded()), "step 3 of 4, at noise level 2.515"),
        (lambda: trajectory_strip(inverter, 4, class_labels=0), "step 3 of 4"),
        (lambda: log_likelihood(inverter, torch.zeros(1, 3, 4, 4), 0), r"evaluation 3 of \d+, at noise level"),
        (
            lambda: log_likelihood(inverter, torch.zeros(2, 3, 4, 4), 0, "elbo", num_draws=2),
            "evaluation 3 of 4, at noise levels",
        ),
    ):
        inverter.unet.calls.clear()
        inverter.set_progress_bar_config(disable=True)
        with pytest.raises(ValueError, match=f"The network.* gave NaN or infinite values in {where}"):
            call()


@pytest.mark.parametrize("variant", [None, "ema"])
@pytest.mark.parametrize("first, second", [({"max_shard_size": "5KB"}, {}), ({}, {"safe_serialization": False})])
def test_what_was_saved_last_is_loaded(first, second, variant, tmp_path):
    pipe = pipeline(make_unet_2d(num_class_embeds=4), CTMScheduler())
    pipe.save_pretrained(tmp_path, variant=variant, **first)
    pipe.save_pretrained(tmp_path, variant="other")
    torch.nn.init.constant_(pipe.unet.conv_out.bias, 7.0)
    pipe.save_pretrained(tmp_path, variant=variant, **second)
    assert (CTMPipeline.from_pretrained(tmp_path, variant=variant).unet.conv_out.bias == 7).all()
    if not first:  # diffusers removes the files of other variants that are in several parts
        assert (CTMPipeline.from_pretrained(tmp_path, variant="other").unet.conv_out.bias != 7).all()


# What does not fit ----------------------------------------------------------------------------------------------------


def test_schedulers_that_do_not_fit():
    with pytest.raises(ValueError, match="DDIMScheduler does not know EDM preconditioning.*from_config"):
        pipeline(scheduler=DDIMScheduler())
    with pytest.raises(
        ValueError, match="EDMEulerScheduler does not say which time.*register_to_config.timestep_scale=1.0"
    ):
        pipeline(scheduler=EDMEulerScheduler(sigma_data=0.6))
    pipe = pipeline()
    pipe.scheduler = DDIMScheduler()
    with pytest.raises(ValueError, match="DDIMScheduler does not know EDM preconditioning"):
        pipe(latents=latents())
    for other in (CTMScheduler(), EDMHeunScheduler(sigma_data=0.5), EDMEulerScheduler(sigma_data=0.5)):
        pipe.scheduler = other
        with pytest.raises(ValueError, match="sigma_data=0.5, .*, but this network was loaded with .*sigma_data=0.6, "):
            pipe(latents=latents())
    pipe.scheduler = CTMScheduler(sigma_data=0.6, timestep_scale=1000.0)
    with pytest.raises(ValueError, match="timestep_scale=1000.0, but this network .*, timestep_scale=1.0. Make"):
        pipe(latents=latents())
    pipe.scheduler = CTMScheduler(sigma_data=0.6)  # the error does no harm
    close(pipe(latents=latents(), output_type="latent").images, DATA.jump(80 * latents(), 80.0, 0.002))


def test_a_scheduler_without_a_scale_takes_that_of_the_network():
    pipe = pipeline(exact_network(timestep_scale=1000.0), CTMScheduler(sigma_data=0.6, timestep_scale=1000.0))
    pipe.scheduler = EDMDPMSolverMultistepScheduler(sigma_data=0.6)
    images = pipe(latents=latents(), num_inference_steps=60, output_type="latent").images
    close(images, DATA.jump(80 * latents(), 80.0, 0.0), rtol=0, atol=1e-2)
    assert pipe.scheduler.config["timestep_scale"] == 1000.0
    euler = EDMEulerScheduler(sigma_data=0.6)
    euler.register_to_config(timestep_scale=1000.0)  # as the error says
    images = pipeline(exact_network(timestep_scale=1000.0), euler)(
        latents=latents(), num_inference_steps=200, output_type="latent"
    ).images
    close(images, DATA.jump(80 * latents(), 80.0, 0.0), rtol=0, atol=3e-2)


def test_networks_that_do_not_fit(make_unet):
    with pytest.raises(
        ValueError, match="CTMScheduler needs a network with two times, and UNet2DModel has one.*EDMHeunScheduler"
    ):
        pipeline(make_unet(UNet2DModel), CTMScheduler())
    pipe = pipeline(make_unet(UNet2DModel), EDMHeunScheduler())
    pipe.scheduler = CTMScheduler()
    with pytest.raises(ValueError, match="needs a network with two times"):
        pipe()


@pytest.mark.parametrize("scheduler_class", [EDMHeunScheduler, EDMEulerScheduler, EDMDPMSolverMultistepScheduler])
def test_options_that_a_scheduler_does_not_take(scheduler_class):
    pipe = pipeline()
    pipe.scheduler = scheduler_class.from_config(pipe.scheduler.config)
    with pytest.raises(ValueError, match=f"{scheduler_class.__name__} takes no `gamma`; CTMScheduler does"):
        pipe(gamma=0.5)
    if scheduler_class is not EDMHeunScheduler:
        for options in ({"sigmas": [80.0, 1.0]}, {"timesteps": [1.0, 0.0]}):
            with pytest.raises(ValueError, match="takes no `(sigmas|timesteps)`; CTMScheduler does"):
                pipe(**options)
    for steps in (0, -1):
        with pytest.raises(ValueError, match="num_inference_steps must be a whole number >= 1"):
            pipe(num_inference_steps=steps)


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"output_type": "tensor"}, "output_type must be 'pil', 'np', 'pt' or 'latent', got 'tensor'"),
        ({"batch_size": 0}, "batch_size must be a whole number >= 1"),
        ({"batch_size": 2.0}, "batch_size must be a whole number >= 1"),
        ({"num_inference_steps": "2"}, "num_inference_steps must be a whole number >= 1, got '2'"),
        ({"latents": np.zeros((2, 3, 4, 4))}, r"latents must be a tensor of shape \(B, C, H, W\), got ndarray"),
        ({"latents": torch.zeros(3, 4, 4)}, r"latents must be a tensor .* got shape \(3, 4, 4\)"),
        ({"generator": 0}, "generator must be a torch.Generator, .*, or a list of them, got 0"),
        ({"generator": [0, 1]}, r"or a list of them, got \[0, 1\]"),
        ({"generator": (torch.Generator(), torch.Generator())}, "or a list of them"),
        ({"gamma": "0.5"}, "gamma must be a number or a list of numbers, got '0.5'"),
        ({"sigmas": [80.0, None]}, "sigmas must be a number or a list of numbers"),
        ({"latents": torch.zeros(2, 3, 4, 5)}, r"latents must have shape \(2, 3, 4, 4\), got \(2, 3, 4, 5\)"),
        ({"latents": torch.zeros(2, 3, 4, 4), "batch_size": 3}, r"latents must have shape \(3, 3, 4, 4\)"),
        ({"generator": [torch.Generator()] * 3, "batch_size": 2}, "generator is a list of 3 for batch_size=2"),
        ({"generator": []}, "generator is an empty list"),
        ({"callback_on_step_end_tensor_inputs": ["noise"]}, "may hold \\['latents'\\], got \\['noise'\\]"),
        ({"num_inference_steps": 2, "sigmas": [1.0]}, "exactly one of"),
        ({"sigmas": [1.0, 2.0]}, "strictly descending"),
        ({"timesteps": [17, 3]}, "not indices"),
        ({"gamma": 1.5}, r"gamma must lie in \[0, 1\]"),
        ({"gamma": [0.5, 0.5]}, r"one value per step \(1\)"),
    ],
)
def test_arguments_that_do_not_fit(arguments, message):
    pipe = pipeline()
    with pytest.raises(ValueError, match=message):
        pipe(**arguments)
    assert not pipe.unet.calls  # before any work


def test_network_without_a_size():
    pipe = pipeline(exact_network(size=None))
    with pytest.raises(ValueError, match="no sample_size; pass `latents`"):
        pipe()
    start = randn(1, 3, 2, 5, dtype=torch.float32)
    close(pipe(latents=start, output_type="latent").images, DATA.jump(80 * start, 80.0, 0.002))


# A pipeline of diffusers ----------------------------------------------------------------------------------------------


def test_components_and_from_pipe(make_unet):
    pipe = pipeline(make_unet(num_class_embeds=4), CTMScheduler(gamma=0.3), id2label=NAMES)
    assert set(pipe.components) == {"unet", "vae", "scheduler", "safety_checker", "feature_extractor"}
    options = {"class_labels": "bee", "num_inference_steps": 2, "output_type": "latent"}
    expected = pipe(**options, generator=seeded()).images
    heun = EDMHeunScheduler.from_config(pipe.scheduler.config)
    for again in (CTMPipeline(**pipe.components, id2label=NAMES), CTMPipeline.from_pipe(pipe)):
        assert again.unet is pipe.unet
        again.set_progress_bar_config(disable=True)
        assert torch.equal(again(**options, generator=seeded()).images, expected)
    assert CTMPipeline.from_pipe(pipe, scheduler=heun).scheduler is heun


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_from_pipe_keeps_the_precision_of_each_component(make_unet, dtype):
    class Checker(ModelMixin, ConfigMixin):
        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.ones(1))

        def forward(self, images):
            return images, [False] * len(images)

    unet = make_unet().to(dtype)
    weights = {name: value.clone() for name, value in unet.state_dict().items()}
    pipe = pipeline(unet, CTMScheduler(), safety_checker=Checker())
    for cls in (CTMPipeline, CTMImg2ImgPipeline, CTMInpaintPipeline, CTMRestorationPipeline, CTMInversionPipeline):
        for again in (cls.from_pipe(pipe), cls.from_pipe(pipe, dtype=None)):
            assert again.unet is unet and again.unet.dtype == dtype and again.safety_checker.dtype == torch.float32
    assert all(torch.equal(value, weights[name]) for name, value in unet.state_dict().items())
    assert CTMUNet2DModel.from_unet(make_unet(UNet2DModel).to(dtype)).dtype == dtype
    assert CTMPipeline.from_pipe(pipe, dtype=torch.float64).unet.dtype == torch.float64
    assert CTMPipeline.from_pipe(pipe, dtype=torch.bfloat16).to("cpu", torch.float32).unet.dtype == torch.float32


def test_offload_hooks(monkeypatch):
    # moving to a GPU and back needs one; what a pipeline owes to it is this
    pipe, calls = pipeline(), []
    modules = {name for name, value in pipe.components.items() if isinstance(value, torch.nn.Module)}
    assert CTMPipeline.model_cpu_offload_seq == "unet->vae" and modules == {"unet"}  # and a vae where there is one
    monkeypatch.setattr(pipe, "maybe_free_model_hooks", lambda: calls.append(len(pipe.unet.calls)))
    pipe(latents=latents(), num_inference_steps=3)
    assert calls == [3]  # once, after the last evaluation


ONLOADED = torch.device("cpu:0")  # which is not what a weight on the CPU says
HOOKS = {
    "none": lambda unet: None,
    "sequential offload": lambda unet: cpu_offload(unet, execution_device=torch.device("cpu")),
    "offload of leaves": lambda unet: unet.enable_group_offload(ONLOADED, offload_type="leaf_level"),
    "offload of blocks": lambda unet: unet.enable_group_offload(
        ONLOADED, offload_type="block_level", num_blocks_per_group=1
    ),
    "casting": lambda unet: unet.enable_layerwise_casting(storage_dtype=torch.float16, compute_dtype=torch.float32),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("hook", HOOKS)
def test_device_and_dtype_of_a_call_are_those_that_diffusers_finds(make_unet, hook, dtype):
    pipe = pipeline(make_unet().to(dtype))
    HOOKS[hook](pipe.unet)
    assert pipe._execution_device == DiffusionPipeline._execution_device.fget(pipe)
    assert (pipe._execution_device == ONLOADED) == hook.startswith("offload")
    assert input_dtype(pipe.unet) == pipe.unet.dtype == (torch.float32 if hook == "casting" else dtype)


def test_a_call_does_not_walk_through_the_network(make_unet, monkeypatch):
    """A walk takes a tenth of a small network's evaluation. diffusers takes one to tell a device or a dtype."""
    pipe, walks = pipeline(make_unet(num_class_embeds=4)), []
    walk = pipe.unet.named_modules
    monkeypatch.setattr(pipe.unet, "named_modules", lambda *args, **more: walks.append(args) or walk(*args, **more))
    for options in ({}, {"num_inference_steps": 3, "gamma": 0.5}):
        pipe(class_labels=[0, 3], **options)
    assert not walks
    assert DiffusionPipeline._execution_device.fget(pipe) and walks  # which it would take


@pytest.mark.parametrize("cls", [CTMPipeline, CTMImg2ImgPipeline, CTMInversionPipeline])
def test_names_of_components_are_those_that_diffusers_finds(cls):
    pipe = cls(exact_network(), CTMScheduler(sigma_data=0.6))
    for asked in (cls, pipe):
        expected = DiffusionPipeline._get_signature_keys.__func__(cls, asked)
        for _ in range(2):
            names = cls._get_signature_keys(asked)
            assert tuple(names) == tuple(expected)
            names[0].clear()  # a caller's own list


def test_the_progress_bar_counts_network_evaluations_where_it_is_shown():
    shown = {}
    for hidden in (False, True):
        file, pipe = io.StringIO(), pipeline()
        pipe.set_progress_bar_config(file=file, disable=hidden)
        pipe(num_inference_steps=3)
        shown[hidden] = file.getvalue()
    assert "3/3" in shown[False] and shown[True] == ""


@pytest.mark.parametrize("loader", [CTMPipeline, DiffusionPipeline])
def test_saved_and_loaded_it_is_the_same(make_unet, loader, tmp_path):
    unet, scheduler = make_unet(num_class_embeds=4), CTMScheduler(sigma_data=0.7, timestep_scale=1000.0, gamma=0.4)
    pipe = pipeline(unet, scheduler, id2label=NAMES)
    pipe.save_pretrained(tmp_path)
    again = loader.from_pretrained(tmp_path)
    again.set_progress_bar_config(disable=True)
    assert (
        again.config.id2label == NAMES == pipeline(unet, id2label={str(k): v for k, v in NAMES.items()}).config.id2label
    )
    assert type(again) is CTMPipeline and type(again.unet) is CTMUNet2DModel and type(again.scheduler) is CTMScheduler
    options = {"class_labels": ["Sea Cow", 0], "num_inference_steps": 3, "output_type": "latent"}
    close(again(**options, generator=seeded()).images, pipe(**options, generator=seeded()).images)
    for scheduler_class in (EDMHeunScheduler, EDMEulerScheduler, EDMDPMSolverMultistepScheduler, CTMScheduler):
        images = []
        for one in (pipe, again):  # from a config that was loaded, and from one that was not
            one.scheduler = scheduler_class.from_config(one.scheduler.config)
            images.append(one(**options, generator=seeded()).images)
        close(*images)


@pytest.mark.parametrize("scale", [1.0, 1000.0])
def test_saved_with_another_scheduler_in_place(make_unet, scale, tmp_path):
    # diffusers leaves default values out where a config goes to another class
    pipe = pipeline(make_unet(), CTMScheduler() if scale == 1.0 else CTMScheduler(timestep_scale=scale))
    pipe.scheduler = EDMEulerScheduler.from_config(pipe.scheduler.config)
    pipe.save_pretrained(tmp_path)  # before the pipeline has called it
    expected = pipe(generator=seeded(), output_type="latent").images
    again = CTMPipeline.from_pretrained(tmp_path)
    assert type(again.scheduler) is EDMEulerScheduler and again.scheduler.config["timestep_scale"] == scale
    close(again(generator=seeded(), output_type="latent").images, expected)
    again.scheduler = CTMScheduler.from_config(again.scheduler.config)
    assert again.scheduler.config.timestep_scale == scale and len(again().images) == 1


def test_save_to_a_file(tmp_path):
    (tmp_path / "file").write_text("")
    for wrong in (tmp_path / "file", ""):
        with pytest.raises(ValueError, match="is not a folder; pass one"):
            pipeline().save_pretrained(wrong)
