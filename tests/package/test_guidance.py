# Copyright 2026 The diffusers-ctm authors. Licensed under the Apache License, Version 2.0.
"""Guidance on Gaussians, where the posterior is known, on tiny real networks, and on digits."""

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline, EDMEulerScheduler, UNet2DModel
from diffusers.callbacks import MultiPipelineCallbacks, PipelineCallback, SDCFGCutoffCallback

from diffusers_ctm import (
    ClassAverage,
    ClassifierGuidance,
    CTMImg2ImgPipeline,
    CTMInpaintPipeline,
    CTMPipeline,
    CTMRestorationPipeline,
    CTMScheduler,
    EDMHeunScheduler,
    Guidance,
    LossGuidance,
    MaskOperator,
    log_likelihood,
    rejection_sample,
)
from diffusers_ctm.guidance import guidance_weight
from diffusers_ctm.preconditioning import Preconditioning
from helpers.comparing import close, seeded
from helpers.exact import ExactDenoiserNetwork, ExactNetwork, GaussianData, levels_like, randn


STD = 0.5  # of the data, which is sigma_data here: V = STD^2
V = STD**2


def pipeline(unet=None, scheduler=None, **options):
    pipe = CTMPipeline(unet or gaussian(), scheduler or CTMScheduler(sigma_data=STD), **options)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def gaussian(cls=ExactNetwork, **options):
    return cls(GaussianData(STD), **{"size": 2, "channels": 1, **options})


def heun(unet=None):
    return pipeline(unet, EDMHeunScheduler(sigma_data=STD))


def latents(count=64, channels=1, size=2, seed=3):
    return randn(count, channels, size, size, seed=seed, dtype=torch.float32)


def ratio(t, s, variance=V):
    """How much the flow of N(m, variance) shrinks distances from t to s."""
    return math.sqrt((variance + s**2) / (variance + t**2))


class Observed(Guidance):
    """y = x_0 + r noise: -log p(y | x_0), or if `aware` of the noise -log p(y | x_t) as a function of D or of x_t."""

    y, r = torch.tensor([[1.0, -0.5], [0.3, 0.0]]), 0.4

    def __init__(self, aware=True, **options):
        super().__init__(**options)
        self.aware = aware

    def loss(self, x_0, sigma, class_labels):
        t = sigma.reshape(-1, 1, 1, 1)
        if self.on == "noisy":
            x_0 = x_0 * V / (V + t**2)
        variance = self.r**2 + self.aware * V * t**2 / (V + t**2)
        return ((self.y - x_0) ** 2 / (2 * variance)).flatten(1).sum(1)

    @property
    def posterior_variance(self):
        return V * self.r**2 / (V + self.r**2)

    @property
    def posterior_mean(self):
        return self.y * V / (V + self.r**2)

    def exact(self, x, t, s):
        """Where the guided flow takes x from t to s."""
        return self.posterior_mean + (x - self.posterior_mean) * ratio(t, s, self.posterior_variance)


SLOPE = torch.tensor([[0.8, -0.4], [0.0, 2.0]])


def linear(**options):
    """A loss whose posterior is N(V SLOPE, V): p(x_0) exp(SLOPE x_0)."""
    return LossGuidance(lambda x_0: -(SLOPE * x_0).flatten(1).sum(1), **options)


# The weight of a jump -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("t, s", [(80.0, 0.002), (80.0, 5.0), (2.0, 1.9), (0.5, 0.1), (0.01, 0.002)])
@pytest.mark.parametrize("estimate", ["s", "end", "t"])
def test_the_weight_is_the_integral_of_the_guided_ode(t, s, estimate):
    estimate = {"s": s, "end": 0.002, "t": t}[estimate]
    u = torch.linspace(math.log(s), math.log(t), 20_001, dtype=torch.float64).exp()
    jacobian = ((V + s**2) / (V + u**2)).sqrt()  # of the jump from u to s
    shift = torch.trapezoid(jacobian * u * V / (V + u**2), u)  # of x_s, for a loss of slope 1 in x_0
    x = torch.tensor(1.0, dtype=torch.float64, requires_grad=True)
    (jacobian_g,) = torch.autograd.grad(GaussianData(STD).g(x, t, estimate), x)
    assert guidance_weight(t, s, estimate, STD) * jacobian_g * (1 - s / t) == pytest.approx(float(shift), rel=1e-6)


def test_the_weight_of_no_jump_is_that_of_the_score():
    for t in (0.01, 1.0, 80.0):
        for sigma_data in (0.1, 0.5, 2.0):  # whatever the data
            assert guidance_weight(t, t, t, sigma_data) == pytest.approx(t**2, rel=1e-12)
            close_by = 0.999 * t
            assert guidance_weight(t, close_by, close_by, sigma_data) == pytest.approx(t**2, rel=2e-3)


# Gaussian posteriors --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("on", ["prediction", "image"])
@pytest.mark.parametrize("steps", [1, 2, 5])
def test_a_linear_loss_is_exact_in_any_number_of_jumps(steps, on):
    images = pipeline()(
        latents=latents(), num_inference_steps=steps, output_type="latent", guidance=linear(on=on)
    ).images
    t, s = 80.0, 0.002
    close(images, 80 * latents() * ratio(t, s) + V * SLOPE * (1 - ratio(t, s)))
    doubled = pipeline()(
        latents=latents(), num_inference_steps=steps, output_type="latent", guidance=linear(on=on, scale=2.0)
    ).images
    close(doubled, 80 * latents() * ratio(t, s) + 2 * V * SLOPE * (1 - ratio(t, s)))


