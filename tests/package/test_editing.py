# Copyright 2026 The diffusers-ctm authors. Licensed under the Apache License, Version 2.0.
"""Editing without training, on networks for which the right image, or its distribution, is known."""

import math

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline, EDMEulerScheduler
from PIL import Image

from diffusers_ctm import (
    BlockAverageOperator,
    CTMImg2ImgPipeline,
    CTMInpaintPipeline,
    CTMPipeline,
    CTMRestorationPipeline,
    CTMScheduler,
    EDMHeunScheduler,
    GrayscaleOperator,
    LinearOperator,
    LossGuidance,
    MaskOperator,
    rejection_sample,
)
from diffusers_ctm.preconditioning import Preconditioning
from helpers.comparing import close, seeded
from helpers.exact import CorrelatedGaussian, ExactNetwork, GaussianData, randn


DATA = GaussianData(0.3, mean=0.2)
SHIFTS = [-1.0, 0.0, 1.0]
REPAINT = torch.zeros(1, 1, 4, 4)
REPAINT[..., 1:, :2] = 1


def pipeline(cls, unet=None, scheduler=None, **options):
    unet = unet or ExactNetwork(DATA, sigma_data=0.6)
    pipe = cls(unet, scheduler or CTMScheduler(sigma_data=0.6), **options)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def image(batch=1, channels=3, size=4, seed=2):
    """An image in [0, 1]."""
    return torch.rand(batch, channels, size, size, generator=seeded(seed))


def unit_noise(batch=1, channels=3, size=4):
    return randn(batch, channels, size, size, seed=3, dtype=torch.float32)


def ramp(position, sigma=80.0):
    """The Karras schedule from `sigma` at 0 to 0.002 at 1."""
    return (sigma ** (1 / 7) + position * (0.002 ** (1 / 7) - sigma ** (1 / 7))) ** 7


# Image to image -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scale", [1.0, 1000.0])
@pytest.mark.parametrize(
    "options, start",
    [
        ({}, ramp(0.5)),
        ({"strength": 0.3}, ramp(0.7)),
        ({"strength": 1}, 80.0),
        ({"sigma": 1.7}, 1.7),
        ({"sigmas": [3.0, 0.4, 0.1]}, 3.0),
        ({"strength": 0.6, "num_inference_steps": 5}, ramp(0.4)),
    ],
)
def test_the_noised_image_comes_down_the_exact_trajectory(options, start, scale):
    network = ExactNetwork(DATA, sigma_data=0.6, timestep_scale=scale)
    pipe = pipeline(CTMImg2ImgPipeline, network, CTMScheduler(sigma_data=0.6, timestep_scale=scale))
    images = pipe(image(2), latents=unit_noise(2), output_type="latent", **options).images
    assert images.dtype == torch.float32
    close(images, DATA.jump(2 * image(2) - 1 + start * unit_noise(2), start, 0.002))
    assert (
        len(network.calls) == pipe.num_timesteps == options.get("num_inference_steps", len(options.get("sigmas", [1])))
    )


def test_levels_of_a_strength_are_the_end_of_the_karras_schedule():
    pipe = pipeline(CTMImg2ImgPipeline)
    pipe(image(), strength=0.4, num_inference_steps=4)
    close(pipe.scheduler.sigmas, [ramp(0.6 + 0.1 * i) for i in range(5)])
    pipe(image(), sigma=ramp(0.6), num_inference_steps=4)
    close(pipe.scheduler.sigmas, [ramp(0.6 + 0.1 * i) for i in range(5)])
    for number in (np.float32, torch.tensor):  # as gamma and sigmas, of numpy and torch
        for options in ({"sigma": number(2.5)}, {"strength": number(0.5)}):
            pipe(image(), **options)
            close(pipe.scheduler.sigmas[:1], [2.5] if "sigma" in options else [ramp(0.5)])


@pytest.mark.parametrize("steps", [1, 3])
@pytest.mark.parametrize("final", [0.0, 0.3])
def test_image_to_image_ends_where_the_scheduler_says(steps, final):
    pipe = pipeline(CTMImg2ImgPipeline, scheduler=CTMScheduler(sigma_data=0.6, final_sigma=final))
    options = {"sigma": 2.0, "latents": unit_noise(), "output_type": "latent"}
    images = pipe(image(), num_inference_steps=steps, **options).images
    assert len(pipe.unet.calls) == steps and pipe.scheduler.sigmas[-1] == torch.tensor(final)
    # one step to 0 is off by about sigma_min
    close(images, DATA.jump(2 * image() - 1 + 2 * unit_noise(), 2.0, final), atol=1e-2 if steps == 1 else 3e-5)
    with pytest.raises(ValueError, match=f"must lie above {'sigma_min=0.002' if final == 0 else 'final_sigma=0.3'}"):
        pipe(image(), sigma=max(final, 0.002))


