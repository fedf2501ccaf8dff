"""What training and sampling cost, as ratios measured side by side in one run: `python -m training.benchmark`."""

import functools
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass

import torch
from diffusers import CMStochasticIterativeScheduler, ConsistencyModelPipeline, UNet2DModel
from tqdm.auto import tqdm

from diffusers_ctm import CTMPipeline, CTMScheduler, CTMUNet2DModel, EDMHeunScheduler

from .cli.device import choose_device, hardware
from .cli.errors import UserError
from .cli.files import write_files
from .cli.options import Checked, option, run_program
from .studies.meters import Counter, peak_memory, seconds_of, step_times
from .studies.steps import Problem, adversarial_variants, restored, same_result, training_variants


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
