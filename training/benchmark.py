"""What training and sampling cost, as ratios measured side by side in one run: `python -m training.benchmark`."""

import contextlib
import ctypes
import functools
import gc
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
import unittest.mock
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field

import torch
from diffusers import CMStochasticIterativeScheduler, ConsistencyModelPipeline, UNet2DModel
from tqdm.auto import tqdm

from diffusers_ctm import CTMPipeline, CTMScheduler, CTMUNet2DModel, EDMHeunScheduler, EDMUNet2DModel
from diffusers_ctm.trajectory import Preconditioning, append_dims

from . import run, train_ctm
from .backbones import load_backbone
from .compiling import compile_network
from .evaluate import wait_for
from .config import Checked, CTMConfig, DiscriminatorOptions, UserError, option, run_program
from .discriminator import (
    ProjectedDiscriminator,
    discriminator_hinge_loss,
    discriminator_loss,
    discriminator_optimizer,
    generator_hinge_loss,
    generator_loss,
    generator_weight,
)
from .ema import EMA
from .evaluate import choose_device, hardware
from .files import write_files
from .losses import ctm_estimate, ctm_loss, l2_distance, make_jumps
from .solver import SOLVERS, heun_solve
from .time_sampling import Times, TimeSampler, draw_half_lognormal_sigma


@dataclass
class BenchmarkConfig(Checked):
    """Measure ratios of time: our training step against one in the order of the authors' loop, the pipeline against its network, and scaling.

    Both sides of a ratio run alternately in this process, with the same networks, images and times. Times in seconds are of this machine and
    of these small networks; only ratios say something about others.
    """

    config: str | None = option(None, "YAML file with any of these options; the command line overrides it.")
    output_dir: str = option("runs/benchmark", "Folder for benchmark.json and benchmark.md.")
    parts: list[str] = option(
        ["training", "adversarial", "sampling", "scaling"],
        "Which of 'training', 'adversarial', 'sampling' and 'scaling'.",
    )
    channels: int = option(16, "Channels of the network, EDM's DDPM++ for CIFAR-10: 128 there, 16 fits a CPU core.")
    resolution: int = option(32, "Height and width of the images.")
    batch_size: int = option(8, "Images of a training step.")
    num_train_timesteps: int = option(18, "Noise levels N of the grid; the solver takes up to N - 1 steps.")
    rounds: int = option(3, "Measurements of each ratio; its spread is theirs.")
    strata: int = option(
        6,
        "Training steps in a round: their number k of solver steps stands for as many equally probable parts of P(k).",
    )
    sampling_batch_size: int = option(64, "Images of a sampling call.")
    threads: int = option(1, "CPU threads. Times of more are noisy.")
    device: str = option("auto", "'cpu', 'cuda', ..., or 'auto': a GPU if there is one.")
    mixed_precision: str = option("no", "'no' or 'bf16' (autocast).", ["no", "bf16"])
    compile: bool = option(False, "Compile the networks with torch.compile.")

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_positive(
            "channels", "resolution", "batch_size", "rounds", "strata", "sampling_batch_size", "threads"
        )
        known = self.__dataclass_fields__["parts"].default_factory()
        self.check(len(self.parts) > 0 and set(self.parts) <= set(known), "parts", f"some of {', '.join(known)}")
        self.check(self.channels % 16 == 0, "channels", "a multiple of 16")
        self.check(self.resolution % 4 == 0, "resolution", "a multiple of 4")
        self.check(self.batch_size % 4 == 0, "batch_size", "a multiple of 4, which share a path")
        self.check(self.num_train_timesteps > self.strata, "num_train_timesteps", "above --strata")


# Training -----------------------------------------------------------------------------------------------------------


