"""The defects of HybriMoE's released code, which are not repeated here: each a test that fails where one is.

Every test first holds for our systems, then has the defect put in, and has to notice it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pandas as pd
import pytest
from torch import Tensor

from real.decode import Machine, replay
from real.kernels import OneToken
from sim.cache import ExpertCache, Verdict
from sim.controller import OffloadController
from sim.plan import COPY, CPU, EVICT, GPU, LayerPlan
from sim.policies import EvictionPolicy
from sim.presets import preset
from sim.results import RunResult
from sim.run import simulate
from sim.systems import Budget, SystemSpec
from tests.real import tiny
from tests.real.running import DEVICES, PROMPTS, assert_near, decoded, machine_on, plain
from tests.sim.hand import HandCosts
from traces.schema import Phase
from traces.synthetic import Sizes, zipf
from traces.workload import Routing, Workload, lock_step

TOKENS, EXPERTS = 6, 8
EXPERT_BYTES = tiny.SPECS["qwen3_moe"].expert_bytes
SLOW_CPU = HandCosts(cpu=5.0)
NAMES = ("hybrimoe", "hybrimoe-code")


@pytest.fixture(scope="module", params=DEVICES)
def machine(request: pytest.FixtureRequest) -> Iterator[Machine]:
    with machine_on(request.param) as machine:
        yield machine


def fields_of(name: str, **changes: Any) -> dict[str, Any]:
    """A published system that begins with nothing in its cache."""
    system, _ = preset(name).fitted(calibrated=False, residuals=False)
    return {**system.model_dump(), "starts_with": "", **changes}


def workload(batch: int) -> Workload:
    """Three sequences, whose look-ahead names what is then chosen."""
    shape = {"layers": 2, "experts": EXPERTS, "top_k": 2, "expert_bytes": EXPERT_BYTES}
    ahead = {"lookahead": 1, "lookahead_recall": 1.0, "scores": True}
    sizes = Sizes(sequences=3, prompt_tokens=3, new_tokens=TOKENS, **shape, **ahead)
    return lock_step(zipf(np.random.default_rng(3), sizes), batch)


def measured(machine: Machine, batch: int, slots: int, **system: Any) -> RunResult:
    return replay(machine, workload(batch), SystemSpec(**system), Budget(slots=slots), SLOW_CPU)


def simulated(batch: int, slots: int, **system: Any) -> RunResult:
    return simulate(workload(batch), SystemSpec(**system), Budget(slots=slots), SLOW_CPU, hardware="by hand")


# CPU experts multiplied by another expert's routing weight.


@pytest.mark.parametrize("name", NAMES)
def test_an_expert_on_the_cpu_has_its_own_routing_weight(
    machine: Machine, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokens, logits = plain(machine.device.name, "qwen3_moe", 1, TOKENS)
    run = decoded(machine, PROMPTS[:1], TOKENS, 3, **fields_of(name))
    assert (run.operations[run.operations.op == CPU].step > 0).any()
    assert run.tokens == tokens
    assert_near(run.logits, logits)
    result = OneToken.result

    def of_another(kernel: OneToken) -> Tensor:
        """What the CPU gave comes out with the weight of the token's next expert."""
        weight, place_of = kernel._weights[0], kernel._place
        for index, (expert, output) in enumerate(kernel._from_cpu):
            place = place_of[expert]
            kernel._from_cpu[index] = (expert, output * (weight[place - 1] / weight[place]).to(output.device))
        return result(kernel)

    monkeypatch.setattr(OneToken, "result", of_another)
    with pytest.raises(AssertionError):
        assert_near(decoded(machine, PROMPTS[:1], TOKENS, 3, **fields_of(name)).logits, logits)


# Prefill preloads that are never used.


