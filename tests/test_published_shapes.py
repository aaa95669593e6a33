"""Shapes of published curves that the simulator has to keep."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from benchmarks import hybrimoe, residency

ROOT = Path(__file__).parent.parent


@pytest.mark.slow
def test_ktransformers_gains_more_from_every_further_expert_on_the_gpu() -> None:
    curves = residency.simulated(1, residency.PROGRAMS["compiled"])
    for curve in curves.values():
        slopes = [(y2 - y1) / (x2 - x1) for (x1, y1), (x2, y2) in pairwise(sorted(curve.items()))]
        assert slopes == sorted(slopes)
    assert all(curves["frequency"][share] >= curves["uniform"][share] for share in residency.SHARES)


@pytest.mark.parametrize("benchmark", [hybrimoe, residency])
def test_the_figures_of_the_page_are_those_of_the_committed_results(benchmark: Any) -> None:
    name = benchmark.__name__.rpartition(".")[2]
    figures = json.loads((ROOT / "analysis" / "results" / "published" / f"{name}.json").read_text(encoding="utf-8"))
    page = (ROOT / "docs" / "hybrimoe.md").read_text(encoding="utf-8")
    assert f"```text\n{benchmark.shown(figures)}\n```" in page
