# Copyright 2026 The diffusers-ctm authors. Licensed under the Apache License, Version 2.0.
"""Encoding on exact flows: the latents are known, and encoding and decoding return the image to second order."""

import math

import numpy as np
import pytest
import torch
from diffusers import EDMEulerScheduler

from diffusers_ctm import CTMInversionPipeline, CTMPipeline, CTMScheduler, EDMHeunScheduler, slerp
from helpers.comparing import close
from helpers.exact import ExactDenoiserNetwork, ExactNetwork, GaussianData, GaussianMixture, PixelMixture, randn


DATA = GaussianData(0.3, mean=0.2)
SHIFTS = [-0.5, 0.5]


def pipeline(unet=None, scheduler=None, cls=CTMInversionPipeline, **options):
    pipe = cls(unet or ExactNetwork(DATA, sigma_data=0.6), scheduler or CTMScheduler(sigma_data=0.6), **options)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def teacher(data=DATA):
    return pipeline(ExactDenoiserNetwork(data, sigma_data=0.6), EDMHeunScheduler(sigma_data=0.6))


def pixels(batch=2, channels=3, size=4, seed=0):
    """8-bit images (B, C, H, W)."""
    return torch.randint(256, (batch, channels, size, size), generator=torch.Generator().manual_seed(seed)).byte()


def centered(image):
    return image.float() / 127.5 - 1


def slope(errors):
    """Orders of convergence between errors at doubled numbers of steps."""
    return [math.log2(coarse / fine) for coarse, fine in zip(errors, errors[1:], strict=False)]


# The flow -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("data", [DATA, PixelMixture()], ids=["Gaussian", "mixture"])
@pytest.mark.parametrize("make", [teacher, lambda data: pipeline(ExactNetwork(data, sigma_data=0.6))])
def test_latents_are_those_of_the_exact_flow_to_second_order(make, data):
    pipe, image = make(data), pixels()
    x = centered(image).double()
    low, high = torch.full((), -80.0 * 8, dtype=torch.float64), torch.full((), 80.0 * 8, dtype=torch.float64)
    if isinstance(data, GaussianData):
        exact = data.jump(x, 0.002, 80.0) / 80
    else:  # the flow keeps the CDF: bisect in the inside of the distribution, where float64 resolves it
        x = data.draw((1, 3, 4, 4), torch.Generator().manual_seed(1)).clamp(-1, 1)
        image = (x + 1) / 2
        low, high = low.expand_as(x).clone(), high.expand_as(x).clone()
        for _ in range(80):
            middle = (low + high) / 2
            above = data.cdf(middle, 80.0) > data.cdf(x, 0.002)
            low, high = torch.where(above, low, middle), torch.where(above, middle, high)
        exact = middle / 80
    errors = [(pipe(image, num_inference_steps=n).latents - exact).abs().mean().item() for n in (20, 40, 80, 160)]
    assert all(1.6 < order < 2.7 for order in slope(errors)[1:]), errors
    assert errors[-1] < 2e-3
    assert len(pipe.unet.calls) == 2 * (20 + 40 + 80 + 160) and pipe.num_timesteps == 320  # 2N evaluations
    assert all(s is None for _, s in pipe.unet.calls)  # the exact score


class Flat:
    """A mixture in R^d as data of images (B, d, 1, 1)."""

    def __init__(self, mixture):
        self.mixture = mixture

    def g(self, x, t, s):
        assert (t == s).all()
        return self.mixture.denoiser(x.flatten(1), t).reshape(x.shape)


def mixture_problem():
    covs = torch.tensor([[[0.02, 0.0], [0.0, 0.05]], [[0.04, 0.02], [0.02, 0.03]], [[0.03, 0.0], [0.0, 0.03]]])
    return GaussianMixture([0.5, 0.3, 0.2], [[-0.7, 0.2], [0.5, 0.6], [0.4, -0.7]], covs)


def test_decoding_inverts_encoding_to_second_order():
    network = ExactDenoiserNetwork(Flat(mixture_problem()), sigma_data=0.6, size=1, channels=2)
    pipe = pipeline(network, EDMHeunScheduler(sigma_data=0.6))
    x = torch.tensor([[-0.65, 0.3], [0.4, 0.7], [0.3, -0.6], [-0.1, 0.3]])[..., None, None]
    errors = []
    for n in (20, 40, 80):
        latents = pipe((x + 1) / 2, num_inference_steps=n).latents
        errors.append((pipe.decode(latents, None, n, "latent").images - x).norm(dim=1).mean().item())
    assert all(1.7 < order < 3.2 for order in slope(errors)), errors
    assert errors[-1] < 5e-3


