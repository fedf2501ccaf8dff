# Copyright 2026 The diffusers-ctm authors. Licensed under the Apache License, Version 2.0.
"""Measure the cost of training and sampling as ratios, both sides in one run: `python -m training.benchmark`."""

import statistics
from collections.abc import Callable
from dataclasses import dataclass

import torch
from diffusers import CMStochasticIterativeScheduler, ConsistencyModelPipeline, UNet2DModel
from tqdm.auto import tqdm

from diffusers_ctm import CTMPipeline, CTMScheduler, CTMUNet2DModel, EDMHeunScheduler

from .cli.device import choose_device
from .cli.options import POSITIVE, Checked, option, run_program
from .measure.reports import facts, write_report
from .report.numbers import cell, summary
from .report.tables import markdown_table
from .studies.meters import Counter, peak_memory, seconds_of
from .studies.steps import ADVERSARIAL, TRAINING, PooledStep, Problem, Step, restored, same_result


PARTS = ("training", "adversarial", "sampling")

BARE, HEUN = "bare network, 1 evaluation", "CTMPipeline, Heun, 18 steps"


@dataclass
class BenchmarkConfig(Checked):
    """Measure ratios of time: our training step to one in the authors' order, and the pipeline to its network.

    Both sides of a ratio run alternately in this process, with the same networks, images and times. Times in seconds
    are those of this machine and of these small networks; only ratios say something about others.
    """

    config: str | None = option(None, "YAML file with any of these options; the command line overrides it.")
    output_dir: str = option("runs/benchmark", "Folder for benchmark.json and benchmark.md.")
    parts: list[str] = option(
        list(PARTS),
        f"The parts to measure, of {', '.join(PARTS)}.",
        must_be=(f"some of {', '.join(PARTS)}", lambda part: part in PARTS),
    )
    channels: int = option(
        16,
        "Channels of the network, EDM's DDPM++ for CIFAR-10: 128 there, 16 fits a CPU core.",
        must_be=("a multiple of 16", lambda channels: channels > 0 and channels % 16 == 0),
    )
    resolution: int = option(
        32,
        "Height and width of the images.",
        must_be=("a multiple of 4", lambda resolution: resolution > 0 and resolution % 4 == 0),
    )
    batch_size: int = option(8, "Images of a training step.", must_be=POSITIVE)
    num_train_timesteps: int = option(18, "Noise levels N of the grid; the solver takes up to N - 1 steps.")
    rounds: int = option(3, "Measurements of each ratio; its spread is theirs.", must_be=POSITIVE)
    strata: int = option(
        6,
        "Training steps in a round: their numbers k of solver steps stand for as many equally probable parts of P(k).",
        must_be=POSITIVE,
    )
    sampling_batch_size: int = option(
        64, "Images of a sampling call; calls for one image are measured too.", must_be=POSITIVE
    )
    sampling_calls: int = option(
        80,
        "Sampling calls of each kind in a round, whose median counts; a tenth of them in 18 Heun steps.",
        must_be=POSITIVE,
    )
    threads: int = option(1, "CPU threads. Times with more threads are noisy.", must_be=POSITIVE)
    device: str = option("auto", "'cpu', 'cuda', ..., or 'auto': a GPU if there is one.")
    mixed_precision: str = option("no", "'no' or 'bf16' (autocast).", ["no", "bf16"])
    compile: bool = option(False, "Compile the networks with torch.compile.")

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check(self.num_train_timesteps > self.strata, "num_train_timesteps", "above --strata")

    def autocast(self, device: torch.device) -> torch.autocast:
        return torch.autocast(device.type, torch.bfloat16, enabled=self.mixed_precision == "bf16")


# Training -------------------------------------------------------------------------------------------------------------