@dataclass
class Problem:
    """Networks and the inputs of a step, the same for both sides.

    `averages` are the plain loop's: the target's network and the two that are evaluated, of which one has the target's rate. `judge` is there
    if `adversarial`: a discriminator on the features of the embedded classifier, without augmentation.
    """

    config: Any
    device: torch.device
    adversarial: bool = False
    student: torch.nn.Module = field(init=False)
    teacher: torch.nn.Module = field(init=False)

    def __post_init__(self):
        config = self.config
        torch.manual_seed(0)
        shape = {"model_channels": config.channels, "block_out_channels": (2 * config.channels,) * 3}
        self.teacher = EDMUNet2DModel(sample_size=config.resolution, **shape).eval().requires_grad_(False)
        _fill(self.teacher)
        self.student = EDMUNet2DModel.from_unet(self.teacher).requires_grad_(True)
        _fill(self.student)
        for network in (self.teacher, self.student):
            network.to(self.device, memory_format=torch.channels_last)
        self.target = EMA(self.student, 0.999)
        self.duplicate, self.slow = EMA(self.student, 0.999), EMA(self.student, 0.9999)
        self.optimizer = torch.optim.RAdam(self.student.parameters(), lr=1e-6)
        self.judge = None
        if self.adversarial:
            backbones = {"digits": load_backbone("digits", config.resolution)}
            judge = ProjectedDiscriminator(backbones, 0, channels=config.channels, augment=False)
            self.judge = judge.to(self.device, memory_format=torch.channels_last)
            options = DiscriminatorOptions(discriminator_learning_rate=1e-6)
            self.judge_optimizer = discriminator_optimizer(options, self.judge)
        self.preconditioning = Preconditioning()
        self.call = {"student": self.student, "ema": self.target.module, "teacher": self.teacher}
        if config.compile:
            for network in self.call.values():
                compile_network(network)

    def inputs(self, seed: int) -> dict[str, torch.Tensor]:
        size = (self.config.batch_size, 3, self.config.resolution, self.config.resolution)
        generator = torch.Generator().manual_seed(seed)
        x_0, noise, dsm_noise = (torch.randn(size, generator=generator) for _ in range(3))
        normal, uniform = torch.randn(size[0], generator=generator), torch.rand(size[0], generator=generator)
        sigma = draw_half_lognormal_sigma(normal, uniform, 0.002, 80.0, 7.0)
        values = {"x_0": 0.5 * x_0, "noise": noise, "dsm_noise": dsm_noise, "dsm_sigma": sigma}
        return {name: value.to(self.device) for name, value in values.items()}

    def times(self, k: int, seed: int, per_path: int = 1) -> Times:
        """Times of a step whose solver takes `k` steps."""
        sampler = TimeSampler(self.config.num_train_timesteps, max_steps=k, per_path=per_path)
        generator = torch.Generator().manual_seed(seed)
        while True:
            times = sampler.draw(self.config.batch_size, generator)
            if int(times.steps[0]) == k:
                return times

    def strata(self) -> list[int]:
        """Numbers of solver steps in the middle of equally probable parts of P(k) ~ k."""
        weights = torch.arange(1.0, self.config.num_train_timesteps)
        share = weights.cumsum(0) / weights.sum()
        middles = (torch.arange(self.config.strata) + 0.5) / self.config.strata
        return (torch.searchsorted(share, middles) + 1).tolist()

    def denoise(self, x: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            return self.preconditioning.denoise(self.call["teacher"], x, sigma)


def _fill(network: torch.nn.Module) -> None:
    """Random numbers where an untrained network has zeros, so that every gradient is one."""
    for parameter in network.parameters():
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.05)


def plain_estimate(problem: Problem, times: Times, values: dict[str, torch.Tensor]) -> torch.Tensor:
    """Both jumps of every sample, with graph."""
    jump, call = problem.preconditioning.jump, problem.call
    t, s = times.t.to(values["x_0"]), times.s.to(values["x_0"])
    x_t = values["x_0"] + append_dims(t, 4) * values["noise"]
    return jump(call["ema"], jump(call["student"], x_t, t, s), s, torch.full_like(s, times.end))


