"""The host's own share of a layer in simulated time: deciding, and submitting every operation."""

from __future__ import annotations

import numpy as np
import pytest

from sim.run import simulate
from sim.systems import Budget, SystemSpec
from tests.sim.hand import EXPERT_BYTES, HandCosts, host
from traces.synthetic import Sizes, markov
from traces.workload import lock_step


@pytest.mark.parametrize("synchronous", [True, False])
def test_it_is_what_the_costs_charge_for_deciding_and_submitting(synchronous: bool) -> None:
    sizes = Sizes(sequences=2, prompt_tokens=3, new_tokens=4, layers=2, experts=6, top_k=2, expert_bytes=EXPERT_BYTES)
    costs = HandCosts(
        host=host(layer_s=5.0, readback_s=3.0, controller_s=0.5, operation_s=0.25, join_s=7.0, cpu_s=0.125)
    )
    workload = lock_step(markov(np.random.default_rng(1), sizes), 1)
    system = SystemSpec(place="cpu-on-miss", synchronous=synchronous)
    run = simulate(workload, system, Budget(slots=2), costs, hardware="by hand")
    operations = run.operations.groupby(["step", "layer"]).size()
    layers = run.layers.set_index(["step", "layer"])
    on_cpu = 0.125 * (layers.cpu_experts > 0)
    assert 0 < on_cpu.sum() < 0.125 * len(layers)
    assert (layers.python_s == 0.5 + 0.25 * operations.reindex(layers.index) + on_cpu).all()
    assert (layers.python_s <= layers.host_s).all()
