"""A run as plain values: what it comes to, equal bytes for all systems, and what is refused."""

from __future__ import annotations

from pathlib import Path

import pytest

from sim.presets import Preset, preset
from sim.scenario import Scenario, alongside
from sim.spec import catalogue
from sim.systems import SystemSpec
from sim.target import parse_bytes
from tests.sim.profiles import point, profile
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
    told = (
        r"GB = .* dense \+ .* KV of 1 x 14 tokens \+ .* staging \+ .* experts: one .*, got 1073741824, \S+ .B too few$"
    )
    with pytest.raises(InputError, match=rf"^gpu-memory must be at least \d+ bytes \(\S+ {told}"):
        scenario(trace, gpu_memory="1GiB").prepare()


def test_systems_side_by_side_get_the_same_bytes(trace: str) -> None:
    systems = [Preset(system=SystemSpec()), Preset(system=SystemSpec(scope="global"))]
    for limit in ({"cache": "30%"}, {"gpu_memory": "6GiB"}):
        plans = [one.prepare().memory for one in alongside(scenario(trace, **limit), systems)]
        assert plans[0] == plans[1]


CARD = {"hardware": "rtx3090+xeon6330+pcie4-x16"}
"""A machine whose GPU has 24 GB by its data sheet."""


def notes(trace: str, **fields: object) -> list[str]:
    return scenario(trace, **CARD, **fields).prepare().notes


def test_a_limit_beyond_the_card_is_refused_unless_its_gigabytes_may_be_meant(trace: str) -> None:
    with pytest.raises(
        InputError,
        match=r"^gpu-memory must fit rtx3090, which has 24\.0 GB \(another number: gpu\.memory_gb of hardware-set\), "
        r"got 25GiB, 2\.8 GB too much$",
    ):
        notes(trace, gpu_memory="25GiB")
    assert notes(trace, gpu_memory="25GiB", hardware_set={"gpu_memory_gb": 32.0}) == []
    assert notes(trace, gpu_memory="24GiB", context=16384) == []  # all experts of this model, and less than 24 GB


def test_a_plan_beyond_the_card_is_noted_as_a_what_if(trace: str) -> None:
    large = {"model_set": {"expert_bits": 64.0}}
    small, sizes = notes(trace, cache="25%", **large), scenario(trace, cache="75%", **large).prepare().memory
    assert small == []
    (note,) = notes(trace, cache="75%", **large)
    told = "are planned on the GPU, and rtx3090 has 24.0 GB"
    assert note == f"what-if: {sizes.total_bytes / 1e9:.1f} GB {told}, {sizes.total_bytes / 1e9 - 24:.1f} GB too few"
    assert scenario(trace, cache="75%", **CARD, **large).prepare().run(events=False).info.notes == [note]
    (near,) = notes(trace, gpu_memory="24GiB", **large)
    assert near.endswith(f"GB {told}: it fits only if the data sheet's GB are GiB")


def test_who_holds_every_expert_says_so(trace: str) -> None:
    assert notes(trace, system=preset("all-resident")) == ["every expert is held, whatever the limit"]


def test_one_pool_gets_what_the_layers_own_slots_would_be(trace: str) -> None:
    by_layer, one_pool = (Preset(system=SystemSpec(scope=scope)) for scope in ("layer", "global"))
    for limit in ("6GiB", "7GB"):
        own, pool = (scenario(trace, gpu_memory=limit, system=one).prepare() for one in (by_layer, one_pool))
        assert pool.budget.slots == 16 * own.budget.slots
    few = scenario(trace, gpu_memory="1100MB", system=one_pool).prepare()
    assert few.budget.slots < 16, "less than one a layer: as many as there are"


def test_what_a_policy_needs_is_asked_for_before_the_run(trace: str) -> None:
    with pytest.raises(InputError, match="trace must have look-ahead of depth 1 for prefetch next-router, got depth 0"):
        scenario(trace, system=preset("mixtral-offloading")).prepare()


def test_what_costs_do_not_tell_is_asked_for_before_the_run(trace: str, tmp_path: Path) -> None:
    spec = catalogue.model("olmoe-1b-7b")
    profile(model=spec, copies=(point(spec.expert_bytes, 1.0),)).save(tmp_path / "p.toml")
    here = {"profile": tmp_path / "p.toml", "cache": "50%"}
    assert scenario(trace, **here).prepare().costs.name.startswith("profile ")
    with pytest.raises(InputError, match="dense_follows must be false with a profile"):
        scenario(trace, system=preset("layer-split"), **here).prepare()
    with pytest.raises(InputError, match="host_slots must be left out with a profile"):
        scenario(trace, host_memory="1GiB", **here).prepare()
    with pytest.raises(InputError, match="hardware must have a disk"):
        scenario(trace, host_memory="1GiB", hardware="rtx4090+xeon6330+pcie4-x16").prepare()


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


def test_a_desktops_copies_and_cpu_experts_slow_each_other_down(trace: str) -> None:
    """Fetching in part and computing in part, over a link with which the CPU asks for more than its memory gives."""
    both = {"system": Preset(system=SystemSpec(place="hybrimoe")), "hardware": "rtx4090+ryzen9950x3d+pcie5-x16"}
    shared = scenario(trace, **both).prepare().run(events=False)
    apart = scenario(trace, **both, hardware_set={"cpu_shared_gb_per_s": 0.0}).prepare().run(events=False)
    token = "time_per_output_token_p50_s"
    assert shared.headline()["misses_fetched"] > 0
    assert shared.headline()["cpu_experts"] > 0
    assert 1.0 < shared.headline()[token] / apart.headline()[token] < (54 + 50.9) / 89.6
