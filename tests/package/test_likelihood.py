# Copyright 2026 The diffusers-ctm authors. Licensed under the Apache License, Version 2.0.
"""Likelihoods against densities that are known: normals, mixtures, a uniform distribution, the authors' bound."""

import json
import math

import pytest
import torch
from diffusers import UNet2DModel
from PIL import Image
from safetensors.torch import load_file

from diffusers_ctm import CTMPipeline, CTMScheduler, CTMUNet2DModel, EDMHeunScheduler, log_likelihood
from diffusers_ctm.likelihood import denoiser_and_trace, elbo, ode_log_density
from diffusers_ctm.preconditioning import Preconditioning
from diffusers_ctm.runge_kutta import dormand_prince
from helpers.comparing import close, seeded
from helpers.exact import ExactDenoiserNetwork, ExactNetwork, GaussianData, GaussianMixture, randn
from helpers.places import ORACLE
from training.cli.errors import UserError
from training.data.images import ImageDataset
from training.likelihood import LikelihoodConfig, main


LOW, HIGH = 0.002, 80.0
FINE = {"rtol": 1e-8, "atol": 1e-8}


def signs(*shape, seed=0):
    return (2 * torch.randint(2, shape, generator=seeded(seed)) - 1).double()


def log_uniform(count, seed=0):
    return LOW * (HIGH / LOW) ** torch.rand(count, generator=seeded(seed), dtype=torch.float64)


def normal_log_density(x, std):
    """log N(x; 0, std^2), summed over all dimensions but the first."""
    return (-(x**2) / (2 * std**2) - 0.5 * math.log(2 * math.pi) - torch.as_tensor(std).log()).flatten(1).sum(1)


def mixture_log_density(mixture, x, t=0.0):
    """log p_t(x) of a `GaussianMixture`."""
    covs = mixture.covs + t**2 * torch.eye(x.shape[1], dtype=x.dtype)
    parts = torch.distributions.MultivariateNormal(mixture.means, covs).log_prob(x[:, None])
    return (parts + mixture.weights.log()).logsumexp(1)


def draw(mixture, count, seed=0):
    part = torch.multinomial(mixture.weights, count, replacement=True, generator=seeded(seed))
    noise = randn(count, mixture.means.shape[1], 1, seed=seed)
    return mixture.means[part] + (torch.linalg.cholesky(mixture.covs)[part] @ noise)[..., 0]


def mixture_problem():
    covs = torch.tensor([[[0.02, 0.0], [0.0, 0.05]], [[0.04, 0.02], [0.02, 0.03]], [[0.03, 0.0], [0.0, 0.03]]])
    return GaussianMixture([0.5, 0.3, 0.2], [[-0.7, 0.2], [0.5, 0.6], [0.4, -0.7]], covs)


class Flat:
    """A mixture in R^d as data of images (B, d, 1, 1)."""

    def __init__(self, mixture):
        self.mixture = mixture

    def g(self, x, t, s):
        assert (t == s).all()
        return self.mixture.denoiser(x.flatten(1), t).reshape(x.shape)


class UniformData:
    """Independent uniform values in [-edge, edge]: the denoiser is the mean of a truncated normal."""

    def __init__(self, edge):
        self.edge = edge

    def g(self, x, t, s):
        low, high = (-self.edge - x) / t, (self.edge - x) / t
        mass = torch.special.ndtr(high) - torch.special.ndtr(low)
        density = ((-(low**2) / 2).exp() - (-(high**2) / 2).exp()) / math.sqrt(2 * math.pi)
        return x + t * density / mass


def pipeline(network, sigma_data=0.5):
    scheduler = CTMScheduler if getattr(network, "has_target_time", False) else EDMHeunScheduler
    pipe = CTMPipeline(network.eval(), scheduler(sigma_data=sigma_data))
    pipe.set_progress_bar_config(disable=True)
    return pipe


def pixels(batch, channels=3, size=8, seed=0):
    return torch.randint(256, (batch, channels, size, size), generator=seeded(seed)).byte()


