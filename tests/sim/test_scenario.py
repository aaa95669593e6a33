"""A run as plain values: what it comes to, equal bytes for all systems, and what is refused."""

from __future__ import annotations

from pathlib import Path

import pytest

from sim.presets import Preset, preset
from sim.scenario import Scenario, alongside
from sim.systems import SystemSpec
from sim.target import parse_bytes
from traces import store, synthetic
from traces.errors import InputError

SIZES = synthetic.Sizes(
    sequences=2, prompt_tokens=6, new_tokens=8, layers=16, experts=64, top_k=8, expert_bytes=12_582_912
)


@pytest.fixture(scope="module")
def trace(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("scenario") / "t.safetensors"
    store.save(synthetic.generate("zipf", 0, SIZES), path)
    return str(path)


def scenario(trace: str, **fields: object) -> Scenario:
    return Scenario.model_validate({"trace": trace, "model": "olmoe-1b-7b", **fields})


def test_a_scenario_survives_being_written_down(trace: str) -> None:
    one = scenario(trace, system=preset("mixtral-offloading"), hardware_set={"link_gb_per_s": 12.0}, cache="25%")
    again = Scenario.model_validate_json(one.model_dump_json())
    assert again == one
    with_lookahead = again.model_copy(update={"lookahead_recall": 0.8})
    first, second = (with_lookahead.prepare().run(events=False) for _ in range(2))
    assert first.headline() == second.headline()


def test_the_memory_plan_adds_up(trace: str) -> None:
    prepared = scenario(trace, gpu_memory="8GiB", context=4096).prepare()
    plan, model = prepared.memory, prepared.model
    assert plan.kv_bytes == 4096 * model.kv_bytes_per_token
    assert plan.total_bytes == plan.dense_bytes + plan.kv_bytes + plan.staging_bytes + plan.experts_bytes
    assert plan.total_bytes <= parse_bytes("8GiB", "gpu-memory") < plan.total_bytes + 16 * model.expert_bytes
    assert plan.told().startswith(f"{plan.total_bytes / 1e9:.2f} GB = ")
    assert prepared.run(events=False).info.memory == plan.model_dump()


def test_a_longer_context_leaves_fewer_slots(trace: str) -> None:
    short, long = (scenario(trace, gpu_memory="8GiB", context=tokens).prepare() for tokens in (64, 16384))
    assert long.budget.slots < short.budget.slots


def test_a_context_shorter_than_the_trace_is_refused(trace: str) -> None:
    with pytest.raises(InputError, match="context must be at least 14, the trace's longest sequence, got 13"):
        scenario(trace, context=13).prepare()


def test_a_limit_that_cannot_work_names_the_shortfall(trace: str) -> None:
    with pytest.raises(InputError, match=r"gpu-memory must be at least .* got 1073741824"):
        scenario(trace, gpu_memory="1GiB").prepare()


def test_systems_side_by_side_get_the_same_bytes(trace: str) -> None:
    systems = [Preset(system=SystemSpec()), Preset(system=SystemSpec(scope="global"))]
    for limit in ({"cache": "30%"}, {"gpu_memory": "6GiB"}):
        plans = [one.prepare().memory for one in alongside(scenario(trace, **limit), systems)]
        assert plans[0] == plans[1]


def test_what_a_policy_needs_is_asked_for_before_the_run(trace: str) -> None:
    with pytest.raises(InputError, match="trace must have look-ahead of depth 1 for prefetch next-router, got depth 0"):
        scenario(trace, system=preset("mixtral-offloading")).prepare()


def test_made_up_lookahead_marks_the_result_as_synthetic() -> None:
    recorded = Scenario(trace="mixed", lookahead_recall=0.5)
    with pytest.raises(InputError, match="lookahead-recall must be left out for a trace that has recorded look-ahead"):
        recorded.prepare()


def test_a_changed_file_is_read_anew(tmp_path: Path) -> None:
    path = tmp_path / "t.safetensors"
    digests = []
    for seed in (0, 1):
        store.save(synthetic.generate("zipf", seed, SIZES), path, force=True)
        digests.append(scenario(str(path)).prepare().workload.trace.digest)
    assert digests[0] != digests[1]


def test_numbers_of_the_model_can_be_changed(trace: str) -> None:
    halved = scenario(trace, model_set={"expert_bits": 8.0}).prepare()
    assert halved.model.expert_bytes * 2 == scenario(trace).prepare().model.expert_bytes