def test_encodes_the_authors_toy_problem(oracle):
    arrays = oracle("toy_gmm.npz")
    mixture = GaussianMixture(arrays["weights"], arrays["means"], arrays["covs"])
    network = ExactDenoiserNetwork(Flat(mixture), sigma_data=0.6, size=1, channels=2)
    at_sigma_min = np.abs(arrays["xT_s"] - 0.002).argmin()
    x, exact = (torch.from_numpy(v)[..., None, None] for v in (arrays["xT_G"][at_sigma_min], arrays["xT"] / 80))
    inside = x.abs().amax((1, 2, 3)) <= 1  # as pixels are
    x, exact = x[inside], exact[inside]
    assert len(x) > 100
    pipe = pipeline(network, EDMHeunScheduler(sigma_data=0.6))
    errors = [
        (pipe((x + 1) / 2, num_inference_steps=n).latents - exact).norm(dim=1).median().item() for n in (40, 80, 160)
    ]
    assert all(1.6 < order < 2.6 for order in slope(errors)) and errors[-1] < 1e-3, errors


def test_the_ctm_decodes_latents_in_one_jump():
    pipe, image = pipeline(), pixels()
    latents = pipe(image, num_inference_steps=200).latents
    sampler = pipeline(pipe.unet, pipe.scheduler, CTMPipeline)
    for steps in (1, 3):
        images = sampler(latents=latents, num_inference_steps=steps, output_type="latent").images
        close(images, centered(image), 0, 2e-3)
    assert torch.equal((sampler(latents=latents, output_type="pt").images * 255).round().byte(), image)


# Images ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "image, message",
    [
        (torch.rand(1, 3, 8, 8), "^image is 8x8 pixels"),
        (torch.rand(1, 1, 4, 4), "image has 1 channels"),
        (centered(pixels()), r"Pass \(x \+ 1\) / 2"),
    ],
)
def test_bad_images_are_refused(image, message):
    pipe = pipeline()
    for call in (pipe, lambda image: pipe.interpolate(image, image)):
        with pytest.raises(ValueError, match=message):
            call(image)
    with pytest.raises(ValueError, match="other_image is empty"):
        pipe.interpolate(pixels(1), torch.rand(0, 3, 4, 4))
    assert not pipe.unet.calls


# Conventions ----------------------------------------------------------------------------------------------------------


def test_class_labels():
    network = ExactNetwork(GaussianData(0.1), sigma_data=0.6, class_shift=SHIFTS)
    pipe = pipeline(network, id2label={0: "dark", 1: "light"})
    image = torch.full((2, 3, 4, 4), 0.75)  # 0.5 in [-1, 1]
    latents = pipe(image, ["dark", 1], num_inference_steps=100).latents
    jumped = GaussianData(0.1).jump(torch.tensor([1.0, 0.0]), 0.002, 80.0) / 80
    for each, shift, expected in zip(latents, SHIFTS, jumped, strict=True):
        close(each - shift / 80, expected.expand(3, 4, 4), rtol=0.02, atol=1e-3)
    for labels, message in [(None, "class-conditional"), ([0, 1, 1], "3 entries"), (7, "not a class")]:
        with pytest.raises(ValueError, match=message):
            pipe(image, labels)
        with pytest.raises(ValueError, match=message):
            pipe.decode(latents, labels)
    with pytest.raises(ValueError, match="unconditional"):
        pipeline()(image, 0)


def test_callbacks_and_outputs():
    pipe, image, levels = pipeline(), pixels(), []

    def callback(pipe, step, timestep, tensors):
        levels.append(pipe.scheduler.t_to_sigma(timestep).item())
        pipe._interrupt = step == 2
        return {"latents": tensors["latents"] if step < 2 else torch.ones(2, 3, 4, 4)}

    (latents,) = pipe(image, num_inference_steps=5, return_dict=False, callback_on_step_end=callback)
    ramp = [(80 ** (1 / 7) + i / 5 * (0.002 ** (1 / 7) - 80 ** (1 / 7))) ** 7 for i in (4, 3, 2)]
    np.testing.assert_allclose(levels, ramp, rtol=1e-5)
    close(latents, torch.full((2, 3, 4, 4), 1 / 80))
    with pytest.raises(ValueError, match="latents"):
        pipe(image, callback_on_step_end=callback, callback_on_step_end_tensor_inputs=["noise"])
    for steps in (0, 2.5, -1):
        with pytest.raises(ValueError, match="num_inference_steps"):
            pipe(image, num_inference_steps=steps)
    with pytest.raises(ValueError, match="output_type"):
        pipe.decode(latents, output_type="jpg")
    with pytest.raises(ValueError, match="latents"):
        pipe.decode(torch.full((1, 3, 4, 4), math.nan))
    with pytest.raises(ValueError, match=r"latents must be .* \(B, 3, H, W\)"):
        pipe.decode(torch.zeros(1, 1, 4, 4))
    pipe.scheduler = EDMEulerScheduler.from_config(pipe.scheduler.config)
    with pytest.raises(ValueError, match="EDMHeunScheduler"):
        pipe(image)