@pytest.mark.parametrize("gamma", [0.0, 0.7])
def test_strength_one_is_a_sample_that_saw_the_image_once(make_unet, gamma):
    unet, scheduler = make_unet(), CTMScheduler()
    noise, given = randn(2, 3, 8, 8, dtype=torch.float32), image(2, size=8)
    options = {"num_inference_steps": 3, "gamma": gamma, "output_type": "latent"}
    edited = pipeline(CTMImg2ImgPipeline, unet, scheduler)(
        given, 1.0, latents=noise, generator=seeded(), **options
    ).images
    plain = pipeline(CTMPipeline, unet, scheduler)
    same = plain(latents=noise + (2 * given - 1) / 80, generator=seeded(), **options).images
    close(edited, same, rtol=1e-3, atol=1e-3)
    assert (edited - plain(latents=noise, generator=seeded(), **options).images).abs().mean() < 0.05 * edited.std()


def test_an_image_that_is_noisy_already():
    pipe = pipeline(CTMImg2ImgPipeline)
    x_t = 2 * image(2) - 1 + 0.5 * unit_noise(2)
    assert x_t.abs().max() > 1.2  # beyond [-1, 1]
    options = {"add_noise": False, "num_inference_steps": 3, "output_type": "latent"}
    images = pipe((x_t + 1) / 2, sigma=0.5, **options).images
    close(images, DATA.jump(x_t, 0.5, 0.002))
    array = ((x_t + 1) / 2).permute(0, 2, 3, 1).numpy()
    assert torch.equal(pipe(array, sigma=0.5, **options).images, images)
    with pytest.raises(ValueError, match="floats must lie in"):
        pipe((x_t + 1) / 2, sigma=0.5)


def test_image_to_image_by_the_exact_score():
    pipe = pipeline(CTMImg2ImgPipeline, scheduler=EDMHeunScheduler(sigma_data=0.6))
    options = {"sigma": 2.0, "latents": unit_noise(), "output_type": "latent"}
    images = pipe(image(), num_inference_steps=60, **options).images
    close(images, DATA.jump(2 * image() - 1 + 2 * unit_noise(), 2.0, 0.0), atol=3e-3)
    pipe(image(), **options)
    assert pipe.num_timesteps == 35
    pipe.scheduler = EDMEulerScheduler.from_config(pipe.scheduler.config)
    with pytest.raises(ValueError, match="EDMEulerScheduler takes no `sigmas`; CTMScheduler does"):
        pipe(image())


@pytest.mark.parametrize(
    "options, message",
    [
        ({"strength": 0}, r"strength must lie in \(0, 1\], got 0"),
        ({"strength": 1.01}, r"strength must lie in \(0, 1\]"),
        ({"strength": float("nan")}, r"strength must lie in \(0, 1\]"),
        ({"strength": "half"}, r"strength must lie in \(0, 1\], got 'half'"),
        ({"strength": 0.5, "sigma": 1.0}, "Pass one of"),
        ({"sigma": 1.0, "sigmas": [1.0]}, "Pass one of"),
        ({"sigmas": [1.0], "num_inference_steps": 1}, "not both"),
        ({"sigmas": [1.0, 2.0]}, "strictly descending"),
        ({"sigma": -1.0}, "sigma must be a positive number"),
        ({"sigma": 81.0}, "not above sigma_max=80"),
        ({"sigma": 0.002}, "must lie above sigma_min=0.002"),
        ({"strength": 1e-4, "num_inference_steps": 100}, "take fewer steps or more"),
        ({"num_inference_steps": 0}, "num_inference_steps must be a whole number >= 1"),
        ({"add_noise": False}, "add_noise=False needs `sigma`"),
        ({"add_noise": False, "strength": 0.5}, "add_noise=False needs `sigma`"),
        ({"add_noise": False, "sigma": 1.0, "latents": unit_noise()}, "add_noise=False adds none"),
        ({"gamma": [0.1, 0.2]}, r"one value per step \(1\)"),
        ({"latents": torch.zeros(1, 3, 4, 5)}, "latents must have shape"),
        ({"latents": torch.full((1, 3, 4, 4), float("nan"))}, "latents hold values that are NaN or infinite"),
        ({"image": None}, "image is missing"),
        ({"class_labels": 1}, "this network is unconditional"),
        ({"output_type": "tensor"}, "output_type must be"),
    ],
)
def test_image_to_image_arguments_that_do_not_fit(options, message):
    pipe = pipeline(CTMImg2ImgPipeline)
    with pytest.raises(ValueError, match=message):
        pipe(**{"image": image(), **options})
    assert not pipe.unet.calls  # before any work


# Images and masks as they are given -----------------------------------------------------------------------------------


def eight_bit(channels=3, batch=2):
    """PIL images, and what they hold in [0, 1]."""
    pixels = (255 * image(batch, channels)).to(torch.uint8)
    arrays = pixels.permute(0, 2, 3, 1).numpy()
    images = [Image.fromarray(array[..., 0] if channels == 1 else array) for array in arrays]
    return images, pixels / 255