@pytest.mark.parametrize("on", ["prediction", "image"])
def test_a_linear_loss_ends_at_zero_through_the_denoiser(on):
    """The last step leads from sigma_min to 0 and is shown sigma_min: the loss moves it as it moves the flow."""
    end = 0.2
    pipe = pipeline(scheduler=CTMScheduler(sigma_data=STD, sigma_min=end, final_sigma=0.0))
    images = pipe(latents=latents(), num_inference_steps=2, output_type="latent", guidance=linear(on=on)).images
    x = 80 * latents() * ratio(80.0, end) + V * SLOPE * (1 - ratio(80.0, end))
    close(images, x * V / (V + end**2) + V * SLOPE * (1 - ratio(end, 0.0)), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("gamma", [0.5, 1.0])
def test_a_linear_loss_is_exact_at_any_gamma(gamma):
    x = latents(20_000)
    images = pipeline()(
        latents=x, num_inference_steps=3, gamma=gamma, generator=seeded(), output_type="latent", guidance=linear()
    ).images
    error = STD / len(x) ** 0.5
    # x_T is drawn around 0 rather than around the posterior's mean, which costs V SLOPE STD / 80
    assert ((images.mean(0)[0] - V * SLOPE).abs() < 4 * error + 0.01 * V * SLOPE.abs()).all()
    covariance = images.flatten(1).T.cov()
    close(covariance, V * torch.eye(4), rtol=0, atol=5 * V * (2 / len(x)) ** 0.5)


def errors(make_pipe, guidance, steps, end):
    exact = guidance.exact(80 * latents(), 80.0, end)
    found = []
    for n in steps:
        images = make_pipe()(latents=latents(), num_inference_steps=n, output_type="latent", guidance=guidance).images
        found.append(float((images - exact).abs().mean()))
    return found


def order_of(found, steps):
    return math.log(found[0] / found[-1]) / math.log(steps[-1] / steps[0])


@pytest.mark.parametrize("on", ["noisy", "prediction"])
@pytest.mark.parametrize("make_pipe, end, order, most", [(heun, 0.0, 1.8, 2e-3), (pipeline, 0.002, 0.9, 6e-3)])
def test_exact_guidance_is_of_second_order_in_the_score_and_of_first_in_jumps(make_pipe, end, order, most, on):
    steps = (40, 80)
    found = errors(make_pipe, Observed(on=on), steps, end)
    assert order_of(found, steps) > order and found[-1] < most, found


@pytest.mark.parametrize(
    "make_pipe, options, spread",
    [
        (heun, {"num_inference_steps": 60}, 0.01),
        (pipeline, {"num_inference_steps": 40, "gamma": 0.0}, 0.05),
        (pipeline, {"num_inference_steps": 40, "gamma": 1.0}, 0.07),
    ],
)
def test_guided_samples_have_the_mean_and_covariance_of_the_posterior(make_pipe, options, spread):
    guidance, x = Observed(on="noisy"), latents(10_000)
    images = make_pipe()(latents=x, generator=seeded(1), output_type="latent", guidance=guidance, **options).images
    variance = guidance.posterior_variance
    error = math.sqrt(variance / len(x))
    assert ((images.mean(0)[0] - guidance.posterior_mean).abs() < 4 * error + 0.006 * guidance.y.abs()).all()
    covariance = images.flatten(1).T.cov() / variance
    noise = 4 * (2 / len(x)) ** 0.5
    assert (covariance - torch.eye(4)).abs().max() < noise + 2 * spread
    assert (covariance - torch.diag(covariance.diag())).abs().max() < noise


def test_the_bias_of_a_loss_that_does_not_know_noise():
    """What the documentation says of -log p(y | x_0) at an estimate of x_0, in standard deviations of the posterior."""
    guidance = Observed(aware=False)
    scale = math.sqrt(guidance.posterior_variance)
    seen = {}
    for name, make_pipe, options in [
        ("heun", heun, {"num_inference_steps": 40}),
        ("gamma 0", pipeline, {"num_inference_steps": 18, "gamma": 0.0}),
        ("gamma 1", pipeline, {"num_inference_steps": 18, "gamma": 1.0}),
        ("gamma 1, 80 steps", pipeline, {"num_inference_steps": 80, "gamma": 1.0}),
    ]:
        images = make_pipe()(
            latents=latents(4000), generator=seeded(), output_type="latent", guidance=guidance, **options
        ).images
        away = (images.mean(0)[0] - guidance.posterior_mean) / guidance.y  # equal for all that were seen
        seen[name] = (float(away[0, 0]) / scale, float(images[:, 0, 0, 0].std()) / scale - 1)
    expected = {
        "heun": (1.09, -0.26),
        "gamma 0": (1.18, -0.33),
        "gamma 1": (0.46, -0.20),
        "gamma 1, 80 steps": (0.14, -0.06),
    }
    for name, (mean, spread) in expected.items():
        assert seen[name] == pytest.approx((mean, spread), abs=0.06), seen
    assert abs(seen["gamma 1, 80 steps"][0]) < 0.4 * abs(
        seen["gamma 1"][0]
    )  # renoising forgets the early overstatement


def test_one_real_step_is_the_gradient_by_hand(make_unet):
    unet, sigmas = make_unet(), [3.0, 0.4]
    pipe = pipeline(unet, CTMScheduler(sigma_data=0.7, timestep_scale=1000.0))
    weights = randn(3, 8, 8, seed=1, dtype=torch.float32)

    def loss(x_0):
        return (weights * x_0.tanh()).flatten(1).sum(1)

    preconditioning = Preconditioning(0.7, 1000.0)
    t, s = torch.tensor(3.0), torch.tensor(0.4)
    for on, level, evaluations in (("prediction", s, 1), ("image", torch.tensor(0.002), 2), ("noisy", None, 1)):
        calls, first = [], {}
        hook = unet.register_forward_pre_hook(lambda *args, calls=calls: calls.append(torch.is_grad_enabled()))

        def keep_first(pipe, step, timestep, tensors, first=first):
            first.setdefault("x", tensors["latents"])
            pipe._interrupt = True
            return {}

        start = latents(2, 3, 8)
        pipe(latents=start, sigmas=sigmas, guidance=LossGuidance(loss, 0.3, on), callback_on_step_end=keep_first)
        hook.remove()
        assert (
            calls == {"prediction": [True], "image": [False, True], "noisy": [False]}[on] and len(calls) == evaluations
        )
        x = (3.0 * start).requires_grad_()
        g = preconditioning.g(unet, x, t, s)
        seen = x if level is None else preconditioning.g(unet, x, t, level)
        gradient = torch.autograd.grad(loss(seen).sum(), x, retain_graph=True)[0]
        weight = guidance_weight(3.0, 0.4, 3.0 if level is None else float(level), 0.7)
        expected = 0.4 / 3 * x + (1 - 0.4 / 3) * (g - 0.3 * weight * gradient)
        close(first["x"], expected.detach(), rtol=1e-3, atol=1e-3)
        assert (0.3 * weight * gradient).abs().max() > 0.1
        assert all(parameter.grad is None for parameter in unet.parameters())


def test_a_sample_does_not_depend_on_its_batch():
    guidance, pipe = Observed(), pipeline()
    options = {"num_inference_steps": 3, "output_type": "latent", "guidance": guidance}
    together = pipe(latents=latents(5), **options).images
    for i in range(5):
        close(pipe(latents=latents(5)[i : i + 1], **options).images, together[i : i + 1])


@pytest.mark.parametrize("make_pipe", [pipeline, heun])
@pytest.mark.parametrize("on", ["prediction", "noisy", "image"])
def test_scale_0_is_no_guidance_bit_for_bit(make_pipe, on):
    pipe, options = make_pipe(), {"latents": latents(), "num_inference_steps": 3, "output_type": "latent"}
    plain = pipe(**options).images
    calls = len(pipe.unet.calls)
    assert torch.equal(pipe(**options, guidance=Observed(scale=0.0, on=on)).images, plain)
    assert len(pipe.unet.calls) == 2 * calls
    assert not torch.equal(pipe(**options, guidance=Observed(on=on)).images, plain)


def test_evaluations_are_as_documented():
    for on, counts in (("prediction", (4, 7)), ("noisy", (4, 7)), ("image", (7, 12))):  # no jump from sigma_min
        for make_pipe, count in zip((pipeline, heun), counts, strict=True):
            pipe = make_pipe()
            pipe(latents=latents(2), num_inference_steps=4, guidance=Observed(on=on))
            assert len(pipe.unet.calls) == count, (on, make_pipe)
    pipe = pipeline()
    pipe(latents=latents(2), num_inference_steps=4, gamma=1.0, guidance=Observed(on="image"), generator=seeded())
    assert len(pipe.unet.calls) == 4  # these jumps go to sigma_min anyway


def test_inference_mode_and_half_precision(make_unet):
    unet = make_unet(num_class_embeds=4)
    pipe = pipeline(unet, CTMScheduler())
    guidance = LossGuidance(lambda x_0: x_0.square().mean((1, 2, 3)), 50.0)
    options = {
        "class_labels": [1, 2],
        "num_inference_steps": 2,
        "gamma": 0.5,
        "output_type": "latent",
        "guidance": guidance,
    }
    expected = pipe(**options, generator=seeded()).images
    with torch.inference_mode():
        close(pipe(**options, generator=seeded()).images, expected)
    assert not expected.requires_grad
    pipe.to(torch.bfloat16)
    images = pipe(**options, generator=seeded()).images
    assert images.dtype == torch.float32 and (images - expected).abs().max() < 0.2 * expected.abs().max()


@pytest.mark.parametrize("on", ["prediction", "image", "noisy"])
@pytest.mark.parametrize("cls", [CTMPipeline, CTMImg2ImgPipeline, CTMInpaintPipeline, CTMRestorationPipeline])
def test_tensors_made_in_inference_mode(make_unet, cls, on):
    pipe = cls(make_unet(num_class_embeds=4), CTMScheduler())
    pipe.set_progress_bar_config(disable=True)

    def images():
        image, mask = torch.full((1, 3, 8, 8), 0.5), torch.eye(8).expand(1, 1, 8, 8).clone()
        given = {
            CTMImg2ImgPipeline: {"image": image},
            CTMInpaintPipeline: {"image": image, "mask_image": mask},
            CTMRestorationPipeline: {"measurement": image * mask, "operator": MaskOperator(mask)},
        }.get(cls, {})
        noisy = {"noisy": lambda x, sigma: x.flatten(1)[:, :4] * sigma[:, None]}
        classifier = noisy.get(on, lambda x: x.flatten(1)[:, :4])
        guidance = ClassifierGuidance(classifier, torch.tensor([1, 0]), 30.0, on)
        return pipe(
            **given,
            class_labels=torch.tensor([3, 1]),
            latents=latents(2, 3, 8),
            sigmas=torch.tensor([2.0, 0.5]),
            generator=seeded(),
            output_type="latent",
            guidance=guidance,
        ).images

    expected = images()
    with torch.inference_mode():
        close(images(), expected)


def test_networks_made_in_inference_mode_are_refused(make_unet):
    with torch.inference_mode():
        pipe = pipeline(make_unet(), CTMScheduler())
    pipe(batch_size=1)
    with pytest.raises(ValueError, match="made inside torch.inference_mode.*Load it outside"):
        pipe(batch_size=1, guidance=linear())
    with pytest.raises(ValueError, match="made inside torch.inference_mode.*Load it outside"):
        log_likelihood(pipe, torch.zeros(1, 3, 8, 8))


def test_a_class_average_moves_with_its_network(make_unet):
    unet = make_unet(num_class_embeds=4)
    pipe = pipeline(ClassAverage(unet), CTMScheduler()).to(torch.bfloat16)
    assert pipe.unet.dtype == torch.bfloat16 == unet.dtype and pipe.unet.device == unet.device
    pipe(batch_size=2)


def test_a_tiny_gradient_survives_fp16(make_unet):
    unet = make_unet()
    unet.conv_out.weight.data *= 5
    unet = unet.half()
    images = {}
    for small in (1.0, 1e-12):
        guidance = LossGuidance(lambda x_0, small=small: small * x_0.square().sum((1, 2, 3)), 0.1 / small)
        pipe = pipeline(unet, CTMScheduler())
        images[small] = pipe(latents=latents(2, 3, 8), sigmas=[1.0], output_type="latent", guidance=guidance).images
    close(images[1e-12], images[1.0], rtol=1e-3, atol=1e-3)


def test_the_loss_is_told_level_and_classes():
    seen = []

    class Watching(Guidance):
        def __init__(self):
            pass

        def loss(self, x_0, sigma, class_labels):
            seen.append((x_0.shape, sigma.tolist(), class_labels.tolist()))
            return x_0.sum((1, 2, 3))

    pipe = pipeline(gaussian(class_shift=[0.0, 1.0, 2.0]))
    pipe(class_labels=[2, 0], sigmas=[80.0, 0.5], guidance=Watching())
    assert seen == [((2, 1, 2, 2), pytest.approx([level] * 2), [2, 0]) for level in (80.0, 0.5)]
    with pytest.raises(NotImplementedError, match="writes `loss`"):
        pipe(class_labels=1, guidance=Guidance())


# What does not fit ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "fn, message",
    [
        (lambda x: x.mean(), r"one value per sample, a tensor of shape \(2,\), got shape \(\)"),
        (lambda x: x, r"got shape \(2, 1, 2, 2\)"),
        (lambda x: 0.5, "got float"),
        (lambda x: x.detach().sum((1, 2, 3)), "has no gradient with respect to its image"),
        (lambda x: (x > 0).sum((1, 2, 3)), "has no gradient with respect to its image"),
        (lambda x: torch.ones(2, requires_grad=True) * 2, "has no gradient with respect to its image"),
        (lambda x: x.sum((1, 2, 3)) * torch.nan, "NaN or infinite at noise level 80"),
        (lambda x: (x - x).abs().sum((1, 2, 3)).sqrt(), "NaN or infinite at noise level 80"),
    ],
)
@pytest.mark.parametrize("make_pipe", [pipeline, heun])
def test_losses_that_cannot_guide(make_pipe, fn, message):
    with pytest.raises(ValueError, match=message):
        make_pipe()(latents=latents(2), guidance=LossGuidance(fn))


