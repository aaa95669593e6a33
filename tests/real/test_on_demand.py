"""A system that keeps nothing, on both clocks: every expert passes through the staging slots, and none is a hit."""

from __future__ import annotations

from collections.abc import Iterator

import pandas as pd
import pytest

from real.decode import Machine, replay
from real.record import Collector
from real.routing import RouterTap
from sim.presets import preset
from sim.run import simulate
from sim.systems import Budget
from tests.real import tiny
from tests.real.running import COSTS, DEVICES, PROMPTS, assert_near, decoded, follow, machine_on, plain
from traces.workload import lock_step

ON_DEMAND = preset("on-demand")


@pytest.fixture(scope="module", params=DEVICES)
def machine(request: pytest.FixtureRequest) -> Iterator[Machine]:
    with machine_on(request.param) as machine:
        yield machine


@pytest.mark.parametrize("lanes", [1, 3])
def test_it_decodes_what_the_plain_model_decodes_without_a_hit(machine: Machine, lanes: int) -> None:
    tokens, logits = plain(machine.device.name, "qwen3_moe", lanes, 6)
    run = decoded(machine, PROMPTS[:lanes], 6, 0, **ON_DEMAND.system.model_dump())
    assert run.tokens == tokens
    assert_near(run.logits, logits)
    assert run.layers.hits_union.sum() == 0
    follow(run.operations, 0)


def test_both_clocks_fetch_every_use(machine: Machine) -> None:
    loaded, tokens = tiny.model(), [[3, 4, 5], [7, 8], [9, 10, 11]]
    collector = Collector(loaded)
    with RouterTap(loaded.layers, collector):
        tiny.logits_of(loaded, PROMPTS, tokens, hooks=collector)
    workload = lock_step(collector.finish(), 1)
    budget = ON_DEMAND.budget(Budget(slots=6), layers=2, experts=8)
    measured = replay(machine, workload, ON_DEMAND.system, budget, COSTS)
    simulated = simulate(workload, ON_DEMAND.system, budget, COSTS, hardware="by hand")
    pd.testing.assert_frame_equal(measured.operations, simulated.operations)
    for run in (measured, simulated):
        assert run.info.capacity_slots == 0
        assert run.info.expert_bytes == loaded.spec.expert_bytes
        assert (run.layers.misses == run.layers.union).all()
        assert run.headline()["misses_fetched"] == run.headline()["misses"] > 0