def test_images_are_checked_before_any_work():
    for cls in (CTMImg2ImgPipeline, CTMInpaintPipeline):
        pipe, mask = pipeline(cls), {"mask_image": REPAINT} if cls is CTMInpaintPipeline else {}
        for given, message in [
            (Image.new("RGB", (5, 4)), r"^image is 4x5 pixels"),
            (torch.zeros(1, 1, 4, 4), "image has 1 channels"),
            (2 * image() - 1, r"must lie in \[0, 1\]"),
        ]:
            with pytest.raises(ValueError, match=message):
                pipe(given, **mask)
        assert not pipe.unet.calls


def test_the_same_mask_in_every_form_is_the_same():
    pipe, options = pipeline(CTMInpaintPipeline), {"latents": unit_noise(), "generator": None, "output_type": "latent"}
    options |= {"num_inference_steps": 1}
    expected = pipe(image(), REPAINT, **options).images
    array = REPAINT[0, 0].numpy()
    levels = Image.fromarray((255 * array).astype(np.uint8))
    forms = [
        REPAINT.bool(),
        REPAINT[0],
        REPAINT[0, 0],
        array,
        array.astype(bool),
        array[..., None],
        0.4 + 0.2 * REPAINT,
        0.5 * REPAINT,
    ]
    forms += [array[None, ..., None].astype(bool), [REPAINT.bool()]]
    forms += [levels, levels.convert("1"), levels.convert("RGB"), [levels], [array.astype(bool)]]
    for form in forms:
        assert torch.equal(pipe(image(), form, **options).images, expected)


@pytest.mark.parametrize(
    "mask, message",
    [
        (torch.zeros(1, 1, 4, 5), r"mask_image is 4x5 pixels \(height x width\); this network makes 4x4"),
        (Image.new("L", (8, 8)), "mask_image is 8x8 pixels"),
        (Image.new("RGBA", (4, 4)), "mask_image has mode 'RGBA'"),
        (torch.full((1, 1, 4, 4), math.nan), "mask_image holds values that are NaN"),
        (torch.zeros(1, 3, 4, 4), "mask_image has 3 channels"),
        (255 * REPAINT, "mask_image has values from 0 to 255"),
        (REPAINT.byte(), "mask_image holds torch.uint8; pass bools, or floats"),
        (REPAINT.numpy().astype(np.int64), "mask_image holds int64; pass bools, or floats"),
        (None, "image and mask_image must both be given"),
        (REPAINT.expand(3, -1, -1, -1), "image has 2 entries and mask_image 3"),
    ],
)
def test_masks_that_do_not_fit(mask, message):
    pipe = pipeline(CTMInpaintPipeline)
    with pytest.raises(ValueError, match=message):
        pipe(image(2), mask)
    assert not pipe.unet.calls


# Restoration ----------------------------------------------------------------------------------------------------------


def restoration_by_hand(unet, levels, gammas, known, project, noise, generator, preconditioning, m=0.002):
    """The update of `CTMRestorationPipeline`, written out from its docstring."""
    x = known + levels[0] * noise
    for t, t_next, gamma in zip(levels[:-1], levels[1:], gammas, strict=True):
        s = m + math.sqrt(1 - gamma**2) * (t_next - m)
        with torch.no_grad():
            g = preconditioning.g(unet, x, torch.tensor(t), torch.tensor(s))
        x_0 = project(m / t * x + (1 - m / t) * g)
        x = x_0 + (s - m) / (t - m) * (x - x_0)
        if gamma and t_next > 0.0021:
            x = x + math.sqrt(t_next**2 - s**2) * torch.randn(x.shape, generator=generator)
    return x


@pytest.mark.parametrize("gamma", [0.0, 0.6, 1.0])
def test_equals_the_update_written_by_hand(make_unet, gamma):
    unet, given = make_unet(), 2 * image(2, size=8) - 1
    operator = BlockAverageOperator(2)
    pipe = pipeline(CTMRestorationPipeline, unet, CTMScheduler(sigma_data=0.7))
    options = {"num_inference_steps": 3, "gamma": gamma, "generator": seeded(4), "output_type": "latent"}
    restored = pipe(operator(given / 2 + 0.5), operator, **options).images

    def project(x):
        return x + operator.pseudo_inverse(operator(given - x))

    generator = seeded(4)
    noise = torch.randn(2, 3, 8, 8, generator=generator)
    levels, known = [ramp(i / 3) for i in range(4)], operator.pseudo_inverse(operator(given))
    preconditioning = Preconditioning(0.7, 1.0)
    expected = restoration_by_hand(unet, levels, [gamma] * 3, known, project, noise, generator, preconditioning)
    close(restored, expected, rtol=1e-4, atol=1e-4)


