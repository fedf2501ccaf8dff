# Copyright 2026 The diffusers-ctm authors. Licensed under the Apache License, Version 2.0.
"""The benchmark's two training steps do the same mathematics, and it counts their passes."""

import json

import pytest
import torch

from diffusers_ctm import CTMUNet2DModel
from helpers.places import ROOT
from training import benchmark
from training.benchmark import BenchmarkConfig
from training.cli.errors import UserError
from training.studies import steps
from training.studies.steps import ADVERSARIAL, TRAINING, Problem


NUMBERS = {"channels": 16, "resolution": 8, "batch_size": 4, "num_train_timesteps": 5}
TINY = {
    **NUMBERS,
    "strata": 1,
    "rounds": 1,
    "device": "cpu",
    "sampling_batch_size": 2,
    "sampling_calls": 2,
    "threads": torch.get_num_threads(),  # of the whole process
}


def test_exact_step_is_the_plain_one_and_less_work(tmp_path):
    config = BenchmarkConfig(parts=["training"], output_dir=str(tmp_path), **TINY)
    report = benchmark.main(config)["training"]
    assert report["difference"]["losses"] < 1e-5 and report["difference"]["gradients"] < 1e-5
    assert report["solver_steps"] == [3]
    images = {name: row["images"] for name, row in report["variants"].items()}
    teacher = {name: counts["teacher"]["without_graph"] for name, counts in images.items()}
    refresh = 2 * 4 / 16  # Heun on 5 levels, once in 16 steps
    pooled = {"--pool_size": refresh, "--objective regression --pool_size": refresh}
    assert teacher == {"plain": 6, "exact": 6, "--solver unipc": 4, "--solver dpm": 3, **pooled}
    regression = images["--objective regression --pool_size"]
    assert regression["student"]["backward"] == 2 and regression["average"] == dict.fromkeys(regression["average"], 0)
    plain, exact = images["plain"], images["exact"]
    assert plain["student"] == {"without_graph": 0, "with_graph": 2, "backward": 2} == exact["student"]
    assert plain["average"] == {"without_graph": 2, "with_graph": 1, "backward": 2}
    assert exact["average"]["backward"] == exact["average"]["with_graph"] < 1
    assert exact["average"]["without_graph"] < 2
    written = json.loads((tmp_path / "benchmark.json").read_text())
    assert written["training"]["variants"]["plain"]["ratio"]["mean"] == 1
    assert "| exact |" in (tmp_path / "benchmark.md").read_text()


def test_exact_turns_of_the_adversarial_stage_are_the_plain_ones_and_less_work(tmp_path):
    config = BenchmarkConfig(parts=["adversarial"], output_dir=str(tmp_path), **TINY)
    report = benchmark.main(config)["adversarial"]
    assert report["difference"]["losses"] < 1e-5 and report["difference"]["gradients"] < 1e-5
    plain, exact = (report["variants"][name]["images"] for name in ("plain", "exact"))
    # The student's turn has both losses; the discriminator's has its fake, with an unused graph on the plain side.
    assert plain["student"] == {"without_graph": 0, "with_graph": 3, "backward": 2}
    assert exact["student"] == {"without_graph": 1, "with_graph": 2, "backward": 2}
    # Each of two weights asks for a pass of either loss, but score matching does not need the average; then the update.
    assert plain["average"] == {"without_graph": 2, "with_graph": 2, "backward": 4}
    assert 0 < exact["average"]["backward"] == 2 * exact["average"]["with_graph"] < 2
    assert exact["average"]["without_graph"] < 3
    assert plain["features"] == {"without_graph": 2, "with_graph": 1, "backward": 2}
    assert exact["features"] == {"without_graph": 2, "with_graph": 1, "backward": 1}
    text = (tmp_path / "benchmark.md").read_text()
    assert "| exact |" in text and "plain 3.00 forward, 2.00 backward; exact 3.00 forward, 1.00 backward" in text


def test_the_problem_compiles_as_the_program_does_and_takes_the_middles_of_strata(monkeypatch):
    """torch.compile alone frees tensors that the second backward pass through a graph reads, which is an error."""
    compiled = []
    monkeypatch.setattr(steps, "compile_network", compiled.append)
    problem = Problem(**NUMBERS, device=torch.device("cpu"), compile=True)
    assert compiled == [problem.student, problem.target.module, problem.teacher]
    assert problem.strata(2) == [2, 4]  # P(k) ~ k on k = 1..4: the middles of two halves of the probability


@pytest.mark.parametrize("step, trained", [(TRAINING["exact"], "student"), (ADVERSARIAL["plain"], "judge")])
def test_a_step_leaves_the_networks_as_they_were(step, trained):
    problem = Problem(**NUMBERS, device=torch.device("cpu"), adversarial=trained == "judge")
    state = getattr(problem, trained).state_dict()
    before = {name: value.clone() for name, value in state.items()}
    with steps.restored(problem):
        step(problem, *problem.inputs(2, 0))
        assert any(not torch.equal(value, before[name]) for name, value in state.items())
    assert all(torch.equal(value, before[name]) for name, value in state.items())


def test_sampling_ratios(tmp_path):
    report = benchmark.main(BenchmarkConfig(parts=["sampling"], output_dir=str(tmp_path), **TINY))
    assert list(report["sampling"]) == ["batch 1", "batch 2"]
    for part in report["sampling"].values():
        ratios = part["ratios"]
        assert len(ratios) == 4 and all(values["mean"] > 0 for values in ratios.values())
        heun = next(values["mean"] for name, values in ratios.items() if name.startswith("18 Heun"))
        assert heun > 5  # 35 evaluations against one
    heading = "| ratio of times | batch 1 | batch 2 |"
    lines = (tmp_path / "benchmark.md").read_text().splitlines()
    table = lines[lines.index(heading) :][:6]
    assert all(line.count("|") == heading.count("|") for line in table[:1] + table[2:])
    alone = BenchmarkConfig(parts=["sampling"], output_dir=str(tmp_path), **{**TINY, "sampling_batch_size": 1})
    assert list(benchmark.main(alone)["sampling"]) == ["batch 1"]


def test_ratios_of_sampling_are_those_of_times():
    bare, one, consistency, four, heun = [1.0, 2.0], [1.2, 2.8], [1.6, 2.8], [4.8, 8.0], [36.0, 70.0]
    calls = (bare, one, consistency, four, heun)
    ratios = benchmark.sampling_ratios({str(k): values for k, values in enumerate(calls)})
    expected = [[1.2, 1.4], [1.2, 1.0], [0.75, 1.0], [30.0, 25.0]]
    for values, numbers in zip(ratios.values(), expected, strict=True):
        assert values["by_seed"] == pytest.approx(numbers)


def test_the_network_of_sampling_is_that_of_the_digits():
    digits = CTMUNet2DModel.load_config(ROOT / "assets" / "digits-ctm" / "unet")
    network = json.loads(benchmark.small_network().to_json_string())
    assert {name: value for name, value in digits.items() if network[name] != value} == {}


@pytest.mark.parametrize(
    "options, message",
    [
        ({"parts": ["speed"]}, "--parts must be some of"),
        ({"channels": 24}, "--channels must be a multiple of 16"),
        ({"num_train_timesteps": 6}, "--num_train_timesteps must be above --strata"),
    ],
)
def test_impossible_options(options, message):
    with pytest.raises(UserError, match=message):
        BenchmarkConfig(**options)
