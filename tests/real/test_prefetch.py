"""Every prefetch policy on both clocks: the same objects, the same work, whatever has arrived when."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import cache

import numpy as np
import pandas as pd
import pytest

from real.decode import Machine, replay
from sim.policies import PREFETCH
from sim.run import simulate
from sim.systems import Budget, SystemSpec
from tests.real import tiny
from tests.real.running import COSTS, DEVICES, follow, machine_on
from traces.synthetic import Sizes, markov
from traces.workload import Workload, lock_step


@pytest.fixture(scope="module", params=DEVICES)
def machine(request: pytest.FixtureRequest) -> Iterator[Machine]:
    with machine_on(request.param) as machine:
        yield machine


@cache
def workload(batch: int) -> Workload:
    """Three requests with scores and a look-ahead of one layer, which is all that a model of two layers has."""
    sizes = Sizes(
        sequences=3,
        prompt_tokens=5,
        new_tokens=8,
        layers=2,
        experts=8,
        top_k=2,
        expert_bytes=tiny.SPECS["qwen3_moe"].expert_bytes,
        lookahead=1,
        lookahead_recall=0.8,
        scores=True,
    )
    trace = markov(np.random.default_rng(3), sizes, locality=0.4)
    header = trace.header.model_copy(update={"lookahead_router": "residual"})  # which serves all policies
    return lock_step(replace(trace, header=header), batch)


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("name", [*PREFETCH])
def test_every_prefetch_policy_runs_on_both_clocks(machine: Machine, name: str, batch: int) -> None:
    options = {"prefetch": {"depth": 1}} if "depth" in PREFETCH[name].defaults else {}
    system = SystemSpec(prefetch=name, place="hybrimoe", options=options)
    measured = replay(machine, workload(batch), system, Budget(slots=3), COSTS)
    simulated = simulate(workload(batch), system, Budget(slots=3), COSTS, hardware="by hand")
    for run in (measured, simulated):
        layers = run.layers
        assert (layers.hits_union + layers.late_hits + layers.misses == layers.union).all()
        follow(run.operations, 6)
        prefetched = (run.events.kind == "prefetch").sum()
        copies = (run.operations.op == "copy").sum()
        assert copies == prefetched + (run.events.kind == "copy").sum()
        assert prefetched > 0 or name == "none" or batch > 1
        assert name != "none" or not prefetched
    same = ["step", "layer", "phase", "assignments", "union"]
    pd.testing.assert_frame_equal(measured.layers[same], simulated.layers[same])
