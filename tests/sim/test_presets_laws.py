"""What no run of any published system may break: conservation of bytes and time, causes before effects, sameness."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest

from sim.presets import preset_names
from sim.results import RunResult
from sim.scenario import Prepared
from sim.systems import SystemSpec
from tests.sim.every_preset import every_preset

ROUNDING_S = 1e-9
"""By how much times may differ that are sums of the same numbers in another order."""

VARIANTS: dict[str, dict[str, Any]] = {
    "as it is": {},
    "batch on a slow link": {"batch": 2, "hardware_set": {"link.gb_per_s": 0.3}},
    "shared memory bandwidth": {"hardware_set": {"cpu.shared_gb_per_s": 20.0}},
}


@pytest.fixture(scope="module", params=VARIANTS)
def prepared(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Prepared]:
    return every_preset(tmp_path_factory.mktemp("presets"), **VARIANTS[request.param])


@pytest.fixture(scope="module")
def runs(prepared: dict[str, Prepared]) -> dict[str, RunResult]:
    return {name: one.run() for name, one in prepared.items()}


def named(result: RunResult, name: str) -> str:
    return f"{name} on {result.info.hardware}, {result.info.workload['batch']} lanes"


def test_every_preset_runs(runs: dict[str, RunResult]) -> None:
    assert [*runs] == preset_names()


def test_bytes_are_loads_times_size(prepared: dict[str, Prepared], runs: dict[str, RunResult]) -> None:
    for name, result in runs.items():
        assert_bytes_conserved(result, prepared[name].model.expert_bytes)


def assert_bytes_conserved(result: RunResult, size_bytes: int) -> None:
    """Every copy moves one expert, has one piece of work on the link, and is a demand of its layer or a prefetch."""
    operations, events = result.operations, result.events
    copies = operations[(operations.op == "copy") & (operations.step >= 0)]
    assert (copies.bytes == size_bytes).all()
    link = events[(events.resource == "link") & events.kind.isin(["copy", "prefetch"])]
    assert len(link) == len(copies)
    assert sorted(zip(link.layer, link.expert, strict=True)) == sorted(zip(copies.layer, copies.expert, strict=True))
    assert result.layers.bytes.sum() == (link.kind == "copy").sum() * size_bytes
    assert (result.layers.bytes % size_bytes == 0).all()
    back = operations[(operations.op == "evict") & (operations.bytes > 0)]
    assert (back.bytes == size_bytes).all()
    assert ((events.resource == "link-back") & (events.kind != "hidden")).sum() == len(back)


def test_loads_are_misses_that_the_cpu_does_not_compute(runs: dict[str, RunResult]) -> None:
    """Where the CPU takes no hits, and no copy is late: demand copies are the misses without the CPU's experts."""
    for name in ("on-demand", "moe-infinity-code", "ktransformers", "fiddler"):
        layers, operations = runs[name].layers, runs[name].operations
        size_bytes = operations.loc[operations.op == "copy", "bytes"].max()
        assert (layers.bytes == (layers.misses - layers.cpu_experts) * size_bytes).all(), name


def test_every_use_is_computed_once(runs: dict[str, RunResult]) -> None:
    for name, result in runs.items():
        done = result.operations[result.operations.op.isin(["gpu", "cpu"])]
        assert not done.duplicated(["step", "layer", "expert"]).any(), name
        assert len(done) == result.layers.union.sum(), name
        assert done.tokens.sum() == result.layers.assignments.sum(), name
        assert (done.op == "cpu").sum() == result.layers.cpu_experts.sum(), name


def test_a_resource_does_one_thing_at_a_time(runs: dict[str, RunResult]) -> None:
    """So that none is busy for longer than the run takes."""
    for name, result in runs.items():
        for resource, work in result.events.groupby("resource"):
            ordered = work.sort_values(["start_s", "end_s"])
            gaps_s = ordered.start_s.to_numpy()[1:] - ordered.end_s.to_numpy()[:-1]
            assert (gaps_s >= -ROUNDING_S).all(), (name, resource)
            assert (ordered.end_s >= ordered.start_s).all(), (name, resource)
            span_s = max(result.tokens.end_s.max(), work.end_s.max())
            assert (ordered.end_s - ordered.start_s).sum() <= span_s * (1 + ROUNDING_S), (name, resource)


