# Copyright 2026 The diffusers-ctm authors. Licensed under the Apache License, Version 2.0.
"""Latents have the numbers of the autoencoder's config, and sampling them is sampling pixels in another order."""

import json
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from accelerate import cpu_offload_with_hook
from accelerate.hooks import UserCpuOffloadHook
from diffusers import (
    AutoencoderKLWan,
    DiffusionPipeline,
    StableDiffusion3Img2ImgPipeline,
    StableDiffusionXLImg2ImgPipeline,
)
from PIL import Image

from diffusers_ctm import (
    ClassifierGuidance,
    CTMImg2ImgPipeline,
    CTMInpaintPipeline,
    CTMInversionPipeline,
    CTMPipeline,
    CTMRestorationPipeline,
    CTMScheduler,
    EDMHeunScheduler,
    LossGuidance,
    MaskOperator,
    gamma_seed_grid,
    log_likelihood,
    rejection_sample,
    steps_gamma_grid,
    trajectory_strip,
)
from diffusers_ctm.autoencoder import decode, downscale, encode, latent_channels, moments, standardized
from helpers.autoencoders import AUTOENCODERS, Folding, Unfolded, in_blocks, in_memory, make_autoencoder
from helpers.comparing import close, seeded
from helpers.exact import ExactNetwork, GaussianData, randn
from helpers.places import ORACLE
from helpers.tiny_networks import make_edm


# EDM2's: mean and deviation of the latents of stabilityai/sd-vae-ft-mse, whose images are in [0, 1]; these end at
# deviation 0.5.
MEAN, STD = [5.81, 3.25, 0.12, -2.15], [4.17, 4.62, 3.71, 3.28]
EDM2 = {"latents_mean": MEAN, "latents_std": [2 * value for value in STD], "scaling_factor": 1.0}


def pipeline(unet=None, vae=None, cls=CTMPipeline, scheduler=None, **options):
    unet = make_edm(target_time=True, in_channels=4, out_channels=4, sample_size=4) if unet is None else unet
    pipe = cls(unet, scheduler or CTMScheduler(), vae=vae, **options)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def centered(*shape, seed=0):
    """Images in [-1, 1]."""
    return 2 * torch.rand(shape, generator=seeded(seed)) - 1


def per_channel(values):
    return torch.tensor(values)[:, None, None]


