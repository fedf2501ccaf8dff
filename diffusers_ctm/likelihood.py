# Copyright 2026 The diffusers-ctm authors. Licensed under the Apache License, Version 2.0.
"""Likelihood of images under the diffusion model that a CTM or its teacher is: by the ODE, and a lower bound.

x is an image in [-1, 1] of n values, D(x, sigma) the denoiser, and the score is (D - x) / sigma^2. All log-densities
are in nats, of shape (B,). Two estimators:

- `ode_log_density`: the density at sigma_min of what the probability-flow ODE makes of N(0, sigma_max^2), by the change
  of variables (Song et al. 2021, "Score-based generative modeling", Section D.2).
- `elbo`: a lower bound of the density at level 0 that the noising process with the same denoiser gives (Song et al.
  2021, "Maximum likelihood training", Theorem 3), with the truncation at sigma_min bounded as in Kim et al. 2022, "Soft
  truncation".
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from diffusers.utils.torch_utils import randn_tensor

from .checks import (
    as_float64,
    check_choice,
    check_count,
    check_differentiable,
    check_finite,
    check_positive,
    sum_of,
)
from .image_inputs import read_images
from .pipeline_ctm import CTMPipeline, exact_denoiser, pipeline_condition
from .runge_kutta import dormand_prince
from .scheduling_karras import check_inner_levels
from .trajectory import append_dims


Denoiser = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]

HALF_WIDTH = 1 / 255  # of the cell of an 8-bit value in [-1, 1]: values are 2 / 255 = 1 / 127.5 apart

LEVELS_PER_UNIT = 127.5


@dataclass(frozen=True)
class LogLikelihood:
    """Output of `log_likelihood`. Tensors have shape (B,), float64 on the CPU.

    Args:
        bits_per_dim: -log2 p(x) / n + log2(127.5): an upper bound of the negative log-likelihood of the 8-bit image per
            value. With a `vae`, -log2 p(z) / n of the latents z, a density, which may be negative and says nothing of
            pixels.
        standard_error: of `bits_per_dim`, from the spread of the estimates; NaN if there is only one.
        nats: mean log-density of the (dequantized) image in [-1, 1], or of its latents, log p(x).
        nfe: network evaluations per image.
        backward_passes: vector-Jacobian products through the network per image.
    """

    bits_per_dim: torch.Tensor
    standard_error: torch.Tensor
    nats: torch.Tensor
    nfe: int
    backward_passes: int


@torch.inference_mode(False)  # the trace needs gradients, also where the caller is in inference mode
def log_likelihood(
    pipe: CTMPipeline,
    images,
    class_labels: int | str | Sequence[int | str] | torch.Tensor | None = None,
    method: str = "ode",
    num_draws: int | None = None,
    num_probes: int = 1,
    trace: str | None = None,
    dequantize: bool = True,
    rtol: float = 1e-4,
    atol: float = 1e-4,
    generator: torch.Generator | None = None,
) -> LogLikelihood:
    """Bits per dimension of images, by the probability-flow ODE or by the variational bound.

    The 8-bit value k is the density's value k / 127.5 - 1, as everywhere in diffusers. Uniform dequantization spreads
    it over its cell: x = (k + u) / 127.5 - 1 with u in [-1/2, 1/2). By Jensen the discrete image has at most
    -log2 p(x) / n + log2(127.5) bits per value on average over u, for any density p.

    Cost per image: "ode" as many evaluations per draw as the tolerances ask, each with `num_probes` backward passes (n
    for an exact trace); "elbo" two evaluations per draw, and `num_probes` backward passes with `trace="hutchinson"`.

    A pipeline with a `vae` is asked for the density of the standardized latents of the images, by their mean. It is not
    one of images: the autoencoder loses some of them, and its change of volume is not known.

    The ODE's density is the one at sigma_min, where a CTM's steps end; the bound is of the density at 0. At sigma_max
    both take N(0, sigma_max^2), from which the pipelines draw (docs/likelihood.md says what both cost in bits).

    Args:
        pipe: a `CTMPipeline` (a CTM or an EDM teacher) with `CTMScheduler` or `EDMHeunScheduler`; its network in eval
            mode. For a CTM it is the likelihood of its exact score g(x, t, t), not of its jumps.
        images: 8-bit images: PIL, uint8, or floats k / 255 in [0, 1], of the network's channels and size.
        class_labels: class of each image, or one for all; numbers or names. Needed by a class-conditional network,
            whose density given the class this is.
        method: "ode", or "elbo", a lower bound of the likelihood and so an upper bound of the bits.
        num_draws: independent estimates, each with its own dequantization: ODE solutions (default 1), or for the bound
            pairs of level and noise (default 32).
        num_probes: Hutchinson probes (random signs) per draw, each kept along the trajectory.
        trace: "hutchinson" (default of "ode") or "exact" (n backward passes per evaluation, for small images). The
            bound needs no trace: by default it is the denoising form, of the same mean as the "hutchinson" one and much
            less spread.
        dequantize: False takes the images as continuous values that are dequantized already, and may leave [0, 1].
        rtol, atol: tolerances of the ODE solver, relative and absolute; see `dormand_prince`. Steps are shared by the
            batch.
        generator: source of dequantization, probes, levels and noise.

    Returns:
        `LogLikelihood`. The standard error is over the draws; with one draw of the ODE it is over its probes, the
        trace's share only.

    Raises:
        ValueError: images of another size or mode, not 8-bit, or with NaN; labels missing or not expected; a network in
            training mode; a list of generators; an option that does not exist; a scheduler whose levels reach 0 or
            infinity; a network that gives NaN or infinite values.
        RuntimeError: the solver does not reach the tolerances.
    """
    # 1. Check
    check_choice("method", method, ("ode", "elbo"))
    if trace not in ((None, "hutchinson", "exact") if method == "ode" else (None, "hutchinson")):
        raise ValueError(f"trace={trace!r} is not known to method={method!r}.")
    num_draws = {"ode": 1, "elbo": 32}[method] if num_draws is None else num_draws
    check_count(num_draws=num_draws, num_probes=num_probes)
    check_positive(rtol=rtol, atol=atol)
    if isinstance(generator, list):
        raise ValueError("log_likelihood takes one generator, for the whole batch.")
    unet = pipe.unet
    if unet.training:
        raise ValueError(
            "The network is in training mode, where dropout changes the likelihood; call `pipe.unet.eval()`."
        )
    check_differentiable(unet)
    images = read_images(
        images, pipe.image_channels, pipe.image_size, "images", bounded=dequantize, dtype=torch.float64
    )

    # 2. Prepare
    device = pipe._execution_device
    dtype = torch.float64 if unet.dtype == torch.float64 else torch.float32
    if pipe.vae is None:
        clean, bits_per_value = 2 * images - 1, math.log2(LEVELS_PER_UNIT)
        clean = _on_grid(clean) if dequantize else clean
    else:
        with torch.no_grad():
            clean, bits_per_value, dequantize = pipe.encode_images(images.float()), 0.0, False
    clean = clean.to(device=device, dtype=dtype)
    exact = exact_denoiser(pipe, **pipeline_condition(pipe, class_labels, len(clean), device))
    sums, seen = [], []

    def denoiser(x, sigma):
        denoised = exact(x, sigma)
        sums.append(sum_of(denoised))  # looked at once, at the end
        seen.append(sigma)
        return denoised

    config = pipe.scheduler.config
    check_inner_levels(config, "log_likelihood")
    levels = {"sigma_min": config.sigma_min, "sigma_max": config.sigma_max}

    def normal(*shape):
        return randn_tensor(shape, generator=generator, device=device, dtype=dtype)

    def uniform(*shape):
        source = generator.device if generator is not None else device
        return torch.rand(shape, generator=generator, device=source, dtype=dtype).to(device)

    def signs():
        return torch.where(uniform(num_probes, *clean.shape) < 0.5, -1.0, 1.0).to(dtype)

    # 3. Estimate
    estimates, nfe, backward_passes = [], 0, 0  # each (num_probes, B) of the ODE, (1, B) of the bound
    for _ in range(num_draws):
        x = clean + HALF_WIDTH * (2 * uniform(*clean.shape) - 1) if dequantize else clean
        if method == "ode":
            probes = None if trace == "exact" else signs()
            try:
                solution = ode_log_density(denoiser, x, probes, config.sigma_data, rtol=rtol, atol=atol, **levels)
            except RuntimeError:
                check_finite(sums, seen, "evaluation")
                raise
            estimates.append(solution.log_density)
            nfe += solution.nfe
            backward_passes += solution.nfe * (x[0].numel() if probes is None else num_probes)
        else:
            # Each image's level is log-uniform; those of a batch are evenly apart, so that its mean spreads less.
            ramp = (uniform(1) + torch.arange(len(x), device=device, dtype=dtype) / len(x)) % 1
            sigma = config.sigma_min * (config.sigma_max / config.sigma_min) ** ramp
            probes = None if trace is None else signs()
            terms = elbo(
                denoiser,
                x,
                sigma,
                noise=normal(*x.shape),
                truncation_noise=normal(*x.shape),
                probes=probes,
                reference_std=config.sigma_data,
                **levels,
            )
            estimates.append(terms.log_density[None])
            nfe += 2
            backward_passes += 0 if probes is None else num_probes
    pipe.maybe_free_model_hooks()
    if method == "elbo":  # the solver may leave the region where the network is finite, and come back
        check_finite(sums, seen, "evaluation")

    # 4. Summarize
    log_density = torch.stack(estimates).cpu().double()  # (draws, probes, B)
    independent = log_density.mean(1) if num_draws > 1 else log_density[0]
    per_bit = clean[0].numel() * math.log(2)
    nats = log_density.mean((0, 1))
    spread = independent.std(0) if len(independent) > 1 else torch.full_like(nats, math.nan)
    return LogLikelihood(
        bits_per_dim=-nats / per_bit + bits_per_value,
        standard_error=spread / len(independent) ** 0.5 / per_bit,
        nats=nats,
        nfe=nfe,
        backward_passes=backward_passes,
    )


def _on_grid(x: torch.Tensor) -> torch.Tensor:
    """The nearest 8-bit values of `x` in [-1, 1], float64. Raises ValueError if they are not near."""
    value = ((x + 1) * LEVELS_PER_UNIT).round() / LEVELS_PER_UNIT - 1
    if (value - x).abs().max() > HALF_WIDTH / 20:
        raise ValueError(
            "The images are not 8-bit: values k / 255 in [0, 1], k = 0..255, are asked. Round them, pass uint8, or "
            "pass dequantize=False for continuous values."
        )
    return value


# The probability-flow ODE -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class OdeLogDensity:
    """Output of `ode_log_density`.

    Args:
        log_density: shape (P, B), one per probe.
        latents: the state at sigma_max, shape (B, ...).
        nfe: evaluations of the denoiser.
    """

    log_density: torch.Tensor
    latents: torch.Tensor
    nfe: int


def ode_log_density(
    denoiser: Denoiser,
    x: torch.Tensor,
    probes: torch.Tensor | None = None,
    sigma_data: float = 0.5,
    sigma_min: float = 0.002,
    sigma_max: float = 80.0,
    rtol: float = 1e-4,
    atol: float = 1e-4,
) -> OdeLogDensity:
    """log p(x) at sigma_min of the flow of dx/dsigma = (x - D) / sigma that starts as N(0, sigma_max^2) at sigma_max.

    Solved in y = x / c with c = sqrt(sigma^2 + sigma_data^2), of unit variance at all levels, over the angle phi =
    arctan(sigma / sigma_data):

        dy/dphi = (cos(phi) y - D / sigma_data) / sin(phi)      (minus EDM's F, so 0 for data N(0, sigma_data^2))
        log p(x) = log N(x_T; 0, sigma_max^2) + n ln(c_T / c) + int tr(d(dy/dphi)/dy) dphi

    `sigma_data` chooses coordinates only; the result does not depend on it.

    Args:
        denoiser: D(x, sigma) with sigma of shape (); differentiable in x.
        x: (B, ...), taken as the state at sigma_min.
        probes: (P, B, ...) of unit covariance: P estimates of the trace, each with one probe along the trajectory
            (Hutchinson). None is the exact trace (P = 1), n backward passes per evaluation.
        rtol, atol: of `dormand_prince`, on y and on the integral per dimension.
    """
    size, count = x[0].numel(), 1 if probes is None else len(probes)
    start, end = as_float64([math.atan(level / sigma_data) for level in (sigma_min, sigma_max)], "levels")

    def field(phi: torch.Tensor, state: torch.Tensor) -> torch.Tensor:
        cos, sin = phi.cos().item(), phi.sin().item()
        y = state[:, :size].reshape(x.shape)
        sigma = torch.tensor(sigma_data * math.tan(phi.item()), dtype=x.dtype, device=x.device)
        denoised, trace = denoiser_and_trace(denoiser, y * (sigma_data / cos), sigma, probes)
        slope = (cos * y - denoised / sigma_data) / sin
        identity = size if probes is None else probes.flatten(2).square().sum(2)
        divergence = (identity * cos - trace / cos) / sin
        return torch.cat([slope.flatten(1), divergence.T / size], dim=1)

    c, c_end = math.hypot(sigma_min, sigma_data), math.hypot(sigma_max, sigma_data)
    state = torch.cat([x.flatten(1) / c, x.new_zeros(len(x), count)], dim=1)
    state, nfe = dormand_prince(field, state, start, end, rtol, atol, size)
    latents = state[:, :size].reshape(x.shape) * c_end
    log_density = normal_log_density(latents, sigma_max) + size * (math.log(c_end / c) + state[:, size:].T)
    return OdeLogDensity(log_density, latents, nfe)


def normal_log_density(x: torch.Tensor, std: float) -> torch.Tensor:
    """log N(x; 0, std^2 I), (B,)."""
    return -_sum_of_squares(x) / (2 * std**2) - x[0].numel() / 2 * math.log(2 * math.pi * std**2)


def denoiser_and_trace(
    denoiser: Denoiser, x: torch.Tensor, sigma: torch.Tensor, probes: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """D(x, sigma), and e^T (dD/dx) e for each probe e, (P, B); without probes the trace of dD/dx, (1, B).

    One evaluation and P (without probes n) vector-Jacobian products. The network's parameters get no gradient and no
    graph is kept.
    """
    with torch.enable_grad():
        x = x.detach().requires_grad_(True)
        denoised = denoiser(x, sigma)
        if probes is None:
            trace = sum(_diagonal_entry(denoised, x, i) for i in range(x[0].numel()))[None]
        else:
            products = (e * torch.autograd.grad(denoised, x, e, retain_graph=True)[0] for e in probes)
            trace = torch.stack([product.flatten(1).sum(1) for product in products])
    return denoised.detach(), trace.detach()


def _diagonal_entry(output: torch.Tensor, x: torch.Tensor, index: int) -> torch.Tensor:
    """d output_i / d x_i of each sample, (B,), `index` counting the values of a sample."""
    unit = torch.zeros_like(output).flatten(1)
    unit[:, index] = 1
    return torch.autograd.grad(output, x, unit.reshape(output.shape), retain_graph=True)[0].flatten(1)[:, index]


# The variational bound ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ElboTerms:
    """One draw of the bound, in nats, each of shape (B,). `log_density` is their sum.

    Args:
        prior: log density of x + sigma_max z under N(0, sigma_max^2).
        integral: of the diffusion between sigma_min and sigma_max.
        truncation: of decoding x from its state at sigma_min by N(D, sigma_min^2), at most n/2 and about 0 where D is
            good.
    """

    prior: torch.Tensor
    integral: torch.Tensor
    truncation: torch.Tensor

    @property
    def log_density(self) -> torch.Tensor:
        return self.prior + self.integral + self.truncation


def elbo(
    denoiser: Denoiser,
    x: torch.Tensor,
    sigma: torch.Tensor,
    noise: torch.Tensor,
    truncation_noise: torch.Tensor,
    probes: torch.Tensor | None = None,
    prior_noise: torch.Tensor | None = None,
    reference_std: float | None = None,
    sigma_min: float = 0.002,
    sigma_max: float = 80.0,
) -> ElboTerms:
    """One draw of the lower bound of log p(x) of the noising process x + sigma z. Its mean over all draws is the bound.

    With Z = 2 ln(sigma_max / sigma_min), x_s = x + sigma z and sigma log-uniform, which is the density that weighs
    d(sigma^2) by 1 / sigma^2:

        prior       log N(x + sigma_max z'; 0, sigma_max^2)
        integral    -Z/2 |sigma s|^2 - Z sigma^2 e^T (ds/dx) e,  s = (D - x_s) / sigma^2     with probes (Hutchinson)
                    -Z/2 (|D - x|^2 / sigma^2 - n)                              without: equal in the mean
        truncation  n/2 - |D(x + sigma_min z'', sigma_min) - x|^2 / (2 sigma_min^2)

    Two evaluations. With an exact denoiser the bound is tight but for the decoder and the prior.

    Args:
        denoiser: D(x, sigma) with sigma of shape (B,).
        x: (B, ...), at level 0.
        sigma: (B,), log-uniform in [sigma_min, sigma_max].
        noise, truncation_noise: z and z'', unit normal, shape of `x`.
        probes: e, (P, B, ...), of unit covariance; their mean is taken.
        prior_noise: z'; None takes the expectation, which is known.
        reference_std: standard deviation of normal data for whose denoiser the last two terms at the same draws are
            subtracted and their known means added (a control variate; only without probes). It changes the spread, not
            the mean; for such data the spread is 0.
    """
    size = x[0].numel()
    z_total = 2 * math.log(sigma_max / sigma_min)
    level = append_dims(sigma, x.ndim)
    noisy, least_noisy = x + level * noise, x + sigma_min * truncation_noise

    if prior_noise is None:
        prior = normal_log_density(x, sigma_max) - size / 2
    else:
        prior = normal_log_density(x + sigma_max * prior_noise, sigma_max)

    if probes is not None:
        denoised, trace = denoiser_and_trace(denoiser, noisy, sigma, probes)
        squared_score = _sum_of_squares((denoised - noisy) / level)
        integral = -z_total / 2 * squared_score - z_total * (trace - probes.flatten(2).square().sum(2)).mean(0)
    else:
        with torch.no_grad():
            denoised = denoiser(noisy, sigma)
        integral = -z_total / 2 * (_sum_of_squares((denoised - x) / level) - size)
    with torch.no_grad():
        decoded = denoiser(least_noisy, torch.full_like(sigma, sigma_min))
    truncation = size / 2 - _sum_of_squares((decoded - x) / sigma_min) / 2

    if reference_std is not None and probes is None:
        c_skip = append_dims(reference_std**2 / (sigma**2 + reference_std**2), x.ndim)
        drawn = -z_total / 2 * (_sum_of_squares((c_skip * noisy - x) / level) - size)
        integral = integral - drawn + _normal_integral(x, reference_std, sigma_min, sigma_max)
        c_skip = reference_std**2 / (sigma_min**2 + reference_std**2)
        drawn = _sum_of_squares((c_skip * least_noisy - x) / sigma_min) / 2
        mean = ((1 - c_skip) / sigma_min) ** 2 * _sum_of_squares(x) / 2 + c_skip**2 * size / 2
        truncation = truncation + drawn - mean
    return ElboTerms(prior, integral, truncation)


def _sum_of_squares(x: torch.Tensor) -> torch.Tensor:
    """|x|^2 of each sample of (B, ...), shape (B,)."""
    return x.flatten(1).square().sum(1)


def _normal_integral(x: torch.Tensor, std: float, sigma_min: float, sigma_max: float) -> torch.Tensor:
    """Mean over sigma and z of the integral in `elbo` for the denoiser c x of data N(0, std^2).

    With c = std^2 / (sigma^2 + std^2) it is
    -int (|x|^2 (1 - c)^2 / sigma^2 + n (c^2 - 1)) d ln(sigma), with (1 - c)^2 / sigma^2 = sigma^2 / (sigma^2 + std^2)^2
    and 1 - c^2 = sigma^2 / (sigma^2 + std^2) + std^2 sigma^2 / (sigma^2 + std^2)^2.
    """
    low, high = sigma_min**2 + std**2, sigma_max**2 + std**2
    moment = (1 / low - 1 / high) / 2
    return -_sum_of_squares(x) * moment + x[0].numel() * (math.log(high / low) / 2 + std**2 * moment)