# The ODE --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sigma_data", [0.5, 0.9])
@pytest.mark.parametrize("std", [0.5, 0.25, 0.05, torch.tensor([0.5, 0.1, 0.03], dtype=torch.float64)[:, None, None]])
def test_ode_gives_the_density_of_normal_data(std, sigma_data):
    """Normal data, isotropic or not. The coordinates' sigma_data need not be the data's."""
    data = GaussianData(std)
    x = data.draw((5, 3, 2, 2), seeded())
    true = normal_log_density(x, (torch.as_tensor(std, dtype=x.dtype) ** 2 + LOW**2).sqrt().expand(3, 2, 2))
    for probes in (None, signs(3, *x.shape)):  # a diagonal Jacobian: any probe of signs is exact
        solution = ode_log_density(data.denoiser, x, probes, sigma_data, **FINE)
        assert solution.log_density.shape == (1 if probes is None else 3, 5)
        # the prior leaves out the data's variance at sigma_max
        close(solution.log_density, true.expand_as(solution.log_density), 0, 3e-3)
        close(solution.latents, data.jump(x, LOW, HIGH), 1e-5, 1e-5)


def test_prior_is_what_the_pipeline_draws_from():
    x = GaussianData(0.5).draw((4, 3), seeded())
    solution = ode_log_density(GaussianData(0.5).denoiser, x, None, 0.5, LOW, 2.0, **FINE)
    ratio = math.sqrt((0.25 + 4) / (0.25 + LOW**2))
    close(solution.log_density[0], normal_log_density(x * ratio, 2.0) + 3 * math.log(ratio), 1e-7, 1e-7)


def test_ode_gives_the_density_of_a_mixture():
    mixture = mixture_problem()
    x = draw(mixture, 200)
    solution = ode_log_density(mixture.denoiser, x, None, 0.6, **FINE)
    ends = solution.latents
    prior = normal_log_density(ends, HIGH) - mixture_log_density(mixture, ends, HIGH)  # what the prior does not know
    assert 1e-3 < prior.abs().max() < 2e-2 and abs(prior.mean()) < 1e-3
    close(solution.log_density[0], mixture_log_density(mixture, x, LOW) + prior, 0, 2e-6)
    loose = ode_log_density(mixture.denoiser, x, None, 0.6)
    close(loose.log_density, solution.log_density, 0, 5e-3)
    assert loose.nfe < 200 < solution.nfe


def test_ode_gives_the_density_of_the_authors_toy_problem(oracle):
    arrays = oracle("toy_gmm.npz")
    mixture = GaussianMixture(arrays["weights"], arrays["means"], arrays["covs"])
    x = torch.from_numpy(arrays["data_x"])
    solution = ode_log_density(mixture.denoiser, x, None, 0.5875, rtol=1e-6, atol=1e-6)
    close(solution.log_density[0], arrays["data_logp_0002"], 0, 5e-3)
    bits = -solution.log_density.mean() / math.log(2)
    spread = torch.from_numpy(arrays["data_logp0"]).std() / math.log(2) / len(x) ** 0.5
    assert abs(bits - arrays["entropy_bits"]) < 3 * spread


def test_probes_scatter_about_the_exact_trace_and_their_mean_as_one_over_root_n():
    mixture = mixture_problem()
    x = draw(mixture, 20)
    exact = ode_log_density(mixture.denoiser, x, None, 0.6, rtol=1e-5, atol=1e-5).log_density[0]
    many = x.repeat(128, 1)
    for probes in (signs(2, *many.shape), randn(2, *many.shape)):  # Rademacher and normal
        found = ode_log_density(mixture.denoiser, many, probes, 0.6).log_density.reshape(256, 20)
        error = found.std(0) / 16
        assert error.median() > 1e-3 and ((found.mean(0) - exact).abs() / (error + 1e-3)).max() < 4
        spreads = [(found.reshape(-1, n, 20).mean(1) - exact).square().mean().sqrt() for n in (1, 4, 16)]
        assert all(1.6 < a / b < 2.5 for a, b in zip(spreads, spreads[1:], strict=False)), spreads


