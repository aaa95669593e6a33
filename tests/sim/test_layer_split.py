"""Whole layers on one side or the other: none has experts on the GPU and others on the CPU."""

from __future__ import annotations

import pytest

from sim.plan import COPY
from sim.presets import preset
from tests.sim.hand import run, trace_of

TRACE = trace_of([[[0], [0], [0]], [[3], [1], [2]], [[1], [2], [1]]])


def split(**changes: str) -> dict[str, object]:
    return {**preset("layer-split").system.model_dump(), **changes}


@pytest.mark.parametrize("changes", [{}, {"evict": "lru", "starts_with": "static-front"}])
@pytest.mark.parametrize(("slots", "on_gpu"), [(3, 0), (4, 1), (6, 1), (7, 1), (8, 2), (12, 3)])
def test_a_layer_is_on_the_gpu_only_as_a_whole(slots: int, on_gpu: int, changes: dict[str, str]) -> None:
    """Three layers of four experts: what is too little for one more layer stays empty."""
    result = run(TRACE, slots, **split(**changes))
    assert result.info.layers_on_cpu == [*range(on_gpu, 3)]
    by_layer = result.layers.groupby("layer")[["hits_union", "cpu_experts", "misses"]].sum()
    assert by_layer.hits_union.tolist() == [3] * on_gpu + [0] * (3 - on_gpu)
    assert by_layer.cpu_experts.tolist() == by_layer.misses.tolist() == [0] * on_gpu + [3] * (3 - on_gpu)
    copies = result.operations[result.operations.op == COPY]
    assert [*zip(copies.layer, copies.expert, strict=True)] == [divmod(block, 4) for block in range(4 * on_gpu)]
    dense = result.events[result.events.kind == "dense"].groupby("layer").resource.unique()
    assert [[*where] for where in dense] == [["gpu"]] * on_gpu + [["cpu"]] * (3 - on_gpu)


def test_where_dense_work_stays_on_the_gpu_a_part_of_a_layer_is_kept() -> None:
    result = run(TRACE, 6, **preset("cpu-experts").system.model_dump())
    assert result.info.layers_on_cpu == []
    assert result.layers.groupby("layer").hits_union.sum().tolist() == [3, 2, 0]


def test_it_says_that_slots_stay_empty() -> None:
    assert "stay empty" in preset("layer-split").leaves_out
    told = "2 slots stay empty, as they would hold a part of a layer only"
    assert told in run(TRACE, 6, **split()).info.notes
    assert not run(TRACE, 8, **split()).info.notes
