"""Shapes of published curves that the simulator has to keep."""

from __future__ import annotations

from itertools import pairwise

import pytest

from benchmarks import residency


@pytest.mark.slow
def test_ktransformers_gains_more_from_every_further_expert_on_the_gpu() -> None:
    curves = residency.simulated(1, residency.PROGRAMS["compiled"])
    for curve in curves.values():
        slopes = [(y2 - y1) / (x2 - x1) for (x1, y1), (x2, y2) in pairwise(sorted(curve.items()))]
        assert slopes == sorted(slopes)
    assert all(curves["frequency"][share] >= curves["uniform"][share] for share in residency.SHARES)