def test_gamma_one_is_algorithm_4_of_consistency_models(make_unet):
    # Song et al. 2023, Algorithm 4, with A the identity for inpainting and a basis of colors for colorization
    unet, levels = make_unet(), [80.0, 7.0, 0.9]
    reference, repaint = 2 * image(2, size=8) - 1, (randn(1, 1, 8, 8, seed=9) > 0).float()
    preconditioning, end = Preconditioning(0.6, 1.0), torch.tensor(0.002)
    weights = torch.tensor([0.299, 0.587, 0.114])
    colors = torch.linalg.qr(torch.stack([weights, *randn(2, 3).float()]).T)[0]
    first = torch.tensor([0.0, 1.0, 1.0]).reshape(1, 3, 1, 1)  # Omega: 1 where unknown
    options = {"sigmas": levels, "gamma": 1.0, "output_type": "latent"}
    inpaint = pipeline(CTMInpaintPipeline, unet)(reference / 2 + 0.5, repaint, generator=seeded(6), **options).images
    operator = GrayscaleOperator()
    gray = operator(reference / 2 + 0.5)
    color = pipeline(CTMRestorationPipeline, unet)(gray, operator, generator=seeded(6), **options).images

    for result, basis, omega in ((inpaint, torch.eye(3), repaint), (color, colors, first)):
        generator = seeded(6)

        def merge(y, x, basis=basis, omega=omega):
            to, back = (
                (lambda v: torch.einsum("ck,bchw->bkhw", basis, v)),
                (lambda v: torch.einsum("ck,bkhw->bchw", basis, v)),
            )
            return back(to(y) * (1 - omega) + to(x) * omega)

        y = merge(reference, torch.zeros_like(reference))
        x = y + levels[0] * torch.randn(y.shape, generator=generator)
        for n, level in enumerate(levels):
            if n > 0:
                x = x + math.sqrt(level**2 - 0.002**2) * torch.randn(y.shape, generator=generator)
            with torch.no_grad():
                x = merge(y, preconditioning.jump(unet, x, torch.tensor(level), end))
        close(result, x, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("gamma", [0.0, 0.6, 1.0])
def test_without_a_measurement_it_is_plain_sampling(make_unet, gamma):
    unet = make_unet()
    options = {"num_inference_steps": 4, "gamma": gamma, "latents": randn(2, 3, 8, 8, dtype=torch.float32)}
    options |= {"output_type": "latent"}
    plain = pipeline(CTMPipeline, unet)(generator=seeded(), **options).images
    nothing = {"operator": lambda x: 0 * x, "pseudo_inverse": lambda y: 0 * y}
    pipe = pipeline(CTMRestorationPipeline, unet)
    close(pipe(torch.zeros(2, 3, 8, 8), **nothing, generator=seeded(), **options).images, plain, rtol=1e-4, atol=1e-4)
    white = pipeline(CTMInpaintPipeline, unet)(image(size=8), torch.ones(8, 8), generator=seeded(), **options).images
    close(white, plain, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("gamma", [0.0, 0.5, 1.0, [1.0, 0.0, 0.3]])
@pytest.mark.parametrize("channels", [1, 3])
def test_known_pixels_come_back_exactly(make_unet, gamma, channels):
    pipe = pipeline(CTMInpaintPipeline, make_unet(in_channels=channels, out_channels=channels))
    repaint = randn(3, 1, 8, 8, seed=9) > 0
    kept = ~repaint.expand(-1, channels, -1, -1)
    given = image(3, channels, 8) ** 4  # also values near 0, which [-1, 1] does not hold to the last digit
    for floats in (given, given.double()):
        options = {"num_inference_steps": 3, "gamma": gamma, "generator": seeded()}
        images = {
            name: pipe(floats, repaint, output_type=name, **options).images for name in ("latent", "pt", "np", "pil")
        }
        assert torch.equal(images["latent"][kept], (2 * given - 1)[kept])
        assert torch.equal(images["pt"][kept], given[kept])
        assert torch.equal(torch.from_numpy(images["np"]).permute(0, 3, 1, 2)[kept], given[kept])
        assert not torch.isclose(images["pt"][~kept], given[~kept]).all()
    pixels = (255 * given).to(torch.uint8).permute(0, 2, 3, 1).numpy()
    pil = [Image.fromarray(array[..., 0] if channels == 1 else array) for array in pixels]
    masks = [Image.fromarray(mask[0].numpy()) for mask in repaint]
    out = pipe(pil, masks, num_inference_steps=3, gamma=gamma, generator=seeded()).images
    out = np.stack([np.asarray(one).reshape(8, 8, channels) for one in out])
    kept = kept.permute(0, 2, 3, 1).numpy()
    assert (out[kept] == pixels[kept]).all() and (out[~kept] != pixels[~kept]).any()


@pytest.mark.parametrize("final", [0.0, 0.5])
def test_known_pixels_come_back_wherever_the_scheduler_ends(make_unet, final):
    unet, repaint, given = make_unet(), randn(1, 1, 8, 8, seed=9) > 0, image(size=8)
    presets = {"3": {"sigmas": [80.0, 2.0, 0.7], "gamma": 0.2}}  # measured for samples, not for restoration
    pipe = pipeline(CTMInpaintPipeline, unet, CTMScheduler(final_sigma=final, presets=presets))
    for gamma in (1.0, None):
        options = {"num_inference_steps": 3, "gamma": gamma, "output_type": "pt"}
        images = pipe(given, repaint, generator=seeded(), **options).images
        kept = ~repaint.expand_as(given)
        assert torch.equal(images[kept], given[kept])
        plain = pipeline(CTMInpaintPipeline, unet, CTMScheduler())(given, repaint, generator=seeded(), **options).images
        assert torch.equal(images, plain)


def test_what_is_under_the_white_has_no_influence(make_unet):
    pipe, other = pipeline(CTMInpaintPipeline, make_unet()), image(size=8)
    repaint = randn(1, 1, 8, 8, seed=9) > 0
    other = torch.where(repaint, 1 - other, other)
    images = [pipe(one, repaint, num_inference_steps=2, generator=seeded()).images[0] for one in (image(size=8), other)]
    assert list(images[0].getdata()) == list(images[1].getdata())


@pytest.mark.parametrize("gamma", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("operator", [BlockAverageOperator(2), GrayscaleOperator()])
def test_the_image_matches_the_measurement(make_unet, operator, gamma):
    y = operator(image(2, size=8))
    pipe = pipeline(CTMRestorationPipeline, make_unet())
    restored = pipe(y, operator, num_inference_steps=3, gamma=gamma, output_type="latent").images
    close(operator(restored / 2 + 0.5), y, atol=1e-5)


def test_measurements_in_every_form():
    pil, tensor = eight_bit(channels=1)
    pil = [one.resize((2, 2)) for one in pil]
    tensor = torch.stack([torch.from_numpy(np.array(one)).float() / 255 for one in pil])[:, None]
    pipe = pipeline(CTMRestorationPipeline, ExactNetwork(DATA, sigma_data=0.6, channels=1))
    options = {"operator": BlockAverageOperator(2), "num_inference_steps": 2, "output_type": "latent"}
    expected = pipe(tensor, generator=seeded(), **options).images
    close(options["operator"](expected) / 2 + 0.5, tensor)
    counts = (255 * tensor).round().byte()
    arrays = [form.permute(0, 2, 3, 1).numpy() for form in (tensor, tensor.double(), counts)]
    for form in (pil, *arrays, list(arrays[0]), list(tensor), tensor.double(), counts, list(counts)):
        close(pipe(form, generator=seeded(), **options).images, expected)


class Weighted(LinearOperator):
    """Weighted sums of neighbors, whose weights do not sum to 1; one is negative if asked."""

    def __init__(self, *weights):
        self.weights = torch.tensor(weights)

    def __call__(self, x):
        return x.unflatten(-1, (-1, len(self.weights))) @ self.weights.to(x)

    def pseudo_inverse(self, y):
        return (y[..., None] * (self.weights / self.weights.square().sum()).to(y)).flatten(-2)


MEASURED = {
    "means of 2x2": BlockAverageOperator(2),
    "means of 8x8": BlockAverageOperator(8),
    "luminance": GrayscaleOperator(),
    "mask": MaskOperator(torch.eye(8)),
    "sums": Weighted(0.3, 1.5),
    "differences": Weighted(-1.0, 0.4),
}


@pytest.mark.parametrize("name", MEASURED)
def test_the_images_that_people_get_have_the_measurement(make_unet, name, caplog):
    """Also black, white and saturated ones: where clipping would lose it, by up to `lost`."""
    operator, pipe = MEASURED[name], pipeline(CTMRestorationPipeline, make_unet())
    given = image(6, size=8)
    given[1], given[2], given[3], given[4, 0] = 0.0, 1.0, given[3].round(), 254 / 255
    for picture in (given, given.double()):
        options = {"num_inference_steps": 2, "generator": seeded()}
        y = operator(picture)
        images = pipe(y, operator, output_type="pt", **options).images
        close(operator(images), y.float(), atol=3e-6)
        assert images.min() >= 0 and images.max() <= 1
    lost = operator((pipe(y, operator, output_type="latent", **options).images / 2 + 0.5).clamp(0, 1)) - y
    assert name == "mask" or lost.abs().max() > 0.02
    eight_bit = np.stack([np.asarray(one) for one in pipe(y, operator, **options).images])
    rounding = operator(torch.ones(1, 3, 8, 8)).abs().max() if "di" not in name else 1.4
    eight_bit = torch.from_numpy(eight_bit / 255).permute(0, 3, 1, 2)
    assert (operator(eight_bit) - y).abs().max() <= rounding * 0.5 / 255 + 1e-5
    assert not caplog.records


@pytest.mark.parametrize("output_type", ["pt", "latent"])
def test_images_that_a_classifier_accepts_have_it_too(make_unet, output_type):
    y, operator = BlockAverageOperator(2)(image(size=8)), BlockAverageOperator(2)
    pipe = pipeline(CTMRestorationPipeline, make_unet())
    given = {"measurement": y, "operator": operator, "num_inference_steps": 2, "generator": seeded()}
    found = rejection_sample(
        pipe,
        lambda x: x.flatten(1)[:, :2] / x.abs().max().clamp(max=1),
        4,
        threshold=0,
        output_type=output_type,
        **given,
    ).images
    close(operator(found if output_type == "pt" else found / 2 + 0.5), y.expand(4, -1, -1, -1), atol=3e-6)
    assert (found.abs().max() > 1) == (output_type == "latent")


def test_what_no_image_in_range_has_is_said(make_unet, caplog):
    pipe = pipeline(CTMRestorationPipeline, make_unet())
    y = torch.full((1, 3, 8, 4), -1.3)  # -1 to 0.4 can be
    images = pipe(y, Weighted(-1.0, 0.4), num_inference_steps=1, output_type="pt").images
    close(images, torch.tensor([1.0, 0.0]).repeat(4).expand(1, 3, 8, 8), atol=1e-4)  # the nearest
    (record,) = caplog.records
    assert "off by up to 0.3 of its largest value: no image with pixels in [0, 1] was found" in record.getMessage()


def test_a_white_image_says_what_pixels_of_minus_one_add():
    """y of [0, 1] is 2 y - A(1) of [-1, 1], also where A(1) is not 1."""
    given, operator = image(2, size=4), Weighted(0.3, 1.5)
    pipe = pipeline(CTMRestorationPipeline)
    restored = pipe(operator(given), operator, num_inference_steps=2, output_type="latent").images
    close(operator(restored), operator(2 * given - 1), atol=1e-5)
    with pytest.raises(ValueError, match="from 0 to 1.8 for pixels in"):
        pipe(operator(2 * given - 1), operator)


# The conditional distribution -----------------------------------------------------------------------------------------


def smooth_images(size=4):
    """Gaussian images whose neighboring pixels are much alike."""
    at = torch.cartesian_prod(*[torch.arange(size, dtype=torch.float64)] * 2)
    distance = (at[:, None] - at[None]).square().sum(-1)
    cov = 0.25 * torch.exp(-distance / 8) + 0.01 * torch.eye(size**2, dtype=torch.float64)
    return CorrelatedGaussian(0.2 * torch.arange(size**2).sin(), cov)


def test_the_correlated_gaussian_is_what_it_says():
    data, x = smooth_images(), randn(3, 1, 4, 4)
    close(data.jump(data.jump(x, 5.0, 1.0), 1.0, 0.1), data.jump(x, 5.0, 0.1), rtol=1e-12, atol=1e-12)
    noisy = data.cov + 4 * torch.eye(16, dtype=torch.float64)
    expected = data.mean + (x.flatten(1) - data.mean) @ torch.linalg.solve(noisy, data.cov)
    close(data.denoiser(x, 2.0).flatten(1), expected, rtol=1e-10, atol=1e-10)
    down = x + 1e-5 / 2.0 * (data.denoiser(x, 2.0) - x)
    close(data.jump(x, 2.0, 2.0 - 1e-5), down, rtol=0, atol=1e-9)


def conditional_error(operator, steps, gamma, count=2000):
    """Distance of the samples' mean, in standard deviations, and covariance, relative, to those of x given A x = y."""
    data = smooth_images()
    pipe = pipeline(
        CTMRestorationPipeline, ExactNetwork(data, sigma_data=0.5, channels=1), CTMScheduler(sigma_data=0.5)
    )
    x = (data.mean + torch.linalg.cholesky(data.cov) @ randn(16, seed=1)).reshape(1, 1, 4, 4).clamp(-1, 1)
    a = operator(torch.eye(16, dtype=torch.float64).reshape(16, 1, 4, 4)).flatten(1).T
    a = a[a.abs().sum(1) > 0]
    mean, cov = data.given(a, a @ x.flatten())
    free = torch.linalg.svd(a)[2][len(a) :].T  # what A does not see
    options = {"num_inference_steps": steps, "gamma": gamma, "batch_size": count, "generator": seeded()}
    samples = pipe(operator(x / 2 + 0.5), operator, output_type="latent", **options).images.double().flatten(1)
    close(samples @ a.T, (a @ x.flatten()).expand(count, -1), atol=1e-5)
    mean, cov = free.T @ mean, free.T @ cov @ free
    spread = cov.trace().sqrt()
    return float(((samples @ free).mean(0) - mean).norm() / spread), float(
        ((samples @ free).T.cov() - cov).norm() / cov.norm()
    )


def test_super_resolution_approaches_the_conditional_distribution():
    # measured with 4,000 samples, (mean, covariance): 18 steps (0.17, 0.11), 100 steps (0.04, 0.05), one (0.70, 1.15)
    few, some, many = (conditional_error(BlockAverageOperator(2), steps, 1.0) for steps in (4, 18, 100))
    assert many[0] < 0.08 and many[1] < 0.1 and some[0] < 0.22 and some[1] < 0.18
    assert few[0] > 2 * some[0] > 3 * many[0] and few[1] > 2 * some[1]


def test_inpainting_approaches_it_slowly_and_not_at_gamma_zero():
    # half of a smooth image follows from the other half: the hardest case, and the one that shows the limits
    left = MaskOperator(torch.tensor([1.0, 1.0, 0.0, 0.0]).expand(1, 1, 4, 4))
    few, many = (conditional_error(left, steps, 1.0) for steps in (10, 160))
    assert many[0] < 0.27 and many[1] < 0.42 and few[0] > 2 * many[0] and few[1] > 2 * many[1]
    renoised_less = conditional_error(left, 160, 0.6)
    never = conditional_error(left, 160, 0.0)
    assert many[0] < renoised_less[0] < never[0] and many[1] < renoised_less[1] < never[1]
    assert never[0] > 0.5 and never[1] > 1.2  # more steps do not help


def test_pixels_that_are_independent_keep_their_distribution():
    pipe = pipeline(CTMInpaintPipeline)
    images = pipe(
        image(), REPAINT, num_inference_steps=6, batch_size=3000, generator=seeded(), output_type="latent"
    ).images
    repainted = images[(REPAINT == 1).expand_as(images)]
    assert abs(repainted.mean() - 0.2) < 0.005 and abs(repainted.std() / 0.3 - 1) < 0.01


# A call like those of CTMPipeline -------------------------------------------------------------------------------------

EDITS = {
    CTMImg2ImgPipeline: lambda: {"image": image(size=8)},
    CTMInpaintPipeline: lambda: {"image": image(size=8), "mask_image": 1 - torch.eye(8)},
    CTMRestorationPipeline: lambda: {"measurement": torch.full((1, 3, 4, 4), 0.5), "operator": BlockAverageOperator(2)},
}


@pytest.mark.parametrize("cls", EDITS)
def test_one_evaluation_per_step_and_the_generator_decides(make_unet, cls):
    pipe = pipeline(cls, make_unet())
    evaluations = []
    pipe.unet.register_forward_hook(lambda *args: evaluations.append(1))
    options = {"num_inference_steps": 4, "gamma": 0.5, "output_type": "latent", **EDITS[cls]()}
    images = [pipe(generator=seeded(seed), **options).images for seed in (0, 0, 1)]
    assert torch.equal(images[0], images[1]) and not torch.equal(images[0], images[2])
    assert len(evaluations) == 12
    together = pipe(generator=[seeded(0), seeded(1)], **options).images
    close(together, torch.cat([images[0], images[2]]), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("cls", EDITS)
def test_from_pipe_and_from_pretrained(make_unet, cls, tmp_path):
    plain = pipeline(CTMPipeline, make_unet(num_class_embeds=3), id2label={0: "ant", 1: "bee", 2: "cat"})
    plain.save_pretrained(tmp_path / "plain")
    options = {"num_inference_steps": 2, "class_labels": "bee", "output_type": "latent", **EDITS[cls]()}
    pipe = cls.from_pipe(plain)
    assert type(pipe) is cls and pipe.unet is plain.unet
    pipe.save_pretrained(tmp_path / "edits")
    expected = pipe(generator=seeded(), **options).images
    back = CTMPipeline.from_pipe(pipe)
    for again in (cls.from_pretrained(tmp_path / "plain"), DiffusionPipeline.from_pretrained(tmp_path / "edits")):
        assert type(again) is cls
        close(again(generator=seeded(), **options).images, expected)
    assert torch.equal(*[p(class_labels="cat", generator=seeded(), output_type="latent").images for p in (plain, back)])


@pytest.mark.parametrize("cls", EDITS)
def test_classes_and_batches(cls):
    network = ExactNetwork(GaussianData(0.05), sigma_data=0.6, class_shift=SHIFTS, size=8)
    pipe = pipeline(cls, network, id2label={0: "ant", 1: "bee", 2: "cat"})
    options = {"output_type": "latent", **EDITS[cls]()}
    if cls is CTMImg2ImgPipeline:
        options["strength"] = 1.0
    if cls is CTMRestorationPipeline:  # the diagonal is known
        options |= {"operator": MaskOperator(torch.eye(8)), "measurement": torch.zeros(1, 3, 8, 8)}
    images = pipe(class_labels=["cat", 0, 1], **options).images
    for shift, one in zip([1.0, -1.0, 0.0], images, strict=True):  # one image or measurement, three classes
        assert abs(float(one[..., 0, 1:].mean()) - shift) < 0.1
    assert len(pipe(class_labels=1, batch_size=4, **options).images) == 4
    with pytest.raises(ValueError, match="not the name of a class"):
        pipe(class_labels="dog", **options)
    many = EDITS[cls]() | {"class_labels": [0, 1]}
    first = next(iter(many))
    many[first] = many[first].expand(3, -1, -1, -1)
    with pytest.raises(ValueError, match="class_labels has 2 entries for batch_size=3"):
        pipe(**many)
    with pytest.raises(ValueError, match=f"{first} has 3 entries for batch_size=2; pass one or 2"):
        pipe(**many, batch_size=2)


@pytest.mark.parametrize("cls", EDITS)
def test_a_network_without_a_size(cls):
    pipe = pipeline(cls, ExactNetwork(DATA, sigma_data=0.6, size=None))
    assert pipe(output_type="latent", **EDITS[cls]()).images.shape == (1, 3, 8, 8)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"measurement": None}, "measurement is missing"),
        ({"measurement": "y"}, "must be a float or uint8 tensor .* got str"),
        ({"measurement": torch.zeros(1, 3, 4, 4, dtype=torch.int64)}, "got torch.int64 tensor"),
        ({"measurement": torch.full((1, 3, 4, 4), math.nan)}, "NaN or infinite"),
        ({"measurement": torch.zeros(1, 3, 2, 4)}, r"measurement has shape \(1, 3, 2, 4\), but the operator gives"),
        ({"measurement": []}, "measurement must be a list of tensors of one shape"),
        (
            {"measurement": torch.full((1, 3, 4, 4), -0.5)},
            r"values from -0.5 to -0.5, .* from 0 to 1 for pixels in \[0, 1\]",
        ),
        ({"measurement": torch.full((1, 3, 4, 4), 1.01)}, r"Pass what it gives for these: `operator\(image\)`"),
        ({"operator": None}, "operator must be a LinearOperator or a function"),
        ({"operator": lambda x: x[..., ::2, ::2]}, "pseudo_inverse is missing"),
        (
            {"operator": lambda x: x.square()[..., ::2, ::2], "pseudo_inverse": BlockAverageOperator(2).pseudo_inverse},
            "not linear",
        ),
        ({"pseudo_inverse": lambda y: torch.zeros(1, 3, 8, 8)}, "does not belong to the operator"),
        ({"gamma": 1.5}, r"gamma must lie in \[0, 1\]"),
        ({"gamma": [1.0, 0.5], "sigmas": [80.0, 3.0, 0.5]}, r"one value per step \(3\)"),
        ({"num_inference_steps": 2, "sigmas": [80.0]}, "exactly one of"),
        ({"latents": torch.zeros(1, 3, 8, 9)}, "latents must have shape"),
        ({"batch_size": 0}, "batch_size must be"),
    ],
)
def test_restoration_arguments_that_do_not_fit(options, message):
    pipe = pipeline(CTMRestorationPipeline, ExactNetwork(DATA, sigma_data=0.6, size=8))
    with pytest.raises(ValueError, match=message):
        pipe(**{**EDITS[CTMRestorationPipeline](), **options})
    assert not pipe.unet.calls