def measure_training(config: BenchmarkConfig, device: torch.device, steps: dict[str, Step]) -> dict:
    """The time of each step over that of the plain one, its passes through the networks, and its memory."""
    problem = Problem(
        config.channels,
        config.resolution,
        config.batch_size,
        config.num_train_timesteps,
        device,
        adversarial=steps is ADVERSARIAL,
        compile=config.compile,
    )
    strata = problem.strata(config.strata)
    difference = same_result(problem, steps, strata[0])

    def run(name: str, k: int, seed: int, meter: Callable = lambda step: step()):
        inputs = problem.inputs(k, seed)
        with restored(problem), config.autocast(device):
            return meter(lambda: steps[name](problem, *inputs))

    for name in steps:  # once for caches, compilation and the allocator
        run(name, strata[-1], 0)
    seconds = {name: [] for name in steps}
    pooled = [name for name, step in steps.items() if isinstance(step, PooledStep)]
    for round_number in tqdm(
        range(config.rounds), desc="Adversarial steps" if problem.adversarial else "Training steps", unit="round"
    ):
        spent = dict.fromkeys(steps, 0.0)
        for number, k in enumerate(strata):
            names = list(steps) if (round_number + number) % 2 else list(steps)[::-1]
            for name in names:
                spent[name] += run(name, k, 100 * round_number + number, lambda step: seconds_of(step, device))
        for name in steps:
            seconds[name].append(spent[name] / len(strata))
        if pooled:  # each step's share of the refreshes
            with config.autocast(device):
                share = seconds_of(problem.refresh_pool, device) / problem.pool.options.pool_refresh
            for name in pooled:
                seconds[name][-1] += share
    rows = {}
    for name in steps:
        counts = count_passes(problem, lambda name=name: [run(name, k, seed) for seed, k in enumerate(strata)])
        images = len(strata) * config.batch_size
        if name in pooled:
            refresh = count_passes(problem, problem.refresh_pool)["teacher"]["without_graph"]
            counts["teacher"]["without_graph"] += refresh * len(strata) / problem.pool.options.pool_refresh
        rows[name] = {
            "images": {kind: {way: n / images for way, n in ways.items()} for kind, ways in counts.items()},
            "peak_memory": peak_memory(lambda name=name: run(name, strata[-1], 0), device),
            "ratio": summary([a / b for a, b in zip(seconds[name], seconds["plain"])]),
            "seconds_per_step": summary(seconds[name]),
        }
    return {"difference": difference, "solver_steps": strata, "variants": rows}


def count_passes(problem: Problem, run: Callable[[], object]) -> dict[str, dict[str, int]]:
    """The images that pass each network during `run`."""
    networks = {"teacher": problem.teacher, "student": problem.student, "average": problem.target.module}
    counters = {kind: Counter(network, network.conv_in) for kind, network in networks.items()}
    if problem.adversarial:
        features = problem.judge.backbones["digits"]
        counters["features"] = Counter(features, features.body[0])
    with torch.compiler.set_stance("force_eager"):  # where hooks are called one by one
        run()
    return {kind: counter.close() for kind, counter in counters.items()}


# Sampling -------------------------------------------------------------------------------------------------------------


def small_network() -> CTMUNet2DModel:
    """A network of the shapes of the digits', 0.88 M parameters and images of 8x8, with random weights."""
    torch.manual_seed(0)
    return CTMUNet2DModel.from_unet(
        UNet2DModel(
            sample_size=8,
            in_channels=1,
            out_channels=1,
            layers_per_block=1,
            block_out_channels=(32, 64),
            down_block_types=("DownBlock2D", "AttnDownBlock2D"),
            up_block_types=("AttnUpBlock2D", "UpBlock2D"),
            norm_num_groups=8,
            attention_head_dim=32,
            resnet_time_scale_shift="scale_shift",
            num_class_embeds=10,
        )
    )


def sampling_calls(device: torch.device, batch_size: int) -> dict[str, Callable]:
    """The calls that are compared, by name, on one small network."""
    network = small_network().to(device).eval()
    ctm, heun = CTMPipeline(network, CTMScheduler()), CTMPipeline(network, EDMHeunScheduler())
    consistency = ConsistencyModelPipeline(network, CMStochasticIterativeScheduler())
    for pipe in (ctm, heun, consistency):
        pipe.set_progress_bar_config(disable=True)
    sample, time = torch.randn(batch_size, 1, 8, 8, device=device), torch.ones(batch_size, device=device)
    labels = [k % 10 for k in range(batch_size)]
    condition = {"class_labels": torch.tensor(labels, device=device)}
    options = {"batch_size": batch_size, "class_labels": labels, "output_type": "pt"}

    @torch.no_grad()
    def bare():
        return network(sample, time, 0.5 * time, **condition, return_dict=False)[0]

    return {
        BARE: bare,
        "CTMPipeline, 1 step": lambda: ctm(**options),
        "ConsistencyModelPipeline, 1 step": lambda: consistency(**options),
        "CTMPipeline, 4 steps, gamma 0.5": lambda: ctm(num_inference_steps=4, gamma=0.5, **options),
        HEUN: lambda: heun(num_inference_steps=18, **options),
    }


def measure_sampling(config: BenchmarkConfig, device: torch.device) -> dict[str, dict]:
    """Ratios of time for one image, and for a batch of `--sampling_batch_size`, by "batch B".

    CTMPipeline to the network calls that it makes and to diffusers' pipeline of consistency models, and 18 Heun steps
    of the teacher to one step. The ratio of a round is that of the medians of its calls.
    """
    report = {}
    for batch_size in sorted({1, config.sampling_batch_size}):
        calls = sampling_calls(device, batch_size)
        rounds = {name: [] for name in calls}
        with config.autocast(device):
            for call in calls.values():  # once for caches, threads and the allocator
                call()
            for _ in tqdm(range(config.rounds), desc=f"Sampling, batch {batch_size}", unit="round"):
                spent = {name: [] for name in calls}
                for repeat in range(config.sampling_calls):
                    for name in list(calls) if repeat % 2 else list(calls)[::-1]:
                        if name != HEUN or repeat % 10 == 0:
                            spent[name].append(seconds_of(calls[name], device))
                for name, values in spent.items():
                    rounds[name].append(statistics.median(values))
        report[f"batch {batch_size}"] = {
            "ratios": sampling_ratios(rounds),
            "seconds": {name: summary(values) for name, values in rounds.items()},
        }
    return report