@pytest.mark.parametrize("cls", [UNet2DModel, CTMUNet2DModel])
def test_trace_of_a_real_network(make_unet, cls):
    unet = make_unet(cls, sample_size=4, in_channels=1, out_channels=1).double()
    denoiser = lambda x, sigma: Preconditioning().denoise(unet, x, sigma)  # noqa: E731
    x, sigma = randn(2, 1, 4, 4), torch.tensor(0.7, dtype=torch.float64)
    with torch.no_grad():
        denoised, trace = denoiser_and_trace(denoiser, x, sigma, None)
        probes = signs(3, *x.shape)
        _, products = denoiser_and_trace(denoiser, x, sigma, probes)
    assert not denoised.requires_grad and not trace.requires_grad and not products.requires_grad
    assert all(parameter.grad is None for parameter in unet.parameters())
    for i in range(2):
        jacobian = torch.autograd.functional.jacobian(lambda x: denoiser(x, sigma).flatten(), x[i : i + 1])
        jacobian = jacobian.reshape(16, 16)
        close(trace[0, i], jacobian.trace(), 1e-9, 1e-9)
        e = probes[:, i].flatten(1)
        close(products[:, i], torch.einsum("pi,ij,pj->p", e, jacobian, e), 1e-9, 1e-9)


# The solver -----------------------------------------------------------------------------------------------------------


def test_solver_meets_its_tolerance_and_has_order_five():
    start, end = (torch.tensor(v, dtype=torch.float64) for v in (0.0, 3.0))
    field = lambda t, y: torch.stack([y[:, 1], -y[:, 0], t.cos().expand(len(y))], dim=1)  # noqa: E731
    state = torch.tensor([[0.0, 1.0, 0.0], [1.0, 0.0, 0.0]], dtype=torch.float64)
    exact = torch.tensor([[math.sin(3), math.cos(3), math.sin(3)], [math.cos(3), -math.sin(3), math.sin(3)]])
    costs, errors = [], []
    for tolerance in (1e-4, 1e-6, 1e-8, 1e-10):
        found, evaluations = dormand_prince(field, state, start, end, tolerance, tolerance, 2)
        errors.append((found - exact.double()).abs().max().item() if tolerance > 1e-7 else None)
        costs.append(evaluations - 1)
    assert errors[0] < 1e-3 and errors[1] < 1e-5
    # 100 times the accuracy takes 100^(1/5) = 2.5 times the steps
    assert all(1.5 < b / a < 3.5 for a, b in zip(costs[1:], costs[2:], strict=False)), costs


def test_solver_says_when_it_fails():
    start, end, state = torch.zeros((), dtype=torch.float64), torch.ones((), dtype=torch.float64), torch.ones(1, 1)
    with pytest.raises(RuntimeError, match="NaN"):
        dormand_prince(lambda t, y: y * math.nan, state, start, end, 1e-3, 1e-3, 1)
    noise = seeded()
    for field in (
        lambda t, y: 1e12 * torch.randn(y.shape, generator=noise),
        lambda t, y: y if t < 0.5 else y * math.nan,
        lambda t, y: y / (t.item() - 0.5) ** 2,
    ):
        with pytest.raises(RuntimeError, match="allow larger errors"):
            dormand_prince(field, state, start, end, 1e-6, 1e-6, 1)


# The bound ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("std", [0.5, 0.05])
@pytest.mark.parametrize("form", ["denoising", "hutchinson", "control variate"])
def test_bound_of_normal_data_is_tight(form, std):
    data = GaussianData(std)
    x = data.draw((1, 3, 2, 2), seeded()).expand(4000, -1, -1, -1)
    true = normal_log_density(x[:1], std)
    options = {"probes": signs(1, *x.shape), "prior_noise": randn(*x.shape, seed=3)} if form == "hutchinson" else {}
    options |= {"reference_std": 0.2} if form == "control variate" else {}
    draws = (log_uniform(4000), randn(*x.shape, seed=1), randn(*x.shape, seed=2))
    found = elbo(data.denoiser, x, *draws, **options).log_density
    assert abs(found.mean() - true) < 4 * found.std() / 4000**0.5
    assert found.std() / 4000**0.5 < 1.2
    matched = elbo(data.denoiser, x[:9], *(each[:9] for each in draws), reference_std=std).log_density
    assert matched.std() < 1e-9 * true.abs()  # the control variate knows all
    assert -1e-4 * true.abs() < matched[0] - true < 0  # and a bound it is