def test_a_gradient_that_its_weight_makes_infinite_is_not_the_networks_fault():
    steep = LossGuidance(lambda x: x.sum((1, 2, 3)), 1e38)
    with pytest.raises(ValueError, match="loss or its gradient is NaN or infinite at noise level 80.*lower the scale"):
        pipeline()(latents=latents(2), guidance=steep)


@pytest.mark.parametrize("make_pipe", [pipeline, heun])
def test_a_loss_that_guides_nothing_at_all_warns(make_pipe, monkeypatch):
    said = []
    monkeypatch.setattr(
        "diffusers_ctm.pipeline_ctm.logging.get_logger", lambda name: SimpleNamespace(warning=said.append)
    )
    options = {"latents": latents(3), "num_inference_steps": 4, "output_type": "latent"}
    plain = make_pipe()(**options).images

    def run(fn, **more):
        said.clear()
        return make_pipe()(**options, guidance=LossGuidance(fn, **more)).images

    assert torch.equal(run(lambda x: x.sum((1, 2, 3)).clamp(min=1e6)), plain)  # flat everywhere
    assert len(said) == 1 and "0 for every image at every step, so that nothing was guided" in said[0]
    first = torch.tensor([1.0, 0.0, 0.0])
    assert not torch.equal(run(lambda x: first * x.sum((1, 2, 3))), plain) and not said  # one sample alone is guided
    calls = []

    def early(x):  # reached after the first step
        calls.append(1)
        return x.sum((1, 2, 3)) * (len(calls) == 1)

    assert not torch.equal(run(early), plain) and len(calls) > 3 and not said
    run(lambda x: x.sum((1, 2, 3)) * 0, scale=0.0)
    assert not said  # no guidance was asked


