"""Shapes of published curves that the simulator has to keep, and pages that tell what their commands found."""

from __future__ import annotations

import json
from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks import hybrimoe, residency
from traces import store
from traces.fit import fit
from traces.shipped import find_trace

ROOT = Path(__file__).parent.parent
SHARES = (0, 10, 50, 90, 100)


def slopes(curve: Mapping[int, float]) -> dict[tuple[int, int], float]:
    """Tokens a second for a percent more of the experts, between the shares that are published."""
    return {(low, high): (curve[high] - curve[low]) / (high - low) for low, high in pairwise(SHARES)}


def check_uniform(curve: Mapping[int, float]) -> None:
    """It rises everywhere, is convex from 10 % on, and steepest at its end by far."""
    steps = slopes(curve)
    assert min(steps.values()) > 0
    assert steps[10, 50] < steps[50, 90] < steps[90, 100]
    assert steps[90, 100] > 1.5 * max(slope for step, slope in steps.items() if step != (90, 100))


def check_frequency(curve: Mapping[int, float], uniform: Mapping[int, float]) -> None:
    """It rises everywhere, is never below the even set, and gains less than that at its end."""
    steps = slopes(curve)
    assert min(steps.values()) > 0
    assert steps[10, 50] < steps[50, 90]
    assert all(curve[share] >= uniform[share] for share in SHARES)
    assert steps[90, 100] < slopes(uniform)[90, 100]


def test_the_published_curves_have_the_shapes_that_are_asked_for() -> None:
    check_uniform(residency.PUBLISHED["uniform"])
    check_frequency(residency.PUBLISHED["frequency"], residency.PUBLISHED["uniform"])


@pytest.mark.slow
def test_ktransformers_gains_with_every_further_expert_on_the_gpu_as_published() -> None:
    law = fit(store.load(find_trace("mixed")), np.random.default_rng(0))
    curves = residency.simulated(law, 1, residency.PROGRAMS["compiled"], SHARES)
    check_uniform(curves["uniform"])
    check_frequency(curves["frequency"], curves["uniform"])
    assert curves["frequency"][0] == curves["uniform"][0]  # no set, no difference


@pytest.mark.parametrize("benchmark", [hybrimoe, residency])
def test_the_figures_of_the_page_are_those_of_the_committed_results(benchmark: Any) -> None:
    name = benchmark.__name__.rpartition(".")[2]
    figures = json.loads((ROOT / "analysis" / "results" / "published" / f"{name}.json").read_text(encoding="utf-8"))
    page = (ROOT / "docs" / "hybrimoe.md").read_text(encoding="utf-8")
    assert f"```text\n{benchmark.shown(figures)}\n```" in page