def test_terms_of_the_two_forms_have_one_mean():
    """Stein: E z.D = sigma E tr dD/dx, for any network, here one that is no denoiser."""
    x = torch.tensor([[0.4, -0.3]], dtype=torch.float64).expand(40_000, -1)
    wrong = lambda x, sigma: torch.stack([torch.tanh(x[:, 0] - x[:, 1]), 0.4 * torch.sin(2 * x[:, 1])], 1)  # noqa: E731
    draws = (log_uniform(40_000), randn(40_000, 2, seed=1), randn(40_000, 2, seed=2))
    forms = [
        elbo(wrong, x, *draws, **o, sigma_min=0.1)
        for o in ({}, {"probes": signs(1, 40_000, 2)}, {"reference_std": 0.5})
    ]
    for a, b in zip(forms, forms[1:], strict=False):
        difference = a.integral - b.integral
        assert abs(difference.mean()) < 4 * difference.std() / 200
        difference = a.truncation - b.truncation
        assert abs(difference.mean()) < 4 * difference.std() / 200 + 1e-9


def test_bound_of_a_mixture_is_near_the_density_and_below_it():
    mixture = mixture_problem()
    x = draw(mixture, 60)
    true = mixture_log_density(mixture, x)
    many = x.repeat(1000, 1)
    draws = (log_uniform(len(many)), randn(*many.shape, seed=1), randn(*many.shape, seed=2))
    found = elbo(mixture.denoiser, many, *draws, reference_std=0.6).log_density.reshape(1000, 60)
    error = found.std(0) / 1000**0.5
    assert ((found.mean(0) - true).abs() / error).max() < 4 and error.max() < 0.3
    assert found.mean() - true.mean() < 3 * error.norm() / 60 < 0.1

    wrong = lambda x, sigma: 0.9 * mixture.denoiser(x, sigma)  # noqa: E731
    assert elbo(wrong, many, *draws, reference_std=0.6).log_density.mean() < true.mean() - 0.2


def test_bound_equals_the_authors_with_their_truncation_corrected(oracle):
    convert = pytest.importorskip("training.official.song")
    arrays = {name: torch.from_numpy(value) for name, value in oracle("likelihood_elbo.npz").items() if value.ndim}
    network = convert.to_diffusers(load_file(ORACLE / "ctm_cifar_uncond.safetensors"))
    lowest = HIGH * math.exp(-oracle("likelihood_elbo.npz")["Z"].item() / 2)
    terms = elbo(
        lambda x, sigma: Preconditioning().denoise(network, x, sigma),
        *(arrays[name] for name in ("images", "std", "z", "res_z")),
        probes=(2 * arrays["eps01"] - 1)[None],
        prior_noise=arrays["lp_z"],
        sigma_min=lowest,
    )
    close(terms.prior, arrays["lp"], 1e-6, 0)
    close(terms.integral, arrays["Mu"] + arrays["Nu"], 1e-5, 0)
    close(terms.truncation, -arrays["residual_with_rho"], 1e-5, 0)
    close(-terms.log_density / (3072 * math.log(2)) + 7, arrays["bpd_with_rho"], 0, 2e-5)


# The program ----------------------------------------------------------------------------------------------------------