def test_guidance_that_does_not_fit():
    with pytest.raises(ValueError, match="scale must be a finite number, got nan"):
        LossGuidance(torch.sum, math.nan)
    with pytest.raises(ValueError, match="on='clean' is not known; use one of .*'noisy'"):
        LossGuidance(torch.sum, on="clean")
    with pytest.raises(ValueError, match="object of a subclass of Guidance, got function"):
        pipeline()(guidance=lambda x: x)
    with pytest.raises(ValueError, match='"image" needs a network that jumps.*ExactDenoiserNetwork.*prediction'):
        heun(gaussian(ExactDenoiserNetwork))(guidance=linear(on="image"))
    pipe = pipeline()
    pipe.scheduler = EDMEulerScheduler.from_config(pipe.scheduler.config)
    with pytest.raises(ValueError, match="EDMEulerScheduler takes no `guidance`; CTMScheduler and EDMHeunScheduler do"):
        pipe(guidance=linear())
    assert not pipe.unet.calls  # before any work


# Classifiers ----------------------------------------------------------------------------------------------------------

CENTERS = torch.tensor([-0.6, 0.0, 0.6])


def by_mean(x, sigma=None):
    """Logits of a classifier that tells three classes by the mean of an image."""
    return -((x.mean((1, 2, 3))[:, None] - CENTERS) ** 2) * 40


def test_a_classifier_leads_to_its_class():
    target = torch.arange(60) % 3
    for make_pipe, steps in ((pipeline, 8), (heun, 18)):
        accuracy = []
        for scale in (0.0, 0.06, 0.3):
            guidance = ClassifierGuidance(by_mean, target, scale)
            images = make_pipe()(
                latents=latents(60), num_inference_steps=steps, output_type="latent", guidance=guidance
            ).images
            accuracy.append((by_mean(images).argmax(1) == target).float().mean().item())
        assert accuracy[0] + 0.1 < accuracy[1] < accuracy[2] and accuracy[2] > 0.85, accuracy