def assert_used(run: RunResult) -> int:
    """What the first pass, a prompt on an empty cache, copied ahead is there for the next layer; returns how much."""
    after = run.layers[(run.layers.step == 0) & (run.layers.layer == 1)].iloc[0]
    operations = run.operations
    copies = ((operations.op == COPY) & (operations.step == 0) & (operations.layer == 1)).sum()
    ahead = int(copies - after.bytes // EXPERT_BYTES)
    assert after.phase == Phase.PREFILL
    assert after.hits_union + after.late_hits == ahead
    return ahead


@pytest.mark.parametrize("prefetch", ["impact", "next-router"])
def test_what_prefill_copies_ahead_is_used(machine: Machine, prefetch: str, monkeypatch: pytest.MonkeyPatch) -> None:
    system = fields_of("hybrimoe", prefetch=prefetch, options={"prefetch": {"depth": 1}})
    assert assert_used(simulated(1, 6, **system)) > 0
    assert_used(measured(machine, 1, 6, **system))
    look_ahead = OffloadController._look_ahead

    def elsewhere(controller: OffloadController, layer: int, *args: Any) -> None:
        """As many experts of the next layer, but those that nobody has named."""
        look_ahead(controller, layer, *args)
        named = {block % EXPERTS for block in controller._protected}
        spare = [(layer + 1) * EXPERTS + expert for expert in range(EXPERTS) if expert not in named]
        controller._wanted = spare[: len(controller._wanted)]

    monkeypatch.setattr(OffloadController, "_look_ahead", elsewhere)
    with pytest.raises(AssertionError):
        assert_used(simulated(1, 6, **system))


# No pin on experts that the running step still needs.


def assert_pinned(operations: pd.DataFrame) -> None:
    """Nothing leaves before the layer that uses it has read it."""
    gone, at = set[int](), None
    for row in operations.itertuples(index=False):
        if at != (row.step, row.layer):
            gone, at = set(), (row.step, row.layer)
        if row.op == EVICT:
            gone.add(row.expert)
        assert row.op != GPU or row.expert not in gone, row


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("name", NAMES)
def test_no_expert_leaves_that_the_running_step_still_needs(
    machine: Machine, name: str, batch: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    system = fields_of(name, prefetch="none")
    for run in (simulated(batch, 2, **system), measured(machine, batch, 2, **system)):
        assert_pinned(run.operations)
        assert (run.operations.op == EVICT).any()
    settle = ExpertCache.settle

    def unpinned(cache: ExpertCache, layer: int, blocks: Any, absent: list[int], policy: EvictionPolicy) -> Verdict:
        """The event's own residents leave like any other, the last used first."""
        need = len(absent) - cache.free_slots(layer)
        if need <= 0 or need > len(cache.residents(layer)):
            return settle(cache, layer, blocks, absent, policy)
        return Verdict(absent, (), cache.weakest(cache.residents(layer), policy)[::-1][:need], ())

    monkeypatch.setattr(ExpertCache, "settle", unpinned)
    with pytest.raises(AssertionError, match="op='gpu'"):
        assert_pinned(simulated(batch, 2, **system).operations)


# The hit counter aliases live state.


def assert_counted(run: RunResult) -> None:
    """Hits are what the log says was there when the layer began, and not what is there once it has been served."""
    slots, held = run.info.capacity_slots, dict[int, tuple[int, int]]()
    served = run.operations[run.operations.step >= 0]
    for (step, layer), own in served.groupby(["step", "layer"], sort=False):
        there = {expert for place, expert in held.values() if place == layer}
        used = set(own[own.op.isin([GPU, CPU])].expert)
        row = run.layers[(run.layers.step == step) & (run.layers.layer == layer)].iloc[0]
        assert (row.hits_union, row.misses) == (len(used & there), len(used - there))
        for one in own[own.slot >= 0].itertuples(index=False):
            if one.op == EVICT:
                del held[one.slot]
            elif one.op == COPY and one.slot < slots:
                held[one.slot] = (layer, one.expert)


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("name", NAMES)
def test_hits_are_counted_as_the_layer_found_the_cache(
    machine: Machine, name: str, batch: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    system = fields_of(name, prefetch="none")
    for run in (simulated(batch, 3, **system), measured(machine, batch, 3, **system)):
        assert_counted(run)
        assert 0 < run.layers.hits_union.sum() < run.layers.union.sum()
    plan_layer = OffloadController.plan_layer

    def late(controller: OffloadController, layer: int, routing: Routing, expected: Sequence[Any] = ()) -> LayerPlan:
        """Counts in the cache as it has become."""
        plan = plan_layer(controller, layer, routing, expected)
        hits = sum(controller.cache.slot_of[layer * EXPERTS + expert] >= 0 for expert in routing.experts)
        return plan._replace(hits_union=hits, misses=plan.union - hits)

    monkeypatch.setattr(OffloadController, "plan_layer", late)
    with pytest.raises(AssertionError):
        assert_counted(simulated(batch, 3, **system))
