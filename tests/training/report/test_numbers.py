# Copyright 2026 The diffusers-ctm authors. Licensed under the Apache License, Version 2.0.
"""Numbers as reports show them."""

import pytest

from training.report.numbers import cell, duration, summary


def test_a_summary_has_the_sample_standard_deviation():
    assert summary([1.0, 2.0, 6.0]) == {
        "by_seed": [1.0, 2.0, 6.0], "mean": 3.0, "std": pytest.approx(7**0.5), "min": 1.0, "max": 6.0
    }  # fmt: skip
    assert summary([2.0])["std"] is None


def test_cells():
    assert cell({"mean": 8.304, "std": 0.0521}) == "8.304 ± 0.052"
    assert cell({"mean": -0.01186, "std": 0.000114}) == "-0.01186 ± 0.00011"
    assert cell({"mean": 1234.4, "std": 31.0}) == "1234 ± 31"
    assert cell({"mean": 1.2345, "std": None}) == "1.23"
    assert cell({"mean": 100.0, "std": 6.4e-15}) == "100"
    assert [duration(seconds) for seconds in (2.5, 0.0123, 4.2e-5)] == ["2.5 s", "12.3 ms", "42 µs"]