def test_targets():
    pipe = pipeline(gaussian(class_shift=[0.0, 0.0, 0.0]))
    options = {"latents": latents(3), "class_labels": [2, 0, 2], "output_type": "latent"}
    expected = pipe(**options, guidance=ClassifierGuidance(by_mean, [2, 0, 2])).images
    for target in (None, torch.tensor([2, 0, 2]), np.array([2, 0, 2])):  # None: the labels of the call
        assert torch.equal(pipe(**options, guidance=ClassifierGuidance(by_mean, target)).images, expected)

    class Output:
        def __init__(self, logits):
            self.logits = logits

    assert torch.equal(
        pipe(**options, guidance=ClassifierGuidance(lambda x: Output(by_mean(x)), [2, 0, 2])).images, expected
    )
    one = pipe(**options, guidance=ClassifierGuidance(by_mean, 2)).images
    assert torch.equal(one[0], expected[0]) and not torch.equal(one[1], expected[1])


def test_a_classifier_of_noisy_images_gets_the_level():
    seen = []

    def classifier(x, sigma):
        seen.append((float(x.detach().std()), sigma.tolist()))
        return by_mean(x)

    pipeline()(latents=latents(2), sigmas=[80.0, 1.0], guidance=ClassifierGuidance(classifier, 1, on="noisy"))
    assert [sigma for _, sigma in seen] == [[80.0, 80.0], [1.0, 1.0]] and seen[0][0] > 20


@pytest.mark.parametrize(
    "classifier, target, message",
    [
        (by_mean, 3, "knows classes 0 to 2, and 3 was asked.*own numbers"),
        (by_mean, [0, -1], "and -1 was asked"),
        (by_mean, [0, 1, 2], r"have shape \(3,\) for 2 images; pass one or 2"),
        (by_mean, 1.5, "must be whole numbers"),
        (by_mean, None, "needs a `target`: the network is unconditional"),
        (
            lambda x: by_mean(x).argmax(1),
            1,
            r"must return logits, floats of shape \(2, classes\), got torch.int64 of shape \(2,\)",
        ),
        (lambda x: None, 1, "got NoneType"),
    ],
)
def test_classifiers_that_do_not_fit(classifier, target, message):
    with pytest.raises(ValueError, match=message):
        pipeline()(latents=latents(2), guidance=ClassifierGuidance(classifier, target))


def test_a_classifier_of_other_classes_than_the_networks():
    pipe = pipeline(gaussian(class_shift=[0.0] * 5))
    for label in (1, 4):  # 1 is a number of both, of different classes
        with pytest.raises(
            ValueError, match="knows 3 classes and the network 5, .* Pass `target` in the classifier's own"
        ):
            pipe(class_labels=label, guidance=ClassifierGuidance(by_mean))
        with pytest.raises(ValueError, match="knows 3 classes and the network 5, .* Pass one that gives the logits"):
            rejection_sample(pipe, by_mean, 2, label, threshold=0.1)
    pipe(class_labels=4, guidance=ClassifierGuidance(by_mean, target=2))
    with_null()(class_labels=1, guidance=ClassifierGuidance(lambda x: by_mean(x)[:, :2]))  # the null class is none


# Classifier-free guidance ---------------------------------------------------------------------------------------------

SHIFTS = [-1.0, 1.0, 0.3]  # the last is the null class


class ClassGaussians(ExactNetwork):
    """Class k is N(SHIFTS[k], stds[k]^2), the last class the null class."""

    stds = (0.2, 0.3, 0.5)

    def __init__(self):
        super().__init__(size=2, channels=1, class_shift=SHIFTS)
        self.batches = []

    def forward(self, sample, *times, class_labels=None, return_dict=False):
        self.batches.append(class_labels.tolist())
        self.data = GaussianData(
            levels_like(torch.tensor(self.stds, dtype=torch.float64)[class_labels], sample.double())
        )
        return super().forward(sample, *times, class_labels=class_labels)


def with_null(scheduler_class=CTMScheduler, network=None):
    return pipeline(network or ClassGaussians(), scheduler_class(sigma_data=STD), null_class=2)


def guided_flow(x, scale, label, t, s):
    """The ODE of D_null + scale (D_y - D_null) from t to s; it is linear in x."""
    rates = [(V_, m) for V_, m in ((ClassGaussians.stds[k] ** 2, SHIFTS[k]) for k in (2, label))]
    w = (1 - scale, scale)
    u = torch.linspace(math.log(t), math.log(s), 40_001, dtype=torch.float64).exp()
    # dx/du = a(u) x - b(u): x - D = sum_k w_k u^2 (x - m_k) / (V_k + u^2), over u
    a = sum(w_k * u / (variance + u**2) for w_k, (variance, _) in zip(w, rates, strict=True))
    b = sum(w_k * u * m / (variance + u**2) for w_k, (variance, m) in zip(w, rates, strict=True))
    power = torch.cat([torch.zeros(1, dtype=torch.float64), torch.cumulative_trapezoid(a, u)])
    inhomogeneous = torch.trapezoid(b * torch.exp(power[-1] - power), u)
    return x.double() * power[-1].exp() - inhomogeneous


@pytest.mark.parametrize("scheduler_class", [CTMScheduler, EDMHeunScheduler])
def test_guidance_scale_1_is_conditional_and_0_unconditional(scheduler_class):
    options = {"latents": latents(2), "num_inference_steps": 3, "output_type": "latent"}
    plain = pipeline(ClassGaussians(), scheduler_class(sigma_data=STD))
    pipe = with_null(scheduler_class)
    conditional = plain(class_labels=[1, 0], **options).images
    assert torch.equal(pipe(class_labels=[1, 0], **options).images, conditional)
    assert torch.equal(pipe(class_labels=[1, 0], guidance_scale=1, **options).images, conditional)
    assert {tuple(batch) for batch in pipe.unet.batches} == {(1, 0)}
    pipe.unet.batches.clear()
    unconditional = pipe(class_labels=[1, 0], guidance_scale=0.0, **options).images
    assert {tuple(batch) for batch in pipe.unet.batches} == {(2, 2)}  # no doubled batch
    assert torch.equal(unconditional, plain(class_labels=[2, 2], **options).images)
    pipe.unet.batches.clear()
    pipe(class_labels=[1, 0], guidance_scale=2.0, **options)
    assert pipe.unet.batches == [[1, 0, 2, 2]] * pipe.num_timesteps  # one call, doubled


