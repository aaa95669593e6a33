"""Fixed sets that need no calibration: uniform over the layers, and from the front."""

from __future__ import annotations

import numpy as np
import pytest

from sim.policies import EVICTION, PolicyContext
from sim.replay import Capacity, Feed, Settings
from sim.replay.run import replay
from tests.sim.hand import misses_by_step, run, trace_of

LAYERS, EXPERTS = 5, 16


def preloaded(
    name: str, capacity: int, *, shared: bool, seed: int = 0, weights: tuple[int, ...] = (1,) * LAYERS
) -> list[int]:
    context = PolicyContext(LAYERS, EXPERTS, 2, capacity=capacity, weights=weights, shared=shared, seed=seed)
    return [*EVICTION[name](context).preload()]


def by_layer(blocks: list[int]) -> list[int]:
    return np.bincount(np.array(blocks) // EXPERTS, minlength=LAYERS).tolist()


@pytest.mark.parametrize("seed", range(3))
def test_uniform_is_as_many_of_every_layer(seed: int) -> None:
    assert by_layer(preloaded("static-uniform", 4, shared=False, seed=seed)) == [4] * LAYERS
    assert by_layer(preloaded("static-uniform", 20, shared=True, seed=seed)) == [4] * LAYERS
    assert by_layer(preloaded("static-uniform", 22, shared=True, seed=seed)) == [5, 5, 4, 4, 4]


def test_uniform_draws_the_same_in_one_pool_as_in_many() -> None:
    assert preloaded("static-uniform", 4, shared=False) == preloaded("static-uniform", 20, shared=True)


def test_uniform_draws_every_expert_alike_and_each_layer_anew() -> None:
    """400 seeds, a quarter each: 100 of 400, within 5 standard errors; and no two layers of a seed agree."""
    counts = np.zeros(LAYERS * EXPERTS)
    for seed in range(400):
        counts[preloaded("static-uniform", 4, shared=False, seed=seed)] += 1
    assert (abs(counts - 100) <= 5 * np.sqrt(400 * 0.25 * 0.75)).all()
    drawn = np.array(preloaded("static-uniform", 4, shared=False)).reshape(LAYERS, 4) % EXPERTS
    assert len({tuple(row) for row in drawn.tolist()}) == LAYERS


def test_uniform_ends_where_the_next_does_not_fit() -> None:
    """Layers of 3, 1, 1, 1 and 1: one of each is 7; the second of layer 0 does not fit into the 2 that are left."""
    found = preloaded("static-uniform", 9, shared=True, weights=(3, 1, 1, 1, 1))
    assert by_layer(found) == [1, 1, 1, 1, 1]


def test_front_is_the_first_layers_as_a_whole_in_one_pool() -> None:
    assert preloaded("static-front", 2 * EXPERTS + 3, shared=True) == [*range(2 * EXPERTS + 3)]
    assert preloaded("static-front", 3, shared=False) == [
        layer * EXPERTS + expert for layer in range(LAYERS) for expert in range(3)
    ]


def test_front_never_misses_in_its_layers_and_always_in_the_others() -> None:
    trace = trace_of([[[0, 1], [0, 1]], [[2, 3], [2, 3]], [[0, 3], [0, 1]]])
    result = run(trace, 4, evict="static-front", scope="global")
    assert misses_by_step(result) == [[0, 2], [0, 2], [0, 2]]


def test_what_room_is_left_is_open_to_the_first_who_fits() -> None:
    trace = trace_of([[[0], [1]], [[1], [2]], [[0], [1]]])
    amount = Capacity.slots("100%", trace.header, "global")
    for name in ("static-front", "static-uniform"):
        whole = replay(Feed.of(trace), Settings(name, amount, scope="global"))
        assert whole.row()["misses_union"] == 0
        assert whole.static_blocks == 8


@pytest.mark.parametrize("name", ["static-uniform", "static-front"])
def test_they_need_no_calibration(name: str) -> None:
    assert EVICTION[name].needs == frozenset()
    assert EVICTION["static"].needs == {"calibration"}


@pytest.mark.parametrize("name", ["static-uniform", "static-front"])
def test_each_layer_gets_the_room_that_is_its_own(name: str) -> None:
    rooms = (2, 0, 5, 1, 4)
    context = PolicyContext(LAYERS, EXPERTS, 2, capacity=2, weights=(1,) * LAYERS, by_layer=rooms)
    assert by_layer([*EVICTION[name](context).preload()]) == [*rooms]


@pytest.mark.parametrize("name", ["arc", "s3fifo"])
def test_a_procedure_knows_the_room_of_its_layer(name: str) -> None:
    own = EVICTION[name](PolicyContext(2, EXPERTS, 2, capacity=6, weights=(1, 1), by_layer=(10, 2)))
    alone = [EVICTION[name](PolicyContext(2, EXPERTS, 2, capacity=room, weights=(1, 1))) for room in (10, 2)]
    for layer, other in enumerate(alone):
        blocks = [layer * EXPERTS + expert for expert in (0, 1, 2, 0, 3, 1, 4, 0, 2, 5)]
        for policy in (own, other):
            held: set[int] = set()
            for event, block in enumerate(blocks):
                policy.observe(event * 2 + layer, [block], [1])
                if block not in held:
                    if len(held) == (10, 2)[layer]:
                        leaver = policy.order(held, [0] * 2 * EXPERTS)[0]
                        policy.forget(leaver)
                        held.discard(leaver)
                    policy.admit(block)
                    held.add(block)
        assert own.order(held, [0] * 2 * EXPERTS) == other.order(held, [0] * 2 * EXPERTS)