def plain_step(problem: Problem, times: Times, values: dict[str, torch.Tensor]) -> dict[str, float]:
    """A step as the authors' loop orders it: every jump computed, gradients for each weight and for the update by passes of their own.

    Teacher, student and average are called as there: 2k times, twice, and three times (once with graph); the averages are three.
    """
    precondition, call = problem.preconditioning, problem.call
    x_0 = values["x_0"]
    t, u, s = (level.to(x_0) for level in (times.t, times.u, times.s))
    end = torch.full_like(s, times.end)

    x_u = x_0 + append_dims(t, 4) * values["noise"]
    path = times.path.to(x_0)
    for row in range(int(times.steps[0])):
        level, next_level = path[row], path[row + 1]
        slope = (x_u - problem.denoise(x_u, level)) / append_dims(level, 4)
        euler = x_u + append_dims(next_level - level, 4) * slope
        next_slope = (euler - problem.denoise(euler, next_level)) / append_dims(next_level, 4)
        x_u = x_u + append_dims(next_level - level, 4) * (slope + next_slope) / 2
    estimate = plain_estimate(problem, times, values)
    with torch.no_grad():
        target = precondition.jump(call["ema"], precondition.jump(call["ema"], x_u, u, s), s, end)
    trajectory = l2_distance(estimate, target).mean()

    sigma = values["dsm_sigma"]
    x_sigma = x_0 + append_dims(sigma, 4) * values["dsm_noise"]
    denoised = precondition.g(call["student"], x_sigma, sigma, sigma)
    dsm = (precondition.loss_weight(sigma) * l2_distance(denoised, x_0)).mean()

    def weigh(loss: torch.Tensor, smallest: float, largest: float) -> torch.Tensor:
        last = problem.student.last_layer.weight
        lengths = [torch.autograd.grad(each, last, retain_graph=True)[0].norm() for each in (trajectory, loss)]
        return (lengths[0] / (lengths[1] + 1e-4)).clamp(smallest, largest).detach()

    weight = weigh(dsm, 0.0, 1e4)
    total = trajectory + weight * dsm
    terms = {"trajectory": trajectory.item(), "dsm": dsm.item(), "weight": weight.item()}  # read to log them
    if problem.judge is not None:
        with problem.judge.frozen():
            generator = generator_hinge_loss(problem.judge(estimate))
        weight = weigh(generator, 0.01, 10.0)
        total = total + weight * generator
        terms |= {"generator": generator.item(), "generator_weight": weight.item()}
    total.backward()
    _finish(problem, [problem.target, problem.duplicate, problem.slow])
    return terms


def plain_discriminator_step(problem: Problem, times: Times, values: dict[str, torch.Tensor]) -> dict[str, float]:
    """The discriminator's turn in that order: fakes made with a graph that nobody goes back through; fakes and data by passes of their own."""
    fake = plain_estimate(problem, times, values).detach()
    fake_logits, real_logits = problem.judge(fake), problem.judge(values["x_0"])
    loss = discriminator_hinge_loss(real_logits, fake_logits)
    loss.backward()
    problem.judge_optimizer.step()
    return {"discriminator": loss.item()}


def our_step(
    problem: Problem, times: Times, values: dict[str, torch.Tensor], solver: Callable = heun_solve
) -> dict[str, torch.Tensor]:
    """The step of `training.train_ctm`."""
    loss = ctm_loss(
        student=problem.call["student"],
        student_ema=problem.call["ema"],
        solver=functools.partial(solver, problem.denoise),
        preconditioning=problem.preconditioning,
        times=times,
        last_weight=problem.student.last_layer.weight,
        generator_loss=None if problem.judge is None else functools.partial(generator_loss, problem.judge),
        generator_weight=generator_weight,
        **values,
    )
    loss.backward.backward()
    _finish(problem, [problem.target, problem.slow])
    terms = {"trajectory": loss.trajectory, "dsm": loss.dsm, "weight": loss.dsm_weight}
    if problem.judge is not None:
        terms |= {"generator": loss.generator, "generator_weight": loss.generator_weight}
    return terms