@pytest.mark.parametrize("steps", [1, 3])
def test_classes_that_differ_in_mean_alone_are_exact_in_jumps(steps):
    network = gaussian(class_shift=SHIFTS)
    images = with_null(network=network)(
        latents=latents(), class_labels=1, guidance_scale=2.5, num_inference_steps=steps, output_type="latent"
    ).images
    close(images, GaussianData(STD, mean=0.3 + 2.5 * 0.7).jump(80 * latents(), 80.0, 0.002))


@pytest.mark.parametrize("scheduler_class, order, end", [(EDMHeunScheduler, 2, 0.0), (CTMScheduler, 1, 0.002)])
def test_other_classes_converge_to_the_guided_flow(scheduler_class, order, end):
    steps, scale = (40, 80), 2.0
    exact = guided_flow(80 * latents(), scale, 1, 80.0, max(end, 1e-5)).float()
    found = []
    for n in steps:
        images = with_null(scheduler_class)(
            latents=latents(), class_labels=1, guidance_scale=scale, num_inference_steps=n, output_type="latent"
        ).images
        found.append(float((images - exact).abs().mean()))
    assert order_of(found, steps) == pytest.approx(order, abs=0.25) and found[-1] < 0.02, found
    if scheduler_class is CTMScheduler:  # the limit that is stated: one jump is not that of the guided flow
        one = with_null()(latents=latents(), class_labels=1, guidance_scale=scale, output_type="latent").images
        assert float((one - exact).abs().mean()) > 10 * found[-1]


def test_the_null_class_is_no_class(make_unet, tmp_path):
    pipe = pipeline(make_unet(num_class_embeds=5), CTMScheduler(), null_class=4, id2label={0: "a"})
    assert pipe.num_classes == 4
    seen = []
    pipe.unet.register_forward_pre_hook(
        lambda m, args, kwargs: seen.extend(kwargs["class_labels"].tolist()), with_kwargs=True
    )
    pipe(batch_size=60, generator=seeded(), output_type="latent")
    assert set(seen) == {0, 1, 2, 3}
    with pytest.raises(ValueError, match="class_labels=4 is not a class; this network knows 0 to 3"):
        pipe(class_labels=4)
    pipe.save_pretrained(tmp_path)
    again = DiffusionPipeline.from_pretrained(tmp_path)
    again.set_progress_bar_config(disable=True)
    assert again.config.null_class == 4 and CTMPipeline.from_pipe(pipe).config.null_class == 4
    options = {"class_labels": "a", "guidance_scale": 3.0, "output_type": "latent"}
    close(again(**options, generator=seeded()).images, pipe(**options, generator=seeded()).images)
    for wrong in (3, 5, -1):
        with pytest.raises(ValueError, match=f"null_class={wrong} must be the last"):
            CTMPipeline(make_unet(num_class_embeds=5), CTMScheduler(), null_class=wrong)


def test_a_network_whose_null_class_is_a_zero_vector():
    seen = []

    class Vectors(ExactNetwork):
        """As EDM's networks take classes; trained with label dropout, as its config says."""

        def forward(self, sample, *times, class_labels=None, return_dict=False):
            vectors = class_labels if class_labels.is_floating_point() else torch.eye(2)[class_labels]
            seen.append(vectors)
            self.class_shift = None
            shift = vectors @ torch.tensor([-1.0, 1.0])
            self.data = GaussianData(STD, mean=levels_like(shift, sample.double()))
            output = super().forward(sample, *times)
            self.class_shift = [0, 0]
            return output

    network = Vectors(size=2, channels=1, class_shift=[0, 0])
    pipe = pipeline(network)
    with pytest.raises(ValueError, match="trained with label dropout, and this checkpoint names no `null_class`"):
        pipe(class_labels=[1, 0], guidance_scale=3.0)
    network.config.label_dropout = 0.1
    images = pipe(class_labels=[1, 0], latents=latents(2), guidance_scale=3.0, output_type="latent").images
    assert torch.equal(seen[-1], torch.tensor([[0.0, 1.0], [1.0, 0.0], [0.0, 0.0], [0.0, 0.0]]))
    for i, mean in enumerate((3.0, -3.0)):
        close(images[i], GaussianData(STD, mean=mean).jump(80 * latents(2)[i], 80.0, 0.002))


def test_both_guidances_at_once():
    pipe = with_null(network=gaussian(class_shift=SHIFTS))
    images = pipe(latents=latents(), class_labels=1, guidance_scale=2.0, guidance=linear(), output_type="latent").images
    mean = 0.3 + 2 * 0.7
    close(images, GaussianData(STD, mean).jump(80 * latents(), 80.0, 0.002) + V * SLOPE * (1 - ratio(80.0, 0.002)))


@pytest.mark.parametrize("cls", [CTMScheduler, EDMHeunScheduler, EDMEulerScheduler])
@pytest.mark.parametrize("scales", [[1.0, 3.0, 0.0, 1.0, 2.0], [2.0, 1.0, 0.5, 0.0, -1.0]])
def test_a_callback_changes_the_scale_of_the_next_calls(cls, scales):
    pipe, steps, shown = with_null(), 3 if cls is EDMHeunScheduler else 5, []
    pipe.scheduler = cls.from_config(pipe.scheduler.config)

    def callback(pipe, step, timestep, tensors):
        shown.append(pipe.guidance_scale)
        pipe._guidance_scale = [*scales, 7.0][step + 1]

    options = {"class_labels": [1, 0], "num_inference_steps": steps, "output_type": "latent"}
    images = pipe(latents=latents(2), guidance_scale=scales[0], callback_on_step_end=callback, **options).images
    assert shown == scales and pipe.guidance_scale == 7.0
    costs = {1.0: [1, 0], 0.0: [2, 2]}  # one evaluation
    assert pipe.unet.batches == [costs.get(scale, [1, 0, 2, 2]) for scale in scales]

    scheduler, network = cls.from_config(pipe.scheduler.config), ClassGaussians()
    scheduler.set_timesteps(steps)
    x, targets = latents(2) * scheduler.init_noise_sigma, getattr(scheduler, "target_timesteps", [None] * 5)
    for t, s, scale in zip(scheduler.timesteps, targets, scales, strict=True):
        given = [scheduler.scale_model_input(x, t), *((t,) if s is None else (t, s))]
        null, asked = (network(*given, class_labels=torch.tensor(y))[0] for y in ([2, 2], [1, 0]))
        x = scheduler.step(null + scale * (asked - null), t, x, return_dict=False)[0]
    close(images, x)