# Interpolation --------------------------------------------------------------------------------------------------------


def test_slerp_walks_the_circle_at_constant_speed():
    a, b = randn(3, 4, 4, seed=1), randn(3, 4, 4, seed=2)
    b = b * (a.flatten(1).norm(dim=1) / b.flatten(1).norm(dim=1))[:, None, None]
    theta = torch.nn.functional.cosine_similarity(a.flatten(1), b.flatten(1)).acos()
    for weight in (0.0, 0.3, 1.0):
        c = slerp(a, b, weight)
        close(c.flatten(1).norm(dim=1), a.flatten(1).norm(dim=1))
        close(torch.nn.functional.cosine_similarity(a.flatten(1), c.flatten(1)), (weight * theta).cos())
    weights = torch.tensor([0.0, 0.5, 1.0])
    close(slerp(a, b, weights), torch.stack([slerp(a, b, w)[i] for i, w in enumerate(weights)]))
    close(slerp(a, b, weights)[[0, 2]], torch.stack([a[0], b[2]]))
    close(slerp(a, a, 0.3), a)
    close(slerp(a, a * (1 + 1e-9), 0.3), a)
    close(slerp(a, 2 * a, 0.5), 1.5 * a)


def test_slerp_refuses():
    a = randn(2, 3)
    for arguments, message in [
        ((a, -a, 0.5), "opposite"),
        ((a, a[:1], 0.5), "shape"),
        ((a, a, torch.zeros(3)), "weight"),
        ((a[0], a[0], 0.5), "shape"),
    ]:
        with pytest.raises(ValueError, match=message):
            slerp(*arguments)


def test_interpolation_starts_and_ends_at_the_images():
    pipe, image = pipeline(), pixels(seed=4)
    images = pipe.interpolate(image[0], image[1], num_inference_steps=150, output_type="latent").images
    assert images.shape == (5, 3, 4, 4) and pipe.num_timesteps == 300
    close(images[[0, -1]], centered(image), 0, 5e-3)
    # of this linear flow, in between it is the flow of the interpolated latents
    latents = pipe(image, num_inference_steps=150).latents
    middle = slerp(latents[:1], latents[1:], 0.5)
    close(images[2:3], DATA.jump(80 * middle.double(), 80.0, 0.002), 0, 5e-3)
    assert len(pipe.interpolate(image[0], image[1], [0.5], num_inference_steps=1).images) == 1

    bright = torch.full((3, 4, 4), 0.8)
    images = pipe.interpolate(bright, bright, [0.5], num_inference_steps=150, output_type="latent").images
    close(images[0], torch.full((3, 4, 4), 0.6), 0, 5e-3)
    with pytest.raises(ValueError, match="one image"):
        pipe.interpolate(image, image)
    for weights in ([], [1.5], 0.5, [math.nan], ["half"]):
        with pytest.raises(ValueError, match="weights"):
            pipe.interpolate(image[0], image[1], weights)


def test_interpolation_between_classes_changes_class_in_the_middle():
    pipe = pipeline(ExactNetwork(GaussianData(0.1), sigma_data=0.6, class_shift=SHIFTS))
    image = torch.stack([torch.full((3, 4, 4), 0.25), torch.full((3, 4, 4), 0.75)])
    image[0, 0] += 0.02
    image[1, 1] += 0.02
    images = pipe.interpolate(*image, [0.0, 0.49, 0.51, 1.0], [0, 1], 100, "latent").images
    assert [-1 if mean < 0 else 1 for mean in images.mean((1, 2, 3))] == [-1, -1, 1, 1]
    one = pipe.interpolate(image[0], image[0], [0.0, 0.7], 0, 100, "latent").images
    close(one, (2 * image[:1] - 1).expand(2, -1, -1, -1), 0, 5e-3)