def test_program_measures_a_teacher_on_the_digits(exact_teacher, tmp_path, capsys):
    pipeline(exact_teacher(in_channels=1, out_channels=1), 0.75).save_pretrained(tmp_path)
    config = LikelihoodConfig(
        teacher=str(tmp_path), num_images=12, num_draws=2, batch_size=8, output_dir=str(tmp_path / "evaluation")
    )
    rows = main(config)
    order = torch.randperm(1797, generator=seeded()).tolist()[:12]
    images, _ = ImageDataset(config)[order]
    bits = -normal_log_density(images.double() / 127.5 - 1, 0.75) / (64 * math.log(2)) + math.log2(127.5)
    assert [row["method"] for row in rows] == ["ode", "elbo"] and rows[1]["nfe"] == 4
    for row in rows:
        assert abs(row["bits_per_dim"] - bits.mean()) < 2e-3
        assert abs(row["standard_error"] - bits.std() / 12**0.5) < 2e-3
    shown = capsys.readouterr().out
    written = json.loads((tmp_path / "evaluation" / "likelihood.json").read_text())
    assert written["indices"] == order and [one["sampler"] for one in written["results"]] == ["heun", "heun"]
    assert (torch.tensor(written["results"][0]["images"]) - bits).abs().max() < 0.02  # one number of each image
    assert "12 images" in shown and f"| teacher | elbo | {rows[1]['bits_per_dim']:.3f} ±" in shown


def test_program_names_what_is_missing(make_unet, tmp_path):
    for options, message in [
        ({}, "--model or --teacher"),
        ({"model": "x", "methods": ["exact"]}, "--methods"),
        ({"model": "x", "num_images": 0}, "--num_images"),
        ({"model": "x", "rtol": 0.0}, "--rtol"),
    ]:
        with pytest.raises(UserError, match=message):
            LikelihoodConfig(**options)
    pipeline(make_unet(UNet2DModel, in_channels=1, out_channels=1, num_class_embeds=10)).save_pretrained(tmp_path)
    with pytest.raises(UserError, match="--label_column"):
        main(LikelihoodConfig(teacher=str(tmp_path)))


# Images ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method, options", [("ode", {"num_draws": 4}), ("elbo", {"num_draws": 100})])
def test_bits_of_normal_images_are_their_entropy(method, options):
    """Data N(0, 0.25^2), rounded to 8 bits, has entropy log2(0.25 sqrt(2 pi e)) + log2(127.5)."""
    pipe = pipeline(ExactDenoiserNetwork(GaussianData(0.25), size=8))
    images = ((GaussianData(0.25).draw((48, 3, 8, 8), seeded()) + 1) * 127.5).round().clamp(0, 255).byte()
    found = log_likelihood(pipe, images, method=method, generator=seeded(1), **options)
    entropy = math.log2(0.25 * math.sqrt(2 * math.pi * math.e)) + math.log2(127.5)
    assert abs(found.bits_per_dim.mean() - entropy) < 4 * found.bits_per_dim.std() / 48**0.5 < 0.08
    # of each image: the mean over its cells is known
    x = images.double() / 127.5 - 1
    nats = normal_log_density(x, 0.25) - 192 * (1 / 255) ** 2 / 3 / (2 * 0.25**2)
    error = (found.nats - nats).abs() / (192 * math.log(2))
    assert (error < (2e-3 if method == "ode" else 5 * found.standard_error)).all()
    assert found.standard_error.max() < (1e-3 if method == "ode" else 0.15)


@pytest.mark.parametrize("method, options", [("ode", {"num_draws": 2}), ("elbo", {"num_draws": 200})])
def test_uniform_values_have_eight_bits(method, options):
    """The constant of dequantization: 256 equally likely values, whose cells fill [-1 - 1/255, 1 + 1/255]."""
    network = ExactDenoiserNetwork(UniformData(256 / 255), sigma_data=0.58, size=12, channels=1)
    images = (torch.arange(144).reshape(1, 1, 12, 12) + 56).byte()
    found = log_likelihood(pipeline(network, 0.58), images, method=method, generator=seeded(), **options)
    assert abs(found.bits_per_dim - 8) < 4 * found.standard_error.nan_to_num() + 2e-3
    assert found.standard_error < 0.05