# The numbers of a config ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name, config, mean, scale",
    [
        ("KL", {}, 0.0, 0.18215),  # Stable Diffusion's
        ("KL", {"scaling_factor": 1.5305, "shift_factor": 0.0609}, 0.0609, 1.5305),  # Stable Diffusion 3's
        (
            "KL",
            {"scaling_factor": 0.5, "latents_mean": MEAN, "latents_std": STD},
            per_channel(MEAN),
            0.5 / per_channel(STD),
        ),
        ("KL", EDM2, per_channel(MEAN), 0.5 / per_channel(STD)),
        ("KL", {"scaling_factor": 0.5, "latents_mean": MEAN}, 0.0, 0.5),  # half of a pair says nothing
        ("Tiny", {}, 0.0, 1.0),
        ("Tiny", {"scaling_factor": 0.3, "shift_factor": 0.1}, 0.1, 0.3),
        ("DC", {"scaling_factor": 0.41407}, 0.0, 0.41407),
        ("VQ", {}, 0.0, 0.18215),
        ("VQ", {"scaling_factor": 2.0}, 0.0, 2.0),
    ],
)
@torch.no_grad()
def test_latents_have_the_numbers_of_the_config(name, config, mean, scale):
    vae, factor = make_autoencoder(name, **config), AUTOENCODERS[name][2]
    images = centered(2, 3, 16, 8)
    output = vae.encode(images)
    raw = output.latent_dist.mean if name == "KL" else output[0]
    latents = encode(vae, images)
    close(latents, (raw - mean) * scale)
    assert latents.shape == (2, latent_channels(vae), 16 // downscale(vae), 8 // downscale(vae))
    assert (latent_channels(vae), downscale(vae)) == (4, factor)
    found = moments(vae, images)
    assert torch.equal(found[0], raw) and standardized(vae, found[0]).equal(latents)
    if name == "KL":
        assert torch.equal(found[1], output.latent_dist.std) and found[1].min() > 0
    else:
        assert found[1] is None

    decoded = decode(vae, latents)
    close(decoded, vae.decode(raw).sample)
    assert decoded.shape == images.shape
    close(encode(vae, images, False), encode(vae, images / 2 + 0.5))  # it works on images in [0, 1]
    close(decode(vae, latents, False), 2 * decoded - 1)


@pytest.mark.parametrize(
    "cls, config",
    [
        (StableDiffusionXLImg2ImgPipeline, {}),
        (StableDiffusionXLImg2ImgPipeline, {"scaling_factor": 0.5, "latents_mean": MEAN, "latents_std": STD}),
        (StableDiffusion3Img2ImgPipeline, {"scaling_factor": 1.5305, "shift_factor": 0.0609}),
    ],
)
@torch.no_grad()
def test_latents_are_those_of_diffusers_own_pipelines(cls, config):
    vae = make_autoencoder("KL", **config)
    vae.quant_conv.weight[4:], vae.quant_conv.bias[4:] = 0, -30  # they draw; this leaves the mean
    images = centered(2, 3, 8, 8)
    no_noise = SimpleNamespace(scale_noise=lambda latents, timestep, noise: latents)
    options = {"add_noise": False} if cls is StableDiffusionXLImg2ImgPipeline else {}
    theirs = cls.prepare_latents(
        SimpleNamespace(vae=vae, scheduler=no_noise), images, None, 2, 1, torch.float32, torch.device("cpu"), **options
    )
    close(encode(vae, images), theirs, atol=1e-5)


@torch.no_grad()
def test_the_convention_of_edm2():
    vae = make_autoencoder("KL", **EDM2)
    pipe = pipeline(vae=vae, normalize_images=False)
    pixels = torch.rand(1, 3, 16, 16, generator=seeded())
    raw = vae.encode(pixels).latent_dist.mean
    scale, bias = [0.5 / 4.17, 0.5 / 4.62, 0.5 / 3.71, 0.5 / 3.28], [-0.69664, -0.35173, -0.016173, 0.327744]
    close(pipe.encode_images(pixels), raw * per_channel(scale) + per_channel(bias))
    final = 0.5 * randn(1, 4, 4, 4, dtype=torch.float32)
    decoded = vae.decode((final - per_channel(bias)) / per_channel(scale)).sample
    close(pipe.decode_states(final), 2 * decoded - 1, atol=2e-5)
    latents = randn(1, 4, 4, 4, seed=1, dtype=torch.float32)
    states = pipe(latents=latents, output_type="latent").images
    images = pipe(latents=latents, output_type="pt").images
    decoded = vae.decode(states * 2 * per_channel(STD) + per_channel(MEAN)).sample
    close(images, decoded.clamp(0, 1))  # not (decoded + 1) / 2
    assert images.std() > 1e-3


def test_numbers_of_edm2s_code():
    path = ORACLE.parent / "oracle-edm2" / "edm2_numbers.json"
    if not path.exists():
        pytest.skip("the oracle folder is not here")
    numbers = json.loads(path.read_text())["stability_vae"]
    assert (numbers["raw_mean"], numbers["raw_std"]) == (MEAN, STD)
    mean, std, noise, final = (
        torch.tensor(numbers["example"][name]).reshape(1, 4, 2, 2) for name in ("mean", "std", "noise", "final")
    )
    vae = Folding(**EDM2)
    close(standardized(vae, mean + std * noise), final)

    given, shown = numbers["decode_example"], []
    vae.decode = lambda raw, return_dict: (shown.append(raw) or raw[:, :3] * 0.1 + 0.45,)
    images = decode(vae, final, normalized=False) / 2 + 0.5
    close(shown[0].flatten(), given["vae_input"], atol=1e-4)
    assert (images * 255).clamp(0, 255).to(torch.uint8).flatten().tolist() == given["pixels_uint8"]

    pixels = numbers["encode_pixels_vae_input"]
    images = torch.tensor(pixels["pixels"], dtype=torch.float32).reshape(1, 3, 2, 2) / 255
    vae = Folding(channels=3, latent_channels=4)
    pipeline(vae=vae, normalize_images=False).encode_images(images)
    close(vae.seen[0].flatten(), pixels["vae_input"], atol=1e-6)


def test_raw_latents_come_back_to_the_last_digits():
    vae = Folding(**{**EDM2, "scaling_factor": 0.3}).double()
    raw = 5 * randn(2, 4, 4, 4)
    latents = standardized(vae, raw)
    assert latents.dtype == torch.float64
    decode(vae, latents)
    assert vae.seen[-1].dtype == torch.float64 and (vae.seen[-1] - raw).abs().max() < 1e-14


@pytest.mark.parametrize("name", AUTOENCODERS)
def test_gradients_come_through_the_decoder(name):
    vae = make_autoencoder(name, scaling_factor=0.25, **({"shift_factor": 0.5} if name in ("KL", "Tiny") else {}))
    latents = randn(2, 4, 4, 4, dtype=torch.float32).requires_grad_()
    raw = (latents.detach() / 0.25 + (0.5 if name in ("KL", "Tiny") else 0.0)).requires_grad_()
    weight = centered(*decode(vae, latents).shape)
    (gradient,) = torch.autograd.grad((weight * decode(vae, latents)).sum(), latents)
    (by_hand,) = torch.autograd.grad((weight * vae.decode(raw).sample).sum(), raw)
    close(gradient, by_hand / 0.25)
    assert gradient.flatten(1).abs().amax(1).min() > 1e-3


# Half precision and offloading ----------------------------------------------------------------------------------------


def overflowing(dtype=torch.float16, **config):
    """An autoencoder whose activations are beyond float16's range, as those of SDXL's; weights that are of float16."""
    vae = make_autoencoder("KL", **config)
    for conv in (vae.encoder.conv_in, vae.decoder.conv_in):
        conv.weight.data *= 3e5
    return vae.half().to(dtype)


@torch.no_grad()
def test_what_overflows_in_half_precision():
    images, latents = centered(2, 3, 8, 8), randn(2, 4, 2, 2, dtype=torch.float32)
    exact, half = overflowing(torch.float32), overflowing()
    assert exact.config.force_upcast  # the default of AutoencoderKL
    assert torch.equal(encode(half, images), encode(exact, images))
    assert torch.equal(decode(half, latents), decode(exact, latents)) and decode(half, latents).isfinite().all()
    assert {weight.dtype for weight in half.parameters()} == {torch.float16}
    plain = overflowing(force_upcast=False)
    assert not encode(plain, images).isfinite().all() and not decode(plain, latents).isfinite().all()

    def fail(*args, **kwargs):
        raise RuntimeError(f"no memory for {half.dtype}")

    half.encode = half.decode = fail
    for call in (lambda: encode(half, images), lambda: decode(half, latents)):
        with pytest.raises(RuntimeError, match="no memory for torch.float32"):
            call()
        assert {weight.dtype for weight in half.parameters()} == {torch.float16}


@torch.no_grad()
def test_half_precision_otherwise_stays():
    for dtype, config in ((torch.float16, {"force_upcast": False}), (torch.bfloat16, {})):
        vae = make_autoencoder("KL", **config).to(dtype)
        images, latents = centered(2, 3, 8, 8), randn(2, 4, 2, 2, dtype=torch.float32)
        raw = vae.encode(images.to(dtype)).latent_dist.mean
        assert torch.equal(encode(vae, images), raw.float() * 0.18215)
        assert torch.equal(decode(vae, latents), vae.decode((latents / 0.18215).to(dtype)).sample.float())


@pytest.mark.parametrize("on", ["prediction", "image"])
@pytest.mark.parametrize("upcast", [True, False])
def test_guidance_through_an_autoencoder_in_half_precision(on, upcast):
    exact = make_autoencoder("KL", force_upcast=upcast).half().float()
    half = make_autoencoder("KL", force_upcast=upcast).half()
    # A mean over many pixels, whose gradient float16 does not hold
    guidance = LossGuidance(lambda x: 1e-7 * x.square().mean((1, 2, 3)), 3e8, on)
    options = {"latents": randn(2, 4, 4, 4, dtype=torch.float32), "num_inference_steps": 2, "output_type": "latent"}
    plain = pipeline(vae=exact)(**options).images
    expected = pipeline(vae=exact)(**options, guidance=guidance).images
    assert (expected - plain).abs().max() > 0.01
    close(pipeline(vae=half)(**options, guidance=guidance).images, expected)
    assert half.dtype == torch.float16


def test_offloading_leaves_the_network_while_a_gradient_needs_it():
    pipe, sent = pipeline(vae=make_autoencoder("Tiny")), []

    class OfTheNetwork(UserCpuOffloadHook):
        """What enable_model_cpu_offload gives the autoencoder, of a network on another device."""

        def offload(self):
            sent.append(torch.is_grad_enabled())

    cpu_offload_with_hook(pipe.vae, "cpu", OfTheNetwork(torch.nn.Linear(1, 1, device="meta"), None))
    # Sending a network away after its forward pass takes the weights that its gradient is computed with.
    guidance = LossGuidance(lambda x: x.square().sum((1, 2, 3)))
    pipe(num_inference_steps=2, guidance=guidance)
    assert sent == [False]  # for the image at the end
    pipe(num_inference_steps=2)
    assert sent == [False, False]


def test_autoencoders_made_in_inference_mode_cannot_guide():
    with torch.inference_mode():
        vae = make_autoencoder("Tiny")
    pipe = pipeline(vae=vae)
    pipe()
    with pytest.raises(ValueError, match="made inside torch.inference_mode.*Load it outside"):
        pipe(guidance=LossGuidance(lambda x: x.square().sum((1, 2, 3))))
    noisy = LossGuidance(lambda x: x.square().sum((1, 2, 3)), on="noisy")
    assert len(pipe(guidance=noisy).images) == 1


# Latents are pixels in another order ----------------------------------------------------------------------------------


IMAGES = torch.rand(2, 1, 8, 8, generator=seeded(4))
NOISE = randn(2, 1, 8, 8, seed=5, dtype=torch.float32)
CLASSES = [0, 2]
# The last two columns of each row of blocks are repainted.
MASK = torch.zeros(1, 1, 8, 8)
MASK[..., 4:] = 1


def brightness(images):
    """Logits of a classifier of pixels: the means of three parts, which only it knows."""
    parts = images[..., :2, :], images[..., 2:5, 1:], images[..., 5:, :3]
    return 5 * torch.stack([part.mean((1, 2, 3)) for part in parts], dim=1)


def sampled(pipe, fold, **options):
    """Images and states of `pipe`."""
    options = {"class_labels": CLASSES, "num_inference_steps": 3, "gamma": 0.6, **options}
    return {kind: pipe(generator=seeded(), output_type=kind, **options).images for kind in ("pt", "latent")}


def guided(on):
    return lambda pipe, fold: sampled(pipe, fold, guidance=ClassifierGuidance(brightness, [1, 0], 30.0, on))


def restored(pipe, fold):
    known = torch.eye(8).expand(1, 1, 8, 8).clone()
    measured = IMAGES if pipe.vae is None else 2 * fold(IMAGES) - 1
    options = {"measurement": measured * fold(known), "operator": MaskOperator(fold(known)), "class_labels": CLASSES}
    return {"latent": pipe(**options, num_inference_steps=3, generator=seeded(), output_type="latent").images}


def inverted(pipe, fold):
    latents = pipe(IMAGES, CLASSES, num_inference_steps=4).latents
    return {
        "latent": latents,
        "pt": pipe.decode(latents, CLASSES, 4, output_type="pt").images,
        "between": pipe.interpolate(IMAGES[:1], IMAGES[1:], [0.0, 0.3, 1.0], 1, 4, output_type="pt").images,
    }


def shown(pipe, fold):
    options = {"class_labels": [1], "generator": seeded(), "output_type": "pt"}
    strip = trajectory_strip(pipe, 2, gamma=0.5, **options)
    return {
        "states": torch.cat(strip.states),
        "estimates": torch.cat(strip.estimates),
        "seeds": torch.cat(gamma_seed_grid(pipe, (0.0, 1.0), (3, 4), 2, 1, seeded(), output_type="pt")),
        "steps": torch.cat(steps_gamma_grid(pipe, (1, 2), (0.0, 1.0), 1, seeded(), "pt")),
    }


def accepted(pipe, fold):
    results = {}
    for kind in ("pt", "latent"):
        options = {"class_labels": CLASSES, "generator": seeded(), "output_type": kind, "num_inference_steps": 2}
        output = rejection_sample(pipe, brightness, 2, top_fraction=0.4, **options)
        results |= {kind: output.images, f"scores {kind}": output.scores}
    return results


CALLS = {
    "sampling": (CTMPipeline, sampled),
    "given noise": (CTMPipeline, lambda pipe, fold: sampled(pipe, fold, latents=fold(NOISE), gamma=0.0)),
    "guidance on the prediction": (CTMPipeline, guided("prediction")),
    "guidance on the image": (CTMPipeline, guided("image")),
    "image to image": (CTMImg2ImgPipeline, lambda pipe, fold: sampled(pipe, fold, image=IMAGES, strength=0.6)),
    "restoration": (CTMRestorationPipeline, restored),
    "inversion": (CTMInversionPipeline, inverted),
    "pictures": (CTMPipeline, shown),
    "rejection": (CTMPipeline, accepted),
}


def pair(cls=CTMPipeline, order=None, scheduler=CTMScheduler):
    """A pipeline of latents and the same one of pixels. Powers of two are exact in floats."""
    order = order or in_memory()
    unet = make_edm(target_time=True, in_channels=4, out_channels=4, sample_size=4, num_class_embeds=3)
    latent = pipeline(unet, Folding(order, gain=4.0, scaling_factor=0.25), cls, scheduler())
    return latent, pipeline(Unfolded(unet, order), None, cls, scheduler()), order[0]


@pytest.mark.parametrize("name", CALLS)
def test_latents_are_pixels_in_another_order(name):
    cls, call = CALLS[name]
    latent, pixel, fold = pair(cls)
    found, expected = call(latent, fold), call(pixel, lambda images: images)
    assert found.keys() == expected.keys()
    for kind in found:
        assert torch.equal(found[kind], fold(expected[kind]) if kind == "latent" else expected[kind]), kind
        assert found[kind].std() > 0.01
    if "pt" in found and "latent" in found and name != "inversion":
        assert torch.equal(found["pt"], (latent.decode_states(found["latent"]) / 2 + 0.5).clamp(0, 1))


def test_solvers_and_pictures_of_latents():
    latent, pixel, fold = pair(scheduler=EDMHeunScheduler)
    options = {"class_labels": CLASSES, "num_inference_steps": 3}
    found = latent(**options, latents=fold(NOISE)).images
    assert [np.array(image).tolist() for image in found] == [
        np.array(image).tolist() for image in pixel(**options, latents=NOISE).images
    ]
    assert found[0].size == (8, 8) and found[0].mode == "L"
    arrays = latent(**options, latents=fold(NOISE), output_type="np").images
    assert arrays.shape == (2, 8, 8, 1)


def test_guidance_moves_by_the_gradient_through_the_decoder():
    latent, _, fold = pair()
    latent.vae = vae = make_autoencoder("KL", in_channels=1, out_channels=1)
    x_t = 2 * fold(NOISE)
    options = {"class_labels": CLASSES, "sigmas": [2.0], "latents": x_t / 2, "output_type": "latent"}
    loss = LossGuidance(lambda images: (images - 0.3).square().sum((1, 2, 3)), 0.7)
    moved = latent(**options, guidance=loss).images - latent(**options).images

    x = x_t.clone().requires_grad_()
    t, s = torch.tensor(2.0, dtype=torch.float64), torch.tensor(0.002, dtype=torch.float64)
    g = latent.scheduler.preconditioning.g(latent.unet, x, t, s, class_labels=torch.tensor(CLASSES))
    images = vae.decode(g / 0.18215).sample
    (gradient,) = torch.autograd.grad((images - 0.3).square().sum(), x)
    # A jump from t to s ~ 0 of weight w = t (t + s) (r t + s) / ((1 + r) (t + s)), r^2 = (V + s^2) / (V + t^2)
    r = math.sqrt((0.25 + 0.002**2) / (0.25 + 4))
    weight = 2 * (r * 2 + 0.002) / (1 + r)
    close(moved, -0.7 * weight * (1 - 0.001) * gradient, rtol=1e-3, atol=1e-4)
    assert moved.abs().max() > 0.01


def test_likelihood_is_that_of_the_latents():
    latent, pixel, _ = pair()
    options = {"class_labels": 1, "rtol": 1e-2, "atol": 1e-2}
    images = (255 * IMAGES[:1]).round() / 255
    for method in ("ode", "elbo"):
        found, again, as_pixels = (
            log_likelihood(pipe, images, method=method, generator=seeded(), num_draws=1, **options, **more)
            for pipe, more in ((latent, {}), (latent, {"dequantize": False}), (pixel, {"dequantize": False}))
        )
        close(found.nats, as_pixels.nats)
        close(found.bits_per_dim, -found.nats / (64 * math.log(2)))  # a density: no offset of 8-bit values
        close(as_pixels.bits_per_dim - math.log2(127.5), found.bits_per_dim, atol=1e-4)
        assert torch.equal(found.nats, again.nats)  # nothing is spread over cells of 8 bits
        assert (found.nfe, found.backward_passes) == (as_pixels.nfe, as_pixels.backward_passes)
    wide = pipeline(ExactNetwork(GaussianData(2.0), channels=4, size=4).eval(), Folding(gain=3.0))
    found = log_likelihood(wide, IMAGES, rtol=1e-4, atol=1e-4)  # of a scaled identity each probe gives the trace
    z = 3 * (2 * IMAGES.double() - 1)
    close(found.nats, torch.distributions.Normal(0.0, 2.0).log_prob(z).flatten(1).sum(1), rtol=1e-3)


# Inpainting -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("output_type", ["pt", "latent"])
def test_inpainting_of_blocks_is_inpainting_of_pixels(output_type):
    latent, pixel, fold = pair(CTMInpaintPipeline, in_blocks())
    options = {"image": IMAGES, "mask_image": MASK, "class_labels": CLASSES, "num_inference_steps": 3, "gamma": 0.0}
    found = latent(**options, latents=fold(NOISE), output_type=output_type).images
    expected = pixel(**options, latents=NOISE, output_type=output_type).images
    close(found, fold(expected) if output_type == "latent" else expected)
    if output_type == "latent":
        assert torch.equal(found[..., :2], fold(2 * IMAGES - 1)[..., :2])
    else:
        assert torch.equal(found[..., :4], IMAGES[..., :4])
    assert found[..., found.shape[-1] // 2 :].std() > 0.01


def test_a_latent_is_known_if_all_of_its_pixels_are():
    latent, _, fold = pair(CTMInpaintPipeline, in_blocks())
    mask = torch.zeros(1, 1, 8, 8)
    mask[..., 3, 5] = 1
    options = {"mask_image": mask, "class_labels": CLASSES, "num_inference_steps": 3, "generator": seeded()}
    found = latent(IMAGES, **options, output_type="latent").images
    kept = torch.ones(2, 4, 4, 4, dtype=torch.bool)
    kept[..., 1, 2] = False
    given = fold(2 * IMAGES - 1)
    assert torch.equal(latent.vae.seen[0], torch.where(mask == 1, 0.0, 2 * IMAGES - 1))  # gray where nothing is known
    assert torch.equal(found[kept], given[kept])
    assert (found[~kept] - given[~kept]).abs().min() > 1e-6  # of the block's other pixels too
    images = latent(IMAGES, **options, output_type="pt").images
    assert torch.equal(images == IMAGES, (mask == 0).expand_as(IMAGES))  # which are pasted over the decoded image


@pytest.mark.parametrize("gamma", [0.0, 1.0])
def test_known_pixels_come_back_through_an_autoencoder_that_loses_much(gamma):
    pipe = pipeline(vae=make_autoencoder("KL"), cls=CTMInpaintPipeline)
    image, mask = torch.rand(2, 3, 16, 16, generator=seeded()), torch.zeros(2, 1, 16, 16)
    mask[0, :, 2:9, 3:13], mask[1, :, 11:, 5] = 1, 1

    def images(under, output_type):
        given = torch.where(mask == 1, under, image)
        options = {"num_inference_steps": 2, "gamma": gamma, "output_type": output_type}
        return pipe(given, mask, generator=seeded(), **options).images

    found, known = images(torch.tensor(0.9), "pt"), (mask == 0).expand_as(image)
    assert torch.equal(found[known], image[known])
    assert not torch.isclose(found[~known], image[~known], atol=1e-3).all()
    assert found.min() >= 0 and found.max() <= 1
    other = torch.rand(2, 3, 16, 16, generator=seeded(1))
    for output_type in ("pt", "latent"):  # what was under the white has no influence, in latents too
        assert torch.equal(images(other, output_type), images(torch.tensor(0.9), output_type))

    bits = (255 * image).round().to(torch.uint8)
    pictures = pipe(list(bits.permute(0, 2, 3, 1).numpy()), mask, num_inference_steps=1).images
    back = torch.stack([torch.from_numpy(np.array(picture)).permute(2, 0, 1) for picture in pictures])
    assert torch.equal(back[known], bits[known])


# Safety ---------------------------------------------------------------------------------------------------------------


class Bright:
    """Flags images that are brighter than the middle."""

    def __init__(self):
        self.seen = []

    def __call__(self, images):
        self.seen.append(images.copy())
        return images, [bool(image.mean() > 0.5) for image in images]


SAFE_CALLS = {
    "sampling": (CTMPipeline, lambda pipe, **kw: pipe(generator=seeded(), **kw)),
    "image to image": (
        CTMImg2ImgPipeline,
        lambda pipe, **kw: pipe(torch.full((3, 1, 8, 8), 0.4), sigma=5.0, generator=seeded(), **kw),
    ),
    "inpainting": (
        CTMInpaintPipeline,
        lambda pipe, **kw: pipe(torch.full((3, 1, 8, 8), 0.4), torch.ones(8, 8), generator=seeded(), **kw),
    ),
    "decoding": (
        CTMInversionPipeline,
        lambda pipe, **kw: pipe.decode(
            randn(3, pipe.unet.config.in_channels, *pipe.state_size, dtype=torch.float32), num_inference_steps=8, **kw
        ),
    ),
}


def bright_and_dark(cls=CTMPipeline, same_shape=False, **options):
    """A pipeline whose class 0 is bright, and what its latents of black are: bright, since they are negatives.

    `same_shape`: of the images; then only where they come from tells latents.
    """
    order, sizes = in_blocks(), {}
    if same_shape:
        order, sizes = (lambda x: x,) * 2, {"latent_channels": 1, "block_out_channels": (1,)}
    vae = Folding(order, gain=-1.0, **sizes)
    channels, size = (1, 8) if same_shape else (4, 4)
    network = ExactNetwork(GaussianData(0.1), 0.6, size=size, channels=channels, class_shift=[-0.5, 0.5])
    return pipeline(network, vae, cls, CTMScheduler(sigma_data=0.6), **options), torch.ones(channels, size, size)


@pytest.mark.parametrize("name", SAFE_CALLS)
@pytest.mark.parametrize("same_shape", [False, True])
def test_the_safety_checker_sees_images(name, same_shape):
    cls, call = SAFE_CALLS[name]
    checked, black = bright_and_dark(cls, same_shape, safety_checker=Bright())
    plain, _ = bright_and_dark(cls, same_shape)
    images = call(plain, class_labels=[1, 0, 1], output_type="np").images
    black = {"latent": black, "pt": torch.zeros(1, 8, 8), "np": np.zeros((8, 8, 1)), "pil": np.zeros((8, 8))}
    for output_type in black:
        output = call(checked, class_labels=[1, 0, 1], output_type=output_type)
        assert output.nsfw_content_detected == [False, True, False]
        seen = checked.safety_checker.seen.pop()
        np.testing.assert_allclose(seen, images.repeat(3, axis=-1), atol=1e-6)
        expected = list(call(plain, class_labels=[1, 0, 1], output_type=output_type).images)
        expected[1] = black[output_type]
        for image, wanted in zip(output.images, expected, strict=True):
            np.testing.assert_array_equal(np.asarray(image), np.asarray(wanted))
    assert not checked.safety_checker.seen


def test_strips_and_rejection_are_checked_as_images():
    pipe, black = bright_and_dark(safety_checker=Bright())
    options = {"class_labels": [1, 0], "num_inference_steps": 2, "output_type": "latent"}
    strip = trajectory_strip(pipe, generator=seeded(), **options)
    plain = trajectory_strip(bright_and_dark()[0], generator=seeded(), **options)
    assert torch.equal(strip.estimates[-1][1], black) and not torch.equal(plain.estimates[-1][1], black)
    assert not torch.equal(strip.estimates[-1][0], black)
    # What is accepted is judged as an image, and is none that was flagged.
    judged = []

    def classifier(images):
        judged.append(images)
        return torch.stack([-images.mean((1, 2, 3)), images.mean((1, 2, 3))], 1)

    for output_type in ("latent", "pt"):
        options = {"class_labels": [0, 1, 0, 1], "generator": seeded(), "output_type": output_type}
        output = rejection_sample(pipe, classifier, 4, threshold=0.0, max_batches=2, **options)
        assert output.class_labels.tolist() == [1, 1] and judged[-1].shape[1:] == (1, 8, 8)
        assert judged[-1].abs().max() <= 1
        shown = pipe.decode_states(output.images) if output_type == "latent" else 2 * output.images - 1
        assert shown.shape[1:] == (1, 8, 8) and shown.mean() < -0.3


# Pipelines ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", AUTOENCODERS)
def test_any_autoencoder_is_sampled_saved_and_loaded(name, tmp_path):
    vae, factor = make_autoencoder(name), AUTOENCODERS[name][2]
    pipe = pipeline(vae=vae, normalize_images=name != "KL")
    options = {"batch_size": 2, "num_inference_steps": 2, "gamma": 0.5}
    states = pipe(generator=seeded(), output_type="latent", **options).images
    images = pipe(generator=seeded(), output_type="pt", **options).images
    with torch.no_grad():
        raw = states / (0.18215 if name in ("KL", "VQ") else 1.0)
        decoded = vae.decode(raw).sample
    close(images, (decoded if name == "KL" else decoded / 2 + 0.5).clamp(0, 1))
    assert images.shape == (2, 3, 4 * factor, 4 * factor) and images.std() > 1e-3
    assert (pipe.image_size, pipe.state_size, pipe.image_channels) == ((4 * factor,) * 2, (4, 4), 3)
    pictures = pipe(generator=seeded(), **options).images
    assert {(picture.size, picture.mode) for picture in pictures} == {((4 * factor,) * 2, "RGB")}
    for part in pipe(generator=seeded(), **options, output_type="np", return_dict=False):
        np.testing.assert_allclose(part, images.permute(0, 2, 3, 1).numpy(), atol=1e-6)

    pipe.save_pretrained(tmp_path)
    again = DiffusionPipeline.from_pretrained(tmp_path)
    again.set_progress_bar_config(disable=True)
    assert type(again.vae) is type(vae) and again.config.normalize_images == (name != "KL")
    assert torch.equal(again(generator=seeded(), output_type="pt", **options).images, images)
    assert again.to(torch.bfloat16).vae.dtype == again.unet.dtype == torch.bfloat16
    found = again(generator=seeded(), output_type="pt", **options).images
    assert found.dtype == torch.float32 and (found - images).abs().max() < 0.2


def test_a_pipeline_keeps_its_autoencoder(tmp_path):
    pipe = pipeline(vae=make_autoencoder("Tiny"), normalize_images=False)
    for cls in (CTMImg2ImgPipeline, CTMInpaintPipeline, CTMRestorationPipeline, CTMInversionPipeline, CTMPipeline):
        pipe = cls.from_pipe(pipe)
        assert type(pipe) is cls and pipe.vae is not None and pipe.config.normalize_images is False
    other = make_autoencoder("Tiny", seed=1)
    pipe.save_pretrained(tmp_path / "as given")
    again = DiffusionPipeline.from_pretrained(tmp_path / "as given", vae=other)
    assert again.vae is other
    without = CTMImg2ImgPipeline.from_pretrained(tmp_path / "as given", vae=None)
    assert without.vae is None and without.image_size == (4, 4)
    pipe.vae = other  # an attribute of a pipeline is saved as any component
    pipe.save_pretrained(tmp_path / "replaced")
    weights = DiffusionPipeline.from_pretrained(tmp_path / "replaced").vae.state_dict()
    assert all(torch.equal(weights[name], weight) for name, weight in other.state_dict().items())


@pytest.mark.parametrize("first, second", [({"max_shard_size": "1KB"}, {}), ({}, {"safe_serialization": False})])
def test_the_autoencoder_that_was_saved_last_is_loaded(first, second, tmp_path):
    pipeline(vae=make_autoencoder("Tiny")).save_pretrained(tmp_path, **first)
    pipe = pipeline(vae=make_autoencoder("Tiny", seed=1))
    pipe.save_pretrained(tmp_path, **second)
    weights = DiffusionPipeline.from_pretrained(tmp_path).vae.state_dict()
    assert all(torch.equal(weights[name], weight) for name, weight in pipe.vae.state_dict().items())


def test_without_an_autoencoder_nothing_changes(tmp_path):
    pipe = pipeline()
    options = {"generator": None, "output_type": "latent"}
    pipe.save_pretrained(tmp_path)
    index = json.loads((tmp_path / "model_index.json").read_text())
    assert index["vae"] == [None, None] and not (tmp_path / "vae").exists()
    images = pipe(**options | {"generator": seeded()}).images
    assert torch.equal(pipe.decode_states(images), images)
    close(pipe.encode_images(IMAGES), 2 * IMAGES - 1)
    # A checkpoint of before, whose index does not know it
    (tmp_path / "model_index.json").write_text(
        json.dumps({name: value for name, value in index.items() if name not in ("vae", "normalize_images")})
    )
    again = DiffusionPipeline.from_pretrained(tmp_path)
    again.set_progress_bar_config(disable=True)
    assert again.vae is None and again.config.normalize_images is True
    assert torch.equal(again(**options | {"generator": seeded()}).images, images)


def test_slicing_and_tiling_are_the_autoencoders_own():
    vae = make_autoencoder("KL")
    pipe = pipeline(vae=vae)
    options = {"batch_size": 3, "output_type": "pt"}
    expected, calls = pipe(generator=seeded(), **options).images, []
    decode_one, vae._decode = vae._decode, lambda z, **kw: (calls.append(len(z)), decode_one(z, **kw))[1]
    vae.enable_slicing()
    close(pipe(generator=seeded(), **options).images, expected)
    assert calls == [1, 1, 1]
    vae.enable_tiling()
    vae.tile_latent_min_size, vae.tile_sample_min_size, vae.tile_overlap_factor = 2, 8, 0.5
    tiled = pipe(generator=seeded(), **options).images
    assert tiled.shape == expected.shape and not torch.allclose(tiled, expected, atol=1e-4)


def test_edits_take_pictures_of_pixels():
    vae = make_autoencoder("KL")
    picture = Image.fromarray((255 * np.random.default_rng(0).random((16, 16, 3))).astype(np.uint8))
    edited = pipeline(vae=vae, cls=CTMImg2ImgPipeline)(picture, strength=0.01, output_type="latent").images
    with torch.no_grad():  # at the lowest levels the latents barely move
        given = torch.from_numpy(np.array(picture)).permute(2, 0, 1)[None] / 127.5 - 1
        close(edited, 0.18215 * vae.encode(given).latent_dist.mean, atol=0.05, rtol=0)


@pytest.mark.parametrize(
    "cls, arguments, options, message",
    [
        (CTMImg2ImgPipeline, (torch.zeros(1, 3, 8, 8),), {}, "image is 8x8 pixels .* this network makes 16x16"),
        (
            CTMImg2ImgPipeline,
            (torch.zeros(1, 4, 16, 16),),
            {},
            "image has 4 channels; this network makes images with 3",
        ),
        (CTMImg2ImgPipeline, (Image.new("L", (16, 16)),), {}, "mode 'L'.*'RGB'"),
        (
            CTMImg2ImgPipeline,
            (torch.zeros(1, 3, 16, 16),),
            {"add_noise": False},
            "add_noise=False takes noisy pixels, and this network knows the noise of latents only",
        ),
        (CTMPipeline, (), {"latents": torch.zeros(1, 3, 16, 16)}, r"latents must have shape \(1, 4, 4, 4\)"),
        (
            CTMRestorationPipeline,
            (Image.new("RGB", (16, 16)), MaskOperator(torch.ones(1, 1, 16, 16))),
            {},
            "measurement must be a tensor, what the operator gives for latents",
        ),
        (CTMInversionPipeline, (torch.zeros(1, 3, 4, 4),), {}, "image is 4x4 pixels .* this network makes 16x16"),
    ],
)
def test_what_does_not_fit_the_autoencoder(cls, arguments, options, message):
    pipe = pipeline(vae=make_autoencoder("KL"), cls=cls)
    calls = []
    pipe.unet.register_forward_hook(lambda *_: calls.append(1))
    with pytest.raises(ValueError, match=message):
        pipe(*arguments, **options)
    assert not calls


def test_an_autoencoder_of_videos_is_refused():
    vae = AutoencoderKLWan(base_dim=4, z_dim=4, dim_mult=[1], num_res_blocks=1, temperal_downsample=[])
    with pytest.raises(ValueError, match="AutoencoderKLWan is no autoencoder of images as AutoencoderKL.*VQModel are"):
        pipeline(vae=vae)


def test_autoencoders_of_other_channels_are_refused(tmp_path):
    with pytest.raises(ValueError, match="vae makes latents with 8 channels, and the network sees 4. Pass the autoenc"):
        pipeline(vae=make_autoencoder("KL", latent_channels=8))
    pipeline(vae=make_autoencoder("KL")).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="vae makes latents with 16 channels, and the network sees 4"):
        DiffusionPipeline.from_pretrained(tmp_path, vae=make_autoencoder("VQ", vq_embed_dim=16))
    pipe, calls = DiffusionPipeline.from_pretrained(tmp_path), []
    pipe.unet.register_forward_hook(lambda *_: calls.append(1))
    pipe.vae = make_autoencoder("KL", latent_channels=8)
    with pytest.raises(ValueError, match="vae makes latents with 8 channels, and the network sees 4"):
        pipe(output_type="latent")
    assert not calls
    unet = make_edm(target_time=True, in_channels=4, out_channels=4, sample_size=4)
    unet.register_to_config(sample_size=None)
    pipe = pipeline(unet, make_autoencoder("KL"), CTMImg2ImgPipeline)
    with pytest.raises(ValueError, match="image is 10x16 pixels; the autoencoder takes multiples of 4"):
        pipe(torch.zeros(1, 3, 10, 16))
    assert pipe(torch.zeros(1, 3, 8, 16), output_type="pt").images.shape == (1, 3, 8, 16)


@pytest.mark.parametrize("output_type", ["pil", "np", "pt"])
def test_latents_without_their_autoencoder_are_no_images(tmp_path, output_type):
    """Four channels would pass for colors with transparency."""
    latents = randn(1, 4, 4, 4, dtype=torch.float32)
    pipeline(vae=None).save_pretrained(tmp_path)
    alone = DiffusionPipeline.from_pretrained(tmp_path)
    calls = []
    alone.unet.register_forward_hook(lambda *_: calls.append(1))
    inverter = CTMInversionPipeline.from_pipe(alone)
    for call in (lambda: alone(output_type=output_type), lambda: inverter.decode(latents, output_type=output_type)):
        with pytest.raises(ValueError, match="makes 4 channels, which are latents, and their autoencoder is missing"):
            call()
    assert not calls and alone(output_type="latent").images.shape == (1, 4, 4, 4)
    with pytest.raises(ValueError, match="image has 3 channels; .* 4. If those are latents, pass their autoencoder"):
        inverter(torch.zeros(1, 3, 16, 16))
    whole = DiffusionPipeline.from_pretrained(tmp_path, vae=make_autoencoder("KL"))
    assert len(whole(output_type=output_type).images) == 1