@pytest.mark.parametrize("cls", [CTMInpaintPipeline, CTMRestorationPipeline])
def test_other_schedulers_cannot_restore(cls):
    pipe = pipeline(cls, ExactNetwork(DATA, sigma_data=0.6, size=8), EDMHeunScheduler(sigma_data=0.6))
    with pytest.raises(ValueError, match=f"{cls.__name__} works with CTMScheduler, not with EDMHeunScheduler"):
        pipe(**EDITS[cls]())


# Guidance -------------------------------------------------------------------------------------------------------------


def bright():
    return LossGuidance(lambda x_0: -(x_0 - 0.1 * x_0.square()).sum((1, 2, 3)), 0.4)


@pytest.mark.parametrize("gamma", [0.0, 0.6, 1.0])
def test_edits_are_guided_as_samples_are(gamma):
    """Where nothing is given, all editing pipelines are `CTMPipeline`, with both guidances."""
    network = ExactNetwork(DATA, sigma_data=0.6, class_shift=SHIFTS)
    options = {"class_labels": 1, "guidance": bright(), "guidance_scale": 2.5, "num_inference_steps": 4, "gamma": gamma}
    options |= {"latents": unit_noise(2), "output_type": "latent"}

    def made(cls, *arguments, **more):
        return pipeline(cls, network, null_class=2)(*arguments, generator=seeded(), **options, **more).images

    gray = torch.full((1, 3, 4, 4), 0.5)  # 0 in [-1, 1]
    sample = made(CTMPipeline)
    close(made(CTMImg2ImgPipeline, gray, 1.0), sample)
    close(
        made(CTMRestorationPipeline, torch.zeros(1, 3, 4, 4), MaskOperator(torch.zeros(1, 1, 4, 4))), sample, 1e-4, 1e-4
    )
    close(made(CTMInpaintPipeline, gray, torch.ones(4, 4)), sample, 1e-4, 1e-4)
    plain = {**options, "guidance": None}
    assert (
        pipeline(CTMPipeline, network, null_class=2)(generator=seeded(), **plain).images - sample
    ).abs().max() > 0.02
    plain = {**options, "guidance_scale": 1.0}
    assert (pipeline(CTMPipeline, network, null_class=2)(generator=seeded(), **plain).images - sample).abs().max() > 0.1


@pytest.mark.parametrize("cls", [CTMInpaintPipeline, CTMRestorationPipeline])
def test_guidance_leaves_what_is_known(cls):
    known = image(2)
    given = (known, REPAINT) if cls is CTMInpaintPipeline else (known * (1 - REPAINT), MaskOperator(1 - REPAINT))
    options = {"latents": unit_noise(2), "num_inference_steps": 3, "output_type": "pt"}
    plain, guided = (
        pipeline(cls)(*given, generator=seeded(), guidance=guidance, **options).images for guidance in (None, bright())
    )
    hidden = (REPAINT == 1).expand_as(known)
    close(guided[~hidden], known[~hidden])
    assert (guided - plain)[hidden].mean() > 0.02
    with pytest.raises(ValueError, match="guidance_scale was given, but this network is unconditional"):
        pipeline(cls)(*given, guidance_scale=2.0)
    with pytest.raises(ValueError, match="object of a subclass of Guidance, got function"):
        pipeline(CTMImg2ImgPipeline)(known, guidance=lambda x: x)