@pytest.mark.parametrize(
    "options",
    [
        {"method": "ode", "num_probes": 8},
        {"method": "elbo", "num_draws": 120},
        {"method": "elbo", "num_draws": 40, "trace": "hutchinson", "num_probes": 2},
    ],
    ids=["ode", "elbo", "elbo hutchinson"],
)
def test_standard_errors_are_those_of_the_estimates(options):
    """(estimate - truth) / standard error has spread 1 over images; more draws or probes shrink it by the root."""
    mixture = mixture_problem()
    x = draw(mixture, 100).float()[..., None, None]
    pipe = pipeline(ExactDenoiserNetwork(Flat(mixture), 0.6, size=1, channels=2), 0.6)
    true = log_likelihood(pipe, (x + 1) / 2, dequantize=False, trace="exact", rtol=1e-5, atol=1e-5).nats
    close(true, mixture_log_density(mixture, x.flatten(1).double(), LOW), 0, 2e-2)
    found = log_likelihood(pipe, (x + 1) / 2, dequantize=False, generator=seeded(), **options)
    per_bit = 2 * math.log(2)
    close(found.bits_per_dim, -found.nats / per_bit + math.log2(127.5), 1e-9, 1e-9)
    deviation = (found.nats - true) / per_bit / (found.standard_error + 2e-3)  # the solver's error
    assert 0.75 < deviation.square().mean().sqrt() < 1.4 and deviation.mean().abs() < 0.35
    name = "num_probes" if options["method"] == "ode" else "num_draws"
    more = log_likelihood(
        pipe, (x + 1) / 2, dequantize=False, generator=seeded(1), **{**options, name: 4 * options[name]}
    )
    assert 1.6 < found.standard_error.mean() / more.standard_error.mean() < 2.5


def test_a_class_has_its_own_density():
    network = ExactNetwork(GaussianData(0.2), sigma_data=0.5, class_shift=[-0.5, 0.5], size=2)
    pipe, image = pipeline(network), torch.full((2, 3, 2, 2), 0.75)
    found = log_likelihood(pipe, image, [0, 1], dequantize=False, rtol=1e-6, atol=1e-6)
    # at sigma_max the prior does not know the mean of a class
    ratio, away = math.hypot(0.2, HIGH) / math.hypot(0.2, LOW), torch.tensor([1.0, 0.0], dtype=torch.float64)
    ends = torch.tensor([-0.5, 0.5]) + ratio * away
    true = normal_log_density(ends[:, None].expand(2, 12), HIGH) + 12 * math.log(ratio)
    close(found.nats, true, 0, 2e-2)
    assert found.nats[0] < found.nats[1] - 100
    one = log_likelihood(pipe, image, 1, dequantize=False, rtol=1e-6, atol=1e-6)
    close(one.nats, true[1].expand(2), 0, 2e-2)


def test_costs_and_seeds():
    network = ExactNetwork(GaussianData(0.2), class_shift=[-0.5, 0.0, 0.5], size=2, channels=1)
    pipe, images, labels, calls = pipeline(network), pixels(2, 1, 2), [0, 2], network.calls
    exact = log_likelihood(pipe, images, labels, trace="exact", generator=seeded())
    assert exact.nfe == len(calls) > 0 and exact.backward_passes == 4 * exact.nfe
    assert exact.standard_error.isnan().all() and exact.bits_per_dim.dtype == torch.float64
    calls.clear()
    found = log_likelihood(pipe, images, labels, num_draws=2, num_probes=3, generator=seeded())
    assert found.nfe == len(calls) and found.backward_passes == 3 * found.nfe
    again = log_likelihood(pipe, images, labels, num_draws=2, num_probes=3, generator=seeded())
    assert torch.equal(again.nats, found.nats) and torch.equal(again.standard_error, found.standard_error)
    calls.clear()
    bound = log_likelihood(pipe, images, labels, method="elbo", num_draws=5, generator=seeded())
    assert bound.nfe == len(calls) == 10 and bound.backward_passes == 0
    bound = log_likelihood(pipe, images, labels, method="elbo", num_draws=5, trace="hutchinson", num_probes=2)
    assert bound.backward_passes == 10