@pytest.mark.parametrize("cls", [CTMPipeline, CTMImg2ImgPipeline, CTMInpaintPipeline, CTMRestorationPipeline])
def test_the_scale_is_dynamic_as_in_diffusers(cls):
    """diffusers' own test of pipelines; and a step without evaluation of the second kind is not paid for."""
    pipe = cls.from_pipe(with_null())
    pipe.set_progress_bar_config(disable=True)
    image, mask = torch.full((1, 1, 2, 2), 0.5), torch.tensor([[[[1.0, 0.0], [0.0, 1.0]]]])
    given = {
        CTMImg2ImgPipeline: {"image": image},
        CTMInpaintPipeline: {"image": image, "mask_image": mask},
        CTMRestorationPipeline: {"measurement": image * mask, "operator": MaskOperator(mask)},
    }.get(cls, {})

    def increase(pipe, step, timestep, tensors):
        pipe._guidance_scale += 1.0
        return tensors

    options = {**given, "class_labels": 1, "latents": latents(1), "num_inference_steps": 4, "output_type": "latent"}
    raised = pipe(**options, guidance_scale=1.0, callback_on_step_end=increase).images
    assert pipe.guidance_scale == 1.0 + pipe.num_timesteps == 5.0
    assert [len(batch) for batch in pipe.unet.batches] == [1, 2, 2, 2]
    assert not torch.equal(raised, pipe(**options).images) and pipe.guidance_scale == 1.0


def test_callbacks_of_diffusers_that_end_guidance():
    class Cutoff(PipelineCallback):
        tensor_inputs = []

        def callback_fn(self, pipeline, step_index, timestep, callback_kwargs):
            if step_index == self.config.cutoff_step_index:
                pipeline._guidance_scale = 1.0
            return callback_kwargs

    pipe, options = with_null(), {"class_labels": 1, "num_inference_steps": 4, "guidance_scale": 3.0}
    pipe(**options, callback_on_step_end=Cutoff(cutoff_step_ratio=None, cutoff_step_index=1))
    assert [len(batch) for batch in pipe.unet.batches] == [2, 2, 1, 1]
    for theirs in (SDCFGCutoffCallback(0.5), MultiPipelineCallbacks([SDCFGCutoffCallback(0.5)])):  # of prompts
        with pytest.raises(ValueError, match="Callback.* may hold.*got .'prompt_embeds'.*_guidance_scale = 1.0"):
            pipe(**options, callback_on_step_end=theirs)


def test_scales_of_a_callback_that_do_not_fit():
    for pipe, scale, message in (
        (with_null(), math.nan, "guidance_scale must be a finite number"),
        (pipeline(), 2.0, "guidance_scale was given, but this network is unconditional"),
    ):

        def callback(pipe, step, timestep, tensors, scale=scale):
            pipe._guidance_scale = scale

        with pytest.raises(ValueError, match=message):
            pipe(num_inference_steps=2, callback_on_step_end=callback)


def test_classifier_free_guidance_that_does_not_fit(make_unet):
    with pytest.raises(ValueError, match="guidance_scale was given, but this network is unconditional"):
        pipeline()(guidance_scale=2.0)
    for wrong in ("2", math.inf, None):
        with pytest.raises(ValueError, match="guidance_scale must be a finite number"):
            with_null()(class_labels=1, guidance_scale=wrong)
    with pytest.raises(ValueError, match="null_class=3 must be the last"):
        CTMPipeline(make_unet(UNet2DModel), EDMHeunScheduler(), null_class=3)


# Rejection ------------------------------------------------------------------------------------------------------------


def of_classes():
    """Class k has mean CENTERS[k], and its images are often taken for another class."""
    return pipeline(gaussian(class_shift=CENTERS.tolist()))


def test_rejection_keeps_what_the_classifier_believes():
    pipe, wanted = of_classes(), [2, 0, 1, 1, 0, 2, 2]
    options = {"generator": seeded(), "output_type": "latent", "batch_size": 16}
    output = rejection_sample(pipe, by_mean, 7, wanted, threshold=0.9, **options)
    assert output.complete and output.class_labels.tolist() == wanted and output.images.shape == (7, 1, 2, 2)
    probabilities = by_mean(output.images.clamp(-1, 1)).softmax(1)[torch.arange(7), torch.tensor(wanted)]
    close(output.scores, probabilities)
    assert (output.scores >= 0.9).all() and 0 < output.acceptance_rate < 1 and output.num_drawn >= 7
    assert output.num_batches == len(pipe.unet.calls)


def test_a_class_that_is_never_seen_does_not_keep_the_others_out():
    def never_0(images):
        return torch.tensor([-100.0, 0.0, 0.0]).expand(len(images), 3)

    output = rejection_sample(
        of_classes(), never_0, 15, [0] * 9 + [1] * 3 + [2] * 3, threshold=0.4, batch_size=4, max_batches=12
    )
    assert output.class_labels.tolist() == [1] * 3 + [2] * 3