def our_discriminator_step(problem: Problem, times: Times, values: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The discriminator's turn of `training.train_ctm`."""
    x_0, call = values["x_0"], problem.call
    jumps = make_jumps(call["student"], call["ema"], problem.preconditioning, times, x_0, None)
    loss = discriminator_loss(problem.judge, x_0, ctm_estimate(jumps, x_0, values["noise"]))
    loss.backward()
    problem.judge_optimizer.step()
    return {"discriminator": loss.detach()}


def _finish(problem: Problem, averages: list[EMA]) -> None:
    """Optimiser and averages; gradients stay for the comparison. A learning rate near 0 leaves both sides the same networks."""
    problem.optimizer.step()
    for average in averages:
        average.step(problem.student)


@contextlib.contextmanager
def restored(problem: Problem) -> Iterator[None]:
    """Run a step whose changes to the networks are taken back."""
    networks = [problem.student, problem.target.module] + ([problem.judge] if problem.judge is not None else [])
    before = [{name: value.clone() for name, value in network.state_dict().items()} for network in networks]
    for network in networks:
        network.zero_grad(set_to_none=True)
    yield
    for network, state in zip(networks, before):
        network.load_state_dict(state)


class Counter:
    """Images through a network, of which `first` is the first layer: forward without and with graph, and backward."""

    def __init__(self, network: torch.nn.Module, first: torch.nn.Module):
        self.without_graph = self.with_graph = self.backward = 0
        self.handles = [network.register_forward_hook(self._forward), first.register_forward_hook(self._watch)]

    def _forward(self, module, args, output):
        if output[0].requires_grad:
            self.with_graph += len(args[0])
        else:
            self.without_graph += len(args[0])

    def _watch(self, module, args, output):
        if output.requires_grad:  # a pass that only asks for the last layer's gradient does not come here
            output.register_hook(self._backward)

    def _backward(self, gradient):
        self.backward += len(gradient)

    def close(self) -> dict[str, int]:
        for handle in self.handles:
            handle.remove()
        return {name: getattr(self, name) for name in ("without_graph", "with_graph", "backward")}


def seconds_of(call: Callable[[], object], device: torch.device) -> float:
    wait_for(device)
    began = time.perf_counter()
    call()
    wait_for(device)
    return time.perf_counter() - began


def peak_memory(call: Callable[[], object], device: torch.device) -> int | None:
    """Bytes by which memory in use rises at most during `call`; on a CPU the resident set, on Linux only."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        call()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before

    def status(name: str) -> int:
        with open("/proc/self/status") as file:
            return next(1024 * int(line.split()[1]) for line in file if line.startswith(name))

    try:
        ctypes.CDLL("libc.so.6").malloc_trim(0)
        with open("/proc/self/clear_refs", "w") as file:
            file.write("5")  # forget the peak so far
        before = status("VmRSS:")
    except OSError:
        call()
        return None
    call()
    return status("VmHWM:") - before


def compare(problem: Problem, variants: dict[str, Callable], config: BenchmarkConfig, progress: tqdm) -> dict:
    """Time of each variant over that of "plain", the same rounds and strata in turn; work and memory of one pass over the strata."""
    autocast = torch.autocast(problem.device.type, torch.bfloat16, enabled=config.mixed_precision == "bf16")
    strata, ratios, seconds = problem.strata(), {name: [] for name in variants}, {name: [] for name in variants}

    def run(name: str, k: int, seed: int):
        values = problem.inputs(seed)
        with restored(problem), autocast:
            return variants[name](problem, k, seed, values)

    for name in variants:  # once for caches, compilation and the allocator
        run(name, strata[-1], 0)
        progress.update()
    counts, memory = {}, {}
    networks = {"teacher": problem.teacher, "student": problem.student, "average": problem.target.module}
    for name in variants:
        counters = {kind: Counter(network, network.conv_in) for kind, network in networks.items()}
        if problem.judge is not None:
            features = problem.judge.backbones["digits"]
            counters["features"] = Counter(features, features.body[0])
        with torch.compiler.set_stance("force_eager"):  # where hooks are called one by one
            for seed, k in enumerate(strata):
                run(name, k, seed)
        images = len(strata) * config.batch_size
        counts[name] = {
            kind: {what: value / images for what, value in counter.close().items()}
            for kind, counter in counters.items()
        }
        memory[name] = peak_memory(lambda name=name: run(name, strata[-1], 0), problem.device)
        progress.update()
    for round_number in range(config.rounds):
        spent = dict.fromkeys(variants, 0.0)
        for seed, k in enumerate(strata):
            names = list(variants)
            for name in names if (round_number + seed) % 2 else names[::-1]:
                values = problem.inputs(100 * round_number + seed)
                with restored(problem), autocast:
                    step = functools.partial(variants[name], problem, k, 100 * round_number + seed, values)
                    spent[name] += seconds_of(step, problem.device)
        for name in variants:
            seconds[name].append(spent[name] / len(strata))
            ratios[name].append(spent[name] / spent["plain"])
        progress.update()
    return {
        name: {
            "ratio": summarise(ratios[name]),
            "seconds_per_step": summarise(seconds[name]),
            "images": counts[name],
            "peak_memory": memory[name],
        }
        for name in variants
    }


def summarise(values: list[float]) -> dict[str, float | None]:
    return {
        "mean": statistics.fmean(values),
        "std": statistics.stdev(values) if len(values) > 1 else None,
        "min": min(values),
        "max": max(values),
    }


def training_variants() -> dict[str, Callable]:
    """Steps to compare, called with problem, k, seed and inputs; "plain" first."""

    def plain(problem, k, seed, values):
        return plain_step(problem, problem.times(k, seed), values)

    def ours(solver, per_path):
        return lambda problem, k, seed, values: our_step(
            problem, problem.times(k, seed, per_path), values, SOLVERS[solver]
        )

    return {
        "plain": plain,
        "exact": ours("heun", 1),
        "--solver unipc": ours("unipc", 1),
        "--solver dpm": ours("dpm", 1),
        "--solver unipc --triples_per_path 4": ours("unipc", 4),
    }


def adversarial_variants() -> dict[str, Callable]:
    """A turn of the student and one of the discriminator, likewise."""

    def turns(student, discriminator):
        def run(problem, k, seed, values):
            times = problem.times(k, seed)
            return {**student(problem, times, values), **discriminator(problem, times, values)}

        return run

    return {"plain": turns(plain_step, plain_discriminator_step), "exact": turns(our_step, our_discriminator_step)}


def same_result(problem: Problem, variants: dict[str, Callable]) -> dict[str, float]:
    """How far losses and gradients of the exact step are from those of the plain one, relative to the largest of a network."""
    found = {}
    k = problem.strata()[0]
    for name in ("plain", "exact"):
        values = problem.inputs(0)
        with restored(problem):
            terms = variants[name](problem, k, 0, values)
            gradients = [
                [parameter.grad.clone() for parameter in network.parameters() if parameter.grad is not None]
                for network in (problem.student, problem.judge)
                if network is not None
            ]
        found[name] = (torch.tensor([float(value) for value in terms.values()]), gradients)
    (plain_terms, plain_gradients), (terms, gradients) = found["plain"], found["exact"]
    differences = [
        max((a - b).abs().max() for a, b in zip(ours, plain, strict=True)) / max(b.abs().max() for b in plain)
        for ours, plain in zip(gradients, plain_gradients, strict=True)
    ]
    return {
        "losses": float(((terms - plain_terms) / plain_terms).abs().max()),
        "gradients": float(max(differences)),
    }


def measure_training(config: BenchmarkConfig, device: torch.device, adversarial: bool = False) -> dict:
    problem = Problem(config, device, adversarial)
    variants = adversarial_variants() if adversarial else training_variants()
    words = "Adversarial steps" if adversarial else "Training steps"
    with tqdm(total=2 * len(variants) + config.rounds, desc=words, unit="pass") as progress:
        return {
            "difference": same_result(problem, variants),
            "solver_steps": problem.strata(),
            "variants": compare(problem, variants, config, progress),
        }


# Sampling -----------------------------------------------------------------------------------------------------------


def measure_sampling(config: BenchmarkConfig, device: torch.device) -> dict:
    """CTMPipeline over the network calls it makes, over diffusers' pipeline of consistency models, and the teacher's 18 Heun steps over one step."""
    torch.manual_seed(0)
    width = 2 * config.channels
    network = CTMUNet2DModel.from_unet(
        UNet2DModel(
            sample_size=config.resolution,
            block_out_channels=(width, 2 * width),
            down_block_types=("DownBlock2D", "AttnDownBlock2D"),
            up_block_types=("AttnUpBlock2D", "UpBlock2D"),
            norm_num_groups=8,
            attention_head_dim=8,
        )
    )
    network = network.to(device, memory_format=torch.channels_last).eval()
    ctm, heun = CTMPipeline(network, CTMScheduler()), CTMPipeline(network, EDMHeunScheduler())
    consistency = ConsistencyModelPipeline(network, CMStochasticIterativeScheduler())
    for pipe in (ctm, heun, consistency):
        pipe.set_progress_bar_config(disable=True)
    batch = config.sampling_batch_size
    sample = torch.randn(batch, 3, config.resolution, config.resolution, device=device)
    time_of = torch.full((batch,), 1.0, device=device)

    @torch.no_grad()
    def bare():
        return network(sample, time_of, 0.5 * time_of, return_dict=False)[0]

    calls = {
        "bare network, 1 evaluation": (bare, 1),
        "CTMPipeline, 1 step": (lambda: ctm(batch_size=batch, output_type="pt"), 1),
        "ConsistencyModelPipeline, 1 step": (lambda: consistency(batch_size=batch, output_type="pt"), 1),
        "CTMPipeline, 4 steps, gamma 0.5": (
            lambda: ctm(batch_size=batch, num_inference_steps=4, gamma=0.5, output_type="pt"),
            4,
        ),
        "CTMPipeline, Heun, 18 steps": (
            lambda: heun(batch_size=batch, num_inference_steps=18, output_type="pt"),
            35,
        ),
    }
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=config.mixed_precision == "bf16")
    found = {name: [] for name in calls}
    repeats = 3
    with autocast, tqdm(total=config.rounds + 1, desc="Sampling", unit="round") as progress:
        for round_number in range(config.rounds + 1):
            spent = dict.fromkeys(calls, 0.0)
            for repeat in range(repeats):
                names = list(calls) if repeat % 2 else list(calls)[::-1]
                for name in names:
                    if calls[name][1] <= 4 or repeat == 0:
                        spent[name] += seconds_of(calls[name][0], device)
            if round_number > 0:  # the first warms up
                for name, (_, evaluations) in calls.items():
                    found[name].append(spent[name] / (repeats if evaluations <= 4 else 1))
            progress.update()

    def ratio(over: str, under: str, evaluations: int = 1) -> dict:
        return summarise([a / (evaluations * b) for a, b in zip(found[over], found[under])])

    names = list(calls)
    return {
        "batch_size": batch,
        "ratios": {
            "CTMPipeline in 1 step over its network evaluation": ratio(names[1], names[0]),
            "CTMPipeline in 4 steps at gamma 0.5 over its 4 network evaluations": ratio(names[3], names[0], 4),
            "CTMPipeline in 1 step over diffusers' ConsistencyModelPipeline in 1 step, same network": ratio(
                names[1], names[2]
            ),
            "18 Heun steps (35 evaluations) over CTMPipeline in 1 step": ratio(names[4], names[1]),
        },
        "seconds": {name: summarise(values) for name, values in found.items()},
    }


# Scaling ------------------------------------------------------------------------------------------------------------


def measure_scaling(config: BenchmarkConfig, device: torch.device) -> dict:
    """Images per second of our exact step by batch and resolution, relative to the first, and of 1 and 2 processes of the real program."""

    def images_per_second(batch: int, resolution: int) -> float:
        small = BenchmarkConfig(**{**asdict(config), "batch_size": batch, "resolution": resolution, "strata": 2})
        problem = Problem(small, device)
        step, strata = training_variants()["exact"], problem.strata()
        spent = 0.0
        for seed, k in enumerate([strata[-1], *strata]):
            values = problem.inputs(seed)
            with restored(problem):
                taken = seconds_of(functools.partial(step, problem, k, seed, values), device)
            spent += taken if seed else 0.0  # the first warms up
        return batch * len(strata) / spent

    batches = [config.batch_size // 2 * factor for factor in (1, 2, 4)]
    batches = [max(4, batch // 4 * 4) for batch in batches]
    resolutions = [config.resolution // 2, config.resolution]
    rows = {}
    with tqdm(total=len(batches) + len(resolutions), desc="Scaling", unit="setting") as progress:
        for batch in batches:
            rows[f"batch {batch}, {config.resolution}x{config.resolution}"] = images_per_second(
                batch, config.resolution
            )
            progress.update()
        for resolution in resolutions:
            rows[f"batch {config.batch_size}, {resolution}x{resolution}"] = images_per_second(
                config.batch_size, resolution
            )
            progress.update()
    report = {"images_per_second": rows}
    if device.type == "cpu":
        report["processes"] = {
            str(count): processes_images_per_second(count) for count in (1, 2) if count <= (os.cpu_count() or 1)
        }
    return report


def processes_images_per_second(count: int, steps: int = 12) -> float:
    """Images per second of `worker` in `count` processes of one thread that share batches of 32 digits."""
    command = [
        "torch.distributed.run",
        "--standalone",
        "--nproc_per_node",
        str(count),
        "-m",
        "training.benchmark",
        "--worker",
    ]
    environment = {**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-m", *command, str(steps)], env=environment, capture_output=True, text=True)
    line = next((line for line in done.stdout.splitlines() if line.startswith("images per second: ")), None)
    if done.returncode or line is None:
        raise UserError(f"--parts scaling: the measurement in {count} process(es) failed:\n{done.stderr}")
    return float(line.rpartition(" ")[2])


def step_times(options: dict, steps: int, clock: Callable[[], float] = time.perf_counter) -> list[float]:
    """When each of `steps` iterations of `training.train_ctm` with `options` ended, by `clock`. Writes to a folder that is removed."""
    marks = []

    class Noting(run.TrainingRun):
        def _after_step(self, *args):
            marks.append(clock())
            super()._after_step(*args)

    quiet = {"sample_every": 0, "checkpointing_steps": 0, "report_to": "none", "resume_from_checkpoint": None}
    with tempfile.TemporaryDirectory() as folder, unittest.mock.patch.object(train_ctm, "TrainingRun", Noting):
        place = {"output_dir": os.path.join(folder, "run"), "max_train_steps": steps}
        train_ctm.main(CTMConfig(**{**options, **quiet, **place}))
    return marks


def worker(steps: int) -> None:
    """One of the processes: the program itself on the embedded teacher, `steps` steps after as many to warm up."""
    options = {"teacher": "assets/digits-edm", "label_column": "label", "num_train_timesteps": 9}
    marks = step_times({**options, "train_batch_size": 32 // int(os.environ.get("WORLD_SIZE", 1))}, 2 * steps)
    if int(os.environ.get("RANK", 0)) == 0:
        print(f"images per second: {32 * steps / (marks[-1] - marks[steps - 1])}")


# Report -------------------------------------------------------------------------------------------------------------


def spread(values: dict, digits: int = 3) -> str:
    return f"{values['mean']:.{digits}f}" + (f" ± {values['std']:.{digits}f}" if values["std"] is not None else "")


def step_table(training: dict) -> list[str]:
    """The lines of a table of steps, and how far both results are apart."""
    lines = [
        "| step | time over plain | teacher forward | student forward | average forward, with graph | backward through student, average | peak memory |",
        "|---|--:|--:|--:|--:|--:|--:|",
    ]
    for name, row in training["variants"].items():
        teacher, student, average = (row["images"][kind] for kind in ("teacher", "student", "average"))
        memory = "-" if row["peak_memory"] is None else f"{row['peak_memory'] / 2**20:.0f} MiB"
        lines.append(
            f"| {name} | {spread(row['ratio'])} | {teacher['without_graph']:.2f} | {student['with_graph'] + student['without_graph']:.2f} "
            f"| {average['without_graph']:.2f} + {average['with_graph']:.2f} | {student['backward']:.2f}, {average['backward']:.2f} | {memory} |"
        )
    difference = training["difference"]
    return [
        *lines,
        "",
        f"- The exact step's losses differ from the plain one's by {difference['losses']:.1e}, its gradients by {difference['gradients']:.1e} of the largest.",
        "",
    ]


def markdown(report: dict) -> str:
    options, lines = report["options"], []
    if "training" in report:
        training = report["training"]
        lines += [
            f"Training step: DDPM++ with {options['channels']} channels at {options['resolution']}x{options['resolution']}, batch "
            f"{options['batch_size']}, N = {options['num_train_timesteps']}, k = {', '.join(map(str, training['solver_steps']))}. The plain step "
            "computes everything in the order of the authors' loop. Images are those of the batch, per image of it:",
            "",
            *step_table(training),
        ]
    if "adversarial" in report:
        features = {name: row["images"]["features"] for name, row in report["adversarial"]["variants"].items()}
        each = (
            f"{name} {count['without_graph'] + count['with_graph']:.2f} forward, {count['backward']:.2f} backward"
            for name, count in features.items()
        )
        lines += [
            "Of the adversarial stage a turn of the student and one of the discriminator, on the features of the small embedded classifier:",
            "",
            *step_table(report["adversarial"])[:-1],
            f"- Through the feature network: {'; '.join(each)}.",
            "",
        ]
    if "sampling" in report:
        lines += [
            f"Sampling, batch {report['sampling']['batch_size']}:",
            "",
            "| ratio of times | |",
            "|---|--:|",
        ]
        lines += [f"| {name} | {spread(values)} |" for name, values in report["sampling"]["ratios"].items()] + [""]
    if "scaling" in report:
        rows = report["scaling"]["images_per_second"]
        first = next(iter(rows.values()))
        lines += ["Scaling of the exact step:", "", "| setting | images per second, over the first |", "|---|--:|"]
        lines += [f"| {name} | {value / first:.2f} |" for name, value in rows.items()]
        processes = report["scaling"].get("processes", {})
        lines += [
            f"| digits, batch 32, {count} process{'es' if count != '1' else ''} over 1 | {value / processes['1']:.2f} |"
            for count, value in processes.items()
        ]
        lines.append("")
    words = report["hardware"]
    lines.append(
        f"Ratios: mean ± standard deviation of {options['rounds']} rounds, both sides in turn, on {words['device']}, {words['cpu_threads']} thread(s), "
        f"mixed precision {options['mixed_precision']}{', compiled' if options['compile'] else ''}, torch {torch.__version__}."
    )
    return "\n".join(lines) + "\n"


def main(config: BenchmarkConfig) -> dict:
    """Measure, write benchmark.json and benchmark.md, print the tables; return what benchmark.json holds."""
    torch.set_num_threads(config.threads)
    device = choose_device(config.device)
    report = {"options": asdict(config), "hardware": hardware(device)}
    measures = {
        "training": measure_training,
        "adversarial": functools.partial(measure_training, adversarial=True),
        "sampling": measure_sampling,
        "scaling": measure_scaling,
    }
    for part, measure in measures.items():
        if part not in config.parts:
            continue
        report[part] = measure(config, device)
        text = markdown(report)  # after each part: what is measured is kept
        files = {"benchmark.json": json.dumps(report, indent=1) + "\n", "benchmark.md": text}
        write_files(config.output_dir, {name: content.encode() for name, content in files.items()})
    print(f"\n{text}")
    return report


if __name__ == "__main__":
    if sys.argv[1:2] == ["--worker"]:
        worker(int(sys.argv[2]))
    else:
        run_program(main, BenchmarkConfig)