@pytest.mark.parametrize("options", [{"rtol": 0.3, "atol": 0.3}, {"method": "elbo", "trace": "hutchinson"}])
def test_works_in_inference_mode(make_unet, options):
    pipe = CTMPipeline(make_unet(num_class_embeds=2), CTMScheduler())
    images = torch.rand(2, 3, 8, 8, generator=seeded())

    def nats():
        return log_likelihood(pipe, images + 0, [0, 1], dequantize=False, generator=seeded(), **options).nats

    expected = nats()
    with torch.inference_mode():
        assert torch.equal(nats(), expected)


def test_images_come_as_they_are(exact_teacher):
    pipe = pipeline(exact_teacher(sample_size=4))
    images = pixels(2, size=4)
    hwc = images.permute(0, 2, 3, 1).numpy()
    few = {"method": "elbo", "num_draws": 2}
    expected = log_likelihood(pipe, images, generator=seeded(), **few).nats
    for kind in (images / 255, images.double() / 255, [Image.fromarray(each) for each in hwc], hwc):
        close(log_likelihood(pipe, kind, generator=seeded(), **few).nats, expected, 0, 1e-3)
    low = pipeline(exact_teacher(sample_size=4).to(torch.bfloat16))
    close(log_likelihood(low, images, generator=seeded(), **few).nats, expected, 0, 1e-3)  # F = 0 in any precision
    double = pipeline(exact_teacher(sample_size=4).double())
    shown = log_likelihood(double, images.double() / 255, dequantize=False, **FINE).nats
    close(shown, normal_log_density(images.double() / 127.5 - 1, math.hypot(0.5, LOW)), 0, 2e-3)


BAD = {
    "method": ({"method": "bound"}, "method"),
    "trace": ({"trace": "none"}, "trace"),
    "trace of the bound": ({"method": "elbo", "trace": "exact"}, "trace"),
    "draws": ({"num_draws": 0}, "num_draws"),
    "probes": ({"num_probes": 1.5}, "num_probes"),
    "tolerance": ({"rtol": 0.0}, "rtol"),
    "labels": ({"class_labels": 1}, "unconditional"),
    "generators": ({"generator": [seeded()]}, "log_likelihood takes one generator"),
    "not 8-bit": ({"images": torch.full((1, 3, 8, 8), 0.5)}, "8-bit"),
    "outside": ({"images": torch.full((1, 3, 8, 8), 260 / 255)}, r"must lie in \[0, 1\]"),
    "NaN": ({"images": torch.full((1, 3, 8, 8), math.nan)}, "NaN"),
    "NaN, continuous": ({"images": torch.full((1, 3, 8, 8), math.nan), "dequantize": False}, "NaN"),
    "size": ({"images": pixels(1, size=4)}, "images is 4x4 pixels"),
    "mode": ({"images": Image.new("L", (8, 8))}, "mode"),
}


@pytest.mark.parametrize("options, message", BAD.values(), ids=BAD.keys())
def test_bad_arguments_are_refused(exact_teacher, options, message):
    with pytest.raises(ValueError, match=message):
        log_likelihood(pipeline(exact_teacher()), **{"images": pixels(1), **options})


def test_bad_networks_are_refused(make_unet):
    conditional = pipeline(make_unet(num_class_embeds=3))
    with pytest.raises(ValueError, match="class-conditional"):
        log_likelihood(conditional, pixels(1))
    pipe = pipeline(make_unet())
    pipe.unet.train()
    with pytest.raises(ValueError, match="eval"):
        log_likelihood(pipe, pixels(1))
    pipe = pipeline(make_unet())
    torch.nn.init.constant_(pipe.unet.conv_out.bias, math.nan)
    with pytest.raises(ValueError, match="The network gave NaN .*in evaluation 1 of 1, at noise level 0.002"):
        log_likelihood(pipe, pixels(1))
