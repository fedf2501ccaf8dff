# Copyright 2026 The diffusers-ctm authors. Licensed under the Apache License, Version 2.0.
"""The objectives of a run one after the other, and options that none of them reads."""

import pytest

from training.cli.errors import UserError
from training.objective.objectives import OBJECTIVES, ObjectiveOptions
from training.train_ctm import CTMConfig


def test_stages_follow_each_other():
    options = ObjectiveOptions(objective=["regression", "eulerian@600", "ctm@800"])
    assert [options.stage_at(step).name for step in (0, 599, 600, 799, 800, 5000)] == [
        "regression", "regression", "eulerian", "eulerian", "ctm", "ctm"
    ]  # fmt: skip
    assert options.stage_at(600).objective is OBJECTIVES["eulerian"]


@pytest.mark.parametrize(
    "objective",
    [[], ["flow"], ["ctm@5"], ["ctm@"], ["ctm", "regression"], ["ctm", "regression@"], ["ctm", "regression@0"],
     ["ctm", "regression@-3"], ["ctm", "regression@1e3"], ["ctm", "regression@9", "ctm@9"], ["ctm@0", "eulerian@4"]],
    ids=" ".join,
)  # fmt: skip
def test_what_is_no_list_of_stages_is_refused(objective):
    with pytest.raises(
        UserError, match="--objective must be one or several of ctm, regression, .* regression eulerian"
    ):
        ObjectiveOptions(objective=objective)


IDLE = [
    ("regression", {"matching": "local"}),
    ("eulerian", {"inner_target": "live"}),
    ("semigroup", {"max_solver_steps": 3}),
    ("eulerian", {"solver": "dpm"}),
    ("lagrangian", {"pool_size": 8}),
    ("ctm", {"derivative": "jvp"}),
    ("semigroup", {"derivative_step": 0.01}),
    ("lagrangian", {"eulerian_warmup": 0.1}),
    ("eulerian", {"lagrangian_gradient": "full"}),
    ("ctm", {"pool_refresh": 4}),
    ("ctm", {"pool_substeps": 2}),
    ("eulerian", {"pool_from_data": 0.5}),
]


@pytest.mark.parametrize(
    "name, options", IDLE, ids=lambda value: value if isinstance(value, str) else next(iter(value))
)
def test_an_option_that_no_objective_of_the_run_reads_is_refused(name, options):
    (entry,) = options
    with pytest.raises(UserError, match=f"--{entry} "):
        ObjectiveOptions(objective=[name], **options)
    if not entry.startswith("pool_") or entry == "pool_size":  # the others need a pool, not another objective
        reader = {"derivative_step": "eulerian", "derivative": "eulerian", "eulerian_warmup": "eulerian"}.get(
            entry, "ctm"
        )
        reader = "lagrangian" if entry == "lagrangian_gradient" else reader
        assert ObjectiveOptions(objective=[name, f"{reader}@10"], **options).stages[1].name == reader


def test_other_combinations_without_use_are_refused():
    with pytest.raises(UserError, match="--derivative must be difference with --lagrangian_gradient full"):
        ObjectiveOptions(objective=["lagrangian"], lagrangian_gradient="full", derivative="jvp")
    with pytest.raises(UserError, match="--objective must be such that eulerian begins before --max_train_steps 100"):
        CTMConfig(teacher="t", max_train_steps=100, objective=["regression", "eulerian@100"])
    with pytest.raises(UserError, match="--derivative_step must be above 0"):
        ObjectiveOptions(objective=["eulerian"], derivative_step=0.0)
