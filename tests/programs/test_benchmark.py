"""The benchmark's two training steps do the same mathematics, and it counts what they do."""

import functools
import json

import pytest
import torch

from training import benchmark
from training.benchmark import BenchmarkConfig
from training.cli.errors import UserError
from training.studies import steps
from training.studies.steps import Problem


TINY = {"resolution": 8, "batch_size": 4, "num_train_timesteps": 5, "strata": 2, "rounds": 1, "device": "cpu"}


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def test_exact_step_is_the_plain_one_and_less_work(tmp_path, threads):
    config = BenchmarkConfig(parts=["training"], output_dir=str(tmp_path), **TINY)
    report = benchmark.main(config)["training"]
    assert report["difference"]["losses"] < 1e-5 and report["difference"]["gradients"] < 1e-5
    # P(k) ~ k on k = 1..4: the middles of two halves of the probability
    assert report["solver_steps"] == [2, 4]
    images = {name: row["images"] for name, row in report["variants"].items()}
    teacher = {name: counts["teacher"]["without_graph"] for name, counts in images.items()}
    assert teacher == {"plain": 6, "exact": 6, "--solver unipc": 4, "--solver dpm": 3, "--solver unipc --triples_per_path 4": 1}  # fmt: skip
    plain, exact = images["plain"], images["exact"]
    assert plain["student"] == {"without_graph": 0, "with_graph": 2, "backward": 2} == exact["student"]
    assert plain["average"] == {"without_graph": 2, "with_graph": 1, "backward": 2}
    assert exact["average"]["backward"] == exact["average"]["with_graph"] < 1
    assert exact["average"]["without_graph"] < 2
    written = json.loads((tmp_path / "benchmark.json").read_text())
    assert written["training"]["variants"]["plain"]["ratio"]["mean"] == 1
    assert "| exact |" in (tmp_path / "benchmark.md").read_text()


def test_exact_turns_of_the_adversarial_stage_are_the_plain_ones_and_less_work(tmp_path, threads):
    config = BenchmarkConfig(parts=["adversarial"], output_dir=str(tmp_path), **{**TINY, "strata": 1})
    report = benchmark.main(config)["adversarial"]
    assert report["difference"]["losses"] < 1e-5 and report["difference"]["gradients"] < 1e-5
    plain, exact = (report["variants"][name]["images"] for name in ("plain", "exact"))
    # The student's turn: both losses; the discriminator's: its fake, with a graph for nobody.
    assert plain["student"] == {"without_graph": 0, "with_graph": 3, "backward": 2}
    assert exact["student"] == {"without_graph": 1, "with_graph": 2, "backward": 2}
    # For each of two weights a pass of either loss that goes through the average, but score matching does not; and one for the update.
    assert plain["average"] == {"without_graph": 2, "with_graph": 2, "backward": 4}
    assert 0 < exact["average"]["backward"] == 2 * exact["average"]["with_graph"] < 2
    assert exact["average"]["without_graph"] < 3
    assert plain["features"] == {"without_graph": 2, "with_graph": 1, "backward": 2}
    assert exact["features"] == {"without_graph": 2, "with_graph": 1, "backward": 1}
    text = (tmp_path / "benchmark.md").read_text()
    assert "| exact |" in text and "plain 3.00 forward, 2.00 backward; exact 3.00 forward, 1.00 backward" in text
    problem = Problem(config, torch.device("cpu"), adversarial=True)
    before = {name: value.clone() for name, value in problem.judge.state_dict().items()}
    with benchmark.restored(problem):
        benchmark.adversarial_variants()["plain"](problem, 2, 0, problem.inputs(0))
        assert any(not torch.equal(value, before[name]) for name, value in problem.judge.state_dict().items())
    assert all(torch.equal(value, before[name]) for name, value in problem.judge.state_dict().items())


def test_networks_are_compiled_as_the_program_compiles_them(monkeypatch):
    """torch.compile alone frees what the second of two backward passes through a graph reads, and ends with an error there."""
    compiled = []
    monkeypatch.setattr(steps, "compile_network", compiled.append)
    problem = Problem(BenchmarkConfig(compile=True, **TINY), torch.device("cpu"))
    assert compiled == [problem.student, problem.target.module, problem.teacher] == list(problem.call.values())


def test_a_step_leaves_the_networks_as_they_were():
    problem = Problem(BenchmarkConfig(**TINY), torch.device("cpu"))
    before = {name: value.clone() for name, value in problem.student.state_dict().items()}
    with benchmark.restored(problem):
        benchmark.training_variants()["exact"](problem, 2, 0, problem.inputs(0))
        assert any(not torch.equal(value, before[name]) for name, value in problem.student.state_dict().items())
    assert all(torch.equal(value, before[name]) for name, value in problem.student.state_dict().items())


def test_sampling_ratios(tmp_path, threads):
    config = BenchmarkConfig(parts=["sampling"], output_dir=str(tmp_path), sampling_batch_size=2, **TINY)
    ratios = benchmark.main(config)["sampling"]["ratios"]
    assert len(ratios) == 4 and all(values["mean"] > 0 for values in ratios.values())
    heun = next(values["mean"] for name, values in ratios.items() if name.startswith("18 Heun"))
    assert heun > 5  # 35 evaluations against one


@pytest.mark.slow
def test_scaling_and_a_process_of_the_real_program(tmp_path, threads, monkeypatch):
    monkeypatch.setattr(benchmark.os, "cpu_count", lambda: 1)
    monkeypatch.setattr(
        benchmark, "processes_images_per_second", functools.partial(benchmark.processes_images_per_second, steps=1)
    )
    config = BenchmarkConfig(parts=["scaling"], output_dir=str(tmp_path), **TINY)
    report = benchmark.main(config)["scaling"]
    assert list(report["processes"]) == ["1"] and report["processes"]["1"] > 0
    assert all(value > 0 for value in report["images_per_second"].values())
    assert "digits, batch 32, 1 process over 1 | 1.00 |" in (tmp_path / "benchmark.md").read_text()


@pytest.mark.parametrize(
    "options, message",
    [
        ({"parts": ["speed"]}, "--parts must be some of"),
        ({"batch_size": 6}, "--batch_size must be a multiple of 4"),
        ({"channels": 24}, "--channels must be a multiple of 16"),
        ({"num_train_timesteps": 6}, "--num_train_timesteps must be above --strata"),
    ],
)
def test_impossible_options(options, message):
    with pytest.raises(UserError, match=message):
        BenchmarkConfig(**options)