def test_no_expert_computes_before_it_is_there(runs: dict[str, RunResult]) -> None:
    for name, result in runs.items():
        assert_causes_before_effects(result, named(result, name))


def assert_causes_before_effects(result: RunResult, name: str) -> None:
    """Follows the slots through the log: the GPU reads what a slot holds after the copy that brought it has ended, and
    a copy begins when the slot has been read for the last time."""
    copied, computed = _times(result)
    holds: dict[int, tuple[int, int]] = {}
    there_s: dict[int, float] = defaultdict(float)  # by slot: when what it holds is there
    read_s: dict[int, float] = defaultdict(float)  # by slot: when it has been read
    for one in result.operations.itertuples():
        block = (one.layer, one.expert)
        if one.op == "copy":
            start_s, end_s = (0.0, 0.0) if one.step < 0 else copied[block].pop(0)
            assert start_s >= read_s[one.slot] - ROUNDING_S, (name, one)
            holds[one.slot], there_s[one.slot] = block, end_s
        elif one.op == "evict":
            assert holds.pop(one.slot) == block, (name, one)
        elif one.op == "gpu":
            start_s, end_s = computed[one.step, *block]
            assert holds[one.slot] == block, (name, one)
            assert start_s >= there_s[one.slot] - ROUNDING_S, (name, one)
            read_s[one.slot] = end_s


def _times(result: RunResult) -> tuple[dict[Any, list[tuple[float, float]]], dict[Any, tuple[float, float]]]:
    """(start, end) of the copies of each (layer, expert) in order, and of each (step, layer, expert) on the GPU."""
    copied: dict[Any, list[tuple[float, float]]] = defaultdict(list)
    computed = {}
    for one in result.events.sort_values("start_s").itertuples():
        if one.kind in ("copy", "prefetch"):
            copied[one.layer, one.expert].append((one.start_s, one.end_s))
        elif (one.resource, one.kind) == ("gpu", "expert"):
            computed[one.step, one.layer, one.expert] = (one.start_s, one.end_s)
    return copied, computed


def test_a_layer_waits_for_the_layer_before(runs: dict[str, RunResult]) -> None:
    """All experts of a layer have ended when the dense part of the next one, or the head, begins."""
    for name, result in runs.items():
        events = result.events
        experts = events[events.kind == "expert"].groupby(["step", "layer"]).end_s.max()
        for one in events[events.kind.isin(["dense", "head"]) & (events.layer > 0)].itertuples():
            assert one.start_s >= experts.get((one.step, one.layer - 1), 0.0) - ROUNDING_S, (name, one)


def test_components_add_up_to_the_layer(runs: dict[str, RunResult]) -> None:
    for name, result in runs.items():
        layers = result.layers
        parts_s = layers[["dense_s", "gpu_experts_s", "host_s", "stall_s"]].sum(axis=1)
        assert (parts_s >= layers.end_s - layers.start_s - ROUNDING_S).all(), name


def test_victims_that_are_written_back_are_counted_apart(tmp_path: Path) -> None:
    prepared = every_preset(tmp_path)["moe-infinity-code"]
    system = SystemSpec(**{**prepared.system.model_dump(), "write_back": True})
    result = type(prepared)(**{**vars(prepared), "system": system}).run()
    assert_bytes_conserved(result, prepared.model.expert_bytes)
    assert_causes_before_effects(result, "write-back")
    assert (result.operations.op == "evict").sum() == (result.events.resource == "link-back").sum() > 0


def test_all_have_the_same_bytes_of_the_gpu(prepared: dict[str, Prepared]) -> None:
    filled = {name for name, one in prepared.items() if one.system.holds == "cache"} - {"all-resident"}
    (given,) = {prepared[name].memory.total_bytes for name in filled}
    for name in prepared.keys() - filled - {"all-resident"}:
        assert prepared[name].memory.total_bytes <= given, name
    assert len(filled) > 10


def test_the_same_seed_gives_the_same_bytes(tmp_path: Path) -> None:
    for take in ("first", "second"):
        for name, one in every_preset(tmp_path).items():
            one.run().save(tmp_path / take / name)
    files = sorted(path.relative_to(tmp_path / "first") for path in (tmp_path / "first").rglob("*.*"))
    assert len(files) == 6 * len(preset_names())
    for path in files:
        assert (tmp_path / "first" / path).read_bytes() == (tmp_path / "second" / path).read_bytes(), path