def test_the_acceptance_rate_is_that_of_the_classifier():
    # P(the mean of 4 values N(0, 0.5^2) lies where class 1 has at least probability 0.5)
    grid = torch.linspace(-0.6, 0.6, 100_001, dtype=torch.float64)
    logits = -((grid[:, None] - CENTERS) ** 2) * 40
    inside = grid[logits.softmax(1)[:, 1] >= 0.5]
    expected = math.erf(float(inside.max()) / (STD / 2) / math.sqrt(2))
    output = rejection_sample(
        of_classes(), by_mean, 3000, 1, threshold=0.5, batch_size=5000, generator=seeded(), output_type="pt"
    )
    assert output.acceptance_rate == pytest.approx(
        expected, abs=4 * math.sqrt(expected * (1 - expected) / output.num_drawn)
    )
    assert output.images.shape == (3000, 1, 2, 2) and output.num_drawn < 1.2 * 3000 / expected


def test_the_best_of_each_class():
    pipe, drawn = of_classes(), []

    def classifier(x):
        drawn.append(x.clone())
        return by_mean(x)

    output = rejection_sample(
        pipe, classifier, 5, [0, 1, 0, 1, 1], top_fraction=0.25, batch_size=7, generator=seeded(), output_type="latent"
    )
    assert output.num_drawn == 8 + 12 and output.acceptance_rate == 0.25 and output.num_batches == 3 and output.complete
    assert output.class_labels.tolist() == [0, 1, 0, 1, 1]
    everything = by_mean(torch.cat(drawn)).softmax(1)  # labels go 8 times 0, then 12 times 1
    close(output.scores[[0, 2]], everything[:8, 0].topk(2).values)
    close(output.scores[[1, 3, 4]], everything[8:, 1].topk(3).values)


def test_rejection_of_an_unconditional_model():
    output = rejection_sample(
        pipeline(), by_mean, 6, [0, 1, 2, 0, 1, 2], threshold=0.8, generator=seeded(), output_type="latent"
    )
    assert output.complete and output.class_labels.tolist() == [0, 1, 2, 0, 1, 2]
    assert (by_mean(output.images.clamp(-1, 1)).argmax(1) == output.class_labels).all() and (output.scores >= 0.8).all()
    output = rejection_sample(pipeline(), by_mean, 4, threshold=0.95, generator=seeded())
    assert output.class_labels is None and len(output.images) == 4 and (output.scores >= 0.95).all()
    output = rejection_sample(of_classes(), by_mean, 9, threshold=0.1, generator=seeded())  # classes at random
    assert len(set(output.class_labels.tolist())) > 1


@pytest.mark.parametrize(
    "output_type, empty", [("pil", []), ("pt", (0, 1, 2, 2)), ("np", (0, 2, 2, 1)), ("latent", (0, 1, 2, 2))]
)
def test_rejection_stops_at_the_budget(output_type, empty):
    pipe, options = of_classes(), {"batch_size": 8, "max_batches": 3, "generator": seeded(), "output_type": output_type}
    output = rejection_sample(pipe, lambda x: torch.zeros(len(x), 3), 5, 1, threshold=0.5, **options)
    assert not output.complete and output.num_batches == 3 and output.acceptance_rate == 0 and len(output.scores) == 0
    assert output.images == empty if output_type == "pil" else tuple(output.images.shape) == empty
    assert output.num_drawn == 5 + 8 + 8  # first as many as are wanted, then full batches
    part = rejection_sample(pipe, by_mean, 500, 1, threshold=0.5, **options)
    assert not part.complete and 0 < len(part.images) == len(part.scores) < 24
    best = rejection_sample(pipe, by_mean, 500, 1, top_fraction=0.5, **options)
    assert not best.complete and len(best.images) == 12 and best.num_drawn == 24


def test_rejection_passes_the_samplers_arguments_on():
    pipe = of_classes()
    rejection_sample(pipe, by_mean, 2, 1, threshold=0.0, num_inference_steps=3, gamma=1.0, generator=seeded())
    assert len(pipe.unet.calls) == 3
    guided, options = of_classes(), {"threshold": 0.9, "num_inference_steps": 4, "generator": seeded()}
    plain = rejection_sample(guided, by_mean, 40, 1, **options).acceptance_rate
    assert (
        rejection_sample(guided, by_mean, 40, 1, guidance=ClassifierGuidance(by_mean), **options).acceptance_rate
        > plain + 0.1
    )


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({}, "exactly one of `threshold` and `top_fraction`"),
        ({"threshold": 0.5, "top_fraction": 0.5}, "exactly one of"),
        ({"threshold": 1.5}, "probability in"),
        ({"top_fraction": 0.0}, r"top_fraction must lie in \(0, 1\]"),
        ({"threshold": 0.5, "num_images": 0}, "num_images must be a whole number >= 1"),
        ({"threshold": 0.5, "max_batches": 0}, "max_batches must be a whole number >= 1"),
        ({"threshold": 0.5, "output_type": "png"}, "output_type must be"),
        ({"threshold": 0.5, "generator": [seeded()]}, "takes one generator"),
        ({"threshold": 0.5, "latents": 1}, "takes no latents"),
        ({"threshold": 0.5, "class_labels": [0, 1]}, "class_labels has 2 entries for batch_size=4"),
        ({"threshold": 0.5, "class_labels": 9}, "is not a class"),
        (
            {"threshold": 0.5, "classifier": lambda x: by_mean(x)[:, :1], "class_labels": 2},
            "knows 1 classes and the network 3",
        ),
        ({"threshold": 0.5, "classifier": lambda x: by_mean(x) * torch.nan}, "NaN"),
    ],
)
def test_rejection_that_does_not_fit(arguments, message):
    with pytest.raises(ValueError, match=message):
        rejection_sample(of_classes(), **{"classifier": by_mean, "num_images": 4, **arguments})


def test_an_unconditional_model_cannot_be_asked_for_the_best_of_a_class():
    with pytest.raises(ValueError, match="pass `threshold`, not `top_fraction`"):
        rejection_sample(pipeline(), by_mean, 4, 1, top_fraction=0.5)