def sampling_ratios(rounds: dict[str, list[float]]) -> dict[str, dict]:
    """The ratios of the report, from the median seconds of each call in each round."""
    bare, one, consistency, four, heun = rounds.values()

    def ratio(over: list[float], under: list[float], evaluations: int = 1) -> dict:
        return summary([a / (evaluations * b) for a, b in zip(over, under)])

    return {
        "CTMPipeline in 1 step over its network evaluation": ratio(one, bare),
        "CTMPipeline in 4 steps at gamma 0.5 over its 4 network evaluations": ratio(four, bare, 4),
        "CTMPipeline in 1 step over diffusers' ConsistencyModelPipeline in 1 step, same network": ratio(
            one, consistency
        ),
        "18 Heun steps (35 evaluations) over CTMPipeline in 1 step": ratio(heun, one),
    }


# Report ---------------------------------------------------------------------------------------------------------------


def step_table(training: dict) -> list[str]:
    """The lines of a table of steps, and of the difference between the results of both sides."""
    head = ["step", "time over plain", "teacher forward", "student forward", "average forward, with graph"]
    head += ["backward through student, average", "peak memory"]
    rows = []
    for name, row in training["variants"].items():
        teacher, student, average = (row["images"][kind] for kind in ("teacher", "student", "average"))
        cells = [
            name,
            cell(row["ratio"]),
            f"{teacher['without_graph']:.2f}",
            f"{student['with_graph'] + student['without_graph']:.2f}",
            f"{average['without_graph']:.2f} + {average['with_graph']:.2f}",
            f"{student['backward']:.2f}, {average['backward']:.2f}",
            "-" if row["peak_memory"] is None else f"{row['peak_memory'] / 2**20:.0f} MiB",
        ]
        rows.append(cells)
    return [
        *markdown_table(head, rows),
        "",
        f"- The exact step's losses differ from the plain one's by {training['difference']['losses']:.1e}, "
        f"its gradients by {training['difference']['gradients']:.1e} of the largest.",
    ]


def markdown(report: dict) -> str:
    """benchmark.md."""
    options, lines = report["options"], []
    if "training" in report:
        training, side = report["training"], options["resolution"]
        lines += [
            f"Training step: DDPM++ with {options['channels']} channels at {side}x{side}, "
            f"batch {options['batch_size']}, N = {options['num_train_timesteps']}, "
            f"k = {', '.join(map(str, training['solver_steps']))}. The plain step computes everything in the authors' "
            "order. The columns of passes count images per image of the batch:",
            "",
            *step_table(training),
            "",
        ]
    if "adversarial" in report:
        counts = {name: row["images"]["features"] for name, row in report["adversarial"]["variants"].items()}
        passes = [
            f"{name} {count['without_graph'] + count['with_graph']:.2f} forward, {count['backward']:.2f} backward"
            for name, count in counts.items()
        ]
        lines += [
            "In the adversarial stage, a turn of the student and one of the discriminator, on the features of the "
            "embedded classifier:",
            "",
            *step_table(report["adversarial"]),
            f"- Through the feature network: {'; '.join(passes)}.",
            "",
        ]
    if "sampling" in report:
        sampling = report["sampling"]
        names = next(iter(sampling.values()))["ratios"]
        rows = [[name, *(cell(part["ratios"][name]) for part in sampling.values())] for name in names]
        lines += [
            "Sampling, a network as small as that of the digits, images as tensors:",
            "",
            *markdown_table(["ratio of times", *sampling], rows),
            "",
        ]
    lines.append(
        f"Ratios: mean ± standard deviation of {options['rounds']} rounds, both sides in turn, on "
        f"{report['hardware']['device']}, {report['hardware']['cpu_threads']} thread(s), "
        f"mixed precision {options['mixed_precision']}"
        f"{', compiled' if options['compile'] else ''}, torch {report['versions']['torch']}."
    )
    return "\n".join(lines) + "\n"


def main(config: BenchmarkConfig) -> dict:
    """Measure, write benchmark.json and benchmark.md, and print the tables; return the content of benchmark.json."""
    torch.set_num_threads(config.threads)
    device = choose_device(config.device)
    report = facts(config, device)
    measures = {
        "training": lambda: measure_training(config, device, TRAINING),
        "adversarial": lambda: measure_training(config, device, ADVERSARIAL),
        "sampling": lambda: measure_sampling(config, device),
    }
    for part, measure in measures.items():
        if part in config.parts:
            report[part] = measure()
            write_report(config.output_dir, "benchmark", report)  # a later part may fail
    write_report(config.output_dir, "benchmark", report, markdown(report))
    return report


if __name__ == "__main__":
    run_program(main, BenchmarkConfig)
