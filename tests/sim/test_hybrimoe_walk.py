"""HybriMoE's schedule equals its plain definition: at every turn all three timelines offer, and the first to end acts.

Seconds are eighths, so that sums are exact and ties are common.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import accumulate

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sim.policies import LayerView, PolicyContext
from sim.policies.base import Assignment
from sim.policies.place import HybriMoe
from sim.policies.place.hybrimoe import assignment_of
from sim.policies.place.split import makespan_s, place_timed, schedule_s, split
from tests.sim.layers import hybrimoe, policy, view

MOST_TOKENS = 4

Pick = Callable[[int], tuple[float, int]]
"""The order in which a timeline takes experts: the smallest first."""


def defined_moves(layer: LayerView, order: str, takes: bool) -> list[tuple[str, int, float]]:
    """The walk as the class's docstring tells it, without a thought of its cost."""
    tokens = dict([*layer.hits, *layer.late, *layer.misses])
    there_s = {expert: s for (expert, _), s in zip(layer.late, layer.arrivals_s, strict=True)}
    clock = {"gpu": layer.gpu_free_s, "cpu": layer.cpu_free_s, "link": layer.link_free_s}
    gpu = {expert for expert, _ in [*layer.hits, *layer.late]}
    own = {expert for expert, _ in layer.misses}
    moves: list[tuple[str, int, float]] = []
    idle, refused = True, False

    def highest(expert: int) -> tuple[float, int]:
        return -tokens[expert], expert

    def lowest(expert: int) -> tuple[float, int]:
        return tokens[expert], expert

    def ready(expert: int) -> tuple[float, float, int]:
        return max(clock["gpu"], there_s.get(expert, 0.0)), *highest(expert)

    def cpu_s(expert: int) -> float:
        return layer.cpu_expert_s(tokens[expert], idle)

    def on_gpu_s(expert: int, from_s: float) -> float:
        return max(clock["gpu"], from_s) + layer.gpu_expert_s(tokens[expert])

    while gpu or own:
        offers: list[tuple[float, str, int]] = []
        if gpu:
            head = min(gpu, key=highest if order == "head" else ready)
            offers.append((on_gpu_s(head, there_s.get(head, 0.0)), "gpu", head))
        if queue := own or {expert for expert in gpu if takes or there_s.get(expert, 0.0) <= clock["cpu"]}:
            last = min(queue, key=lowest)
            offers.append((clock["cpu"] + cpu_s(last), "cpu", last))
        if own and not refused:
            offers.append((clock["link"] + layer.copy_s, "link", min(own, key=highest)))
        end_s, timeline, expert = min(offers, key=lambda offer: offer[0])
        if timeline == "link":
            left_s = cpu_s(min(own, key=lowest)) + sum(
                layer.cpu_expert_s(tokens[one], False) for one in own - {min(own, key=lowest)}
            )
            if on_gpu_s(expert, end_s) >= clock["cpu"] + left_s:
                refused = True
                continue
            there_s[expert] = end_s
            own.remove(expert)
            gpu.add(expert)
        else:
            idle = idle and timeline == "gpu"
            (own if expert in own else gpu).remove(expert)
        clock[timeline] = end_s
        moves.append((timeline, expert, end_s))
    return moves


def defined_schedule(layer: LayerView, order: str, takes: bool) -> tuple[Assignment, float]:
    """The walk's assignment, or that of one device alone where it is quicker."""
    own = assignment_of(defined_moves(layer, order, takes))
    every = sorted([*layer.hits, *layer.late, *layer.misses], key=lambda load: (load[1], load[0]))
    alone = split(layer, ()), split(layer, [expert for expert, _ in every])
    best = min(alone, key=lambda one: makespan_s(layer, one))
    chosen = best._replace(fallback=True) if makespan_s(layer, best) < makespan_s(layer, own) else own
    return chosen, makespan_s(layer, chosen)


@st.composite
def eighths(draw: st.DrawFn) -> LayerView:
    """Any layer of up to a dozen experts, with costs and clocks in eighths of a second."""

    def seconds(most: int, least: int = 0) -> float:
        return draw(st.integers(least, most)) / 8

    gpu_s = [*accumulate(seconds(12) for _ in range(MOST_TOKENS))]
    later_s, first_s = ([seconds(24) for _ in range(MOST_TOKENS)] for _ in range(2))
    parts: tuple[dict[int, int], ...] = {}, {}, {}
    for expert in draw(st.lists(st.integers(0, 63), max_size=12, unique=True)):
        parts[draw(st.integers(0, 2))][expert] = draw(st.integers(1, MOST_TOKENS))
    layer = view(*parts, copy=seconds(24, 1), gpu_free_s=seconds(16), cpu_free_s=seconds(16), link_free_s=seconds(40))
    arrivals_s = draw(st.permutations(layer.arrivals_s))
    return layer._replace(
        arrivals_s=tuple(arrivals_s),
        gpu_expert_s=lambda tokens: gpu_s[tokens - 1],
        cpu_expert_s=lambda tokens, first: (first_s if first else later_s)[tokens - 1],
    )


@pytest.mark.parametrize("takes", [False, True])
@pytest.mark.parametrize("order", ["head", "ready-first"])
@settings(max_examples=150)
@given(layer=eighths())
def test_the_walk_is_that_of_the_plain_definition(layer: LayerView, order: str, takes: bool) -> None:
    rule = hybrimoe(gpu_order=order, cpu_takes_transfers=takes)
    assert rule.moves(layer) == defined_moves(layer, order, takes)
    assert rule.schedule(layer) == defined_schedule(layer, order, takes)
    assert rule.place(layer) == defined_schedule(layer, order, takes)[0]


@pytest.mark.parametrize("name", ["hybrimoe", "optimal", "fiddler", "fetch"])
@settings(max_examples=40)
@given(layer=eighths())
def test_the_seconds_of_a_placement_are_its_makespan(name: str, layer: LayerView) -> None:
    kept = policy(name)
    for _ in range(2):  # decided, and remembered
        placed, seconds = place_timed(kept, layer)
        assert placed == kept.place(layer)
        assert seconds == makespan_s(layer, placed) == schedule_s(kept, layer)


def test_a_placement_of_ones_own_is_timed_as_it_decides() -> None:
    class OnCpu(HybriMoe):
        def place(self, view: LayerView) -> Assignment:
            return split(view, [expert for expert, _ in view.hits])

    own, layer = OnCpu(PolicyContext(1, 64, 6)), view({1: 1, 2: 1}, gpu=1.0, cpu=9.0)
    assert place_timed(own, layer) == (Assignment([1, 2], [], []), 18.0)
    assert schedule_s(own, layer) == 18.0


def test_a_prompt_takes_as_many_turns_as_it_has_experts_and_copies() -> None:
    layer = view({e: 3 for e in range(20)}, {e: e % 7 + 1 for e in range(20, 60)}, gpu=0.25, cpu=0.5, copy=0.5)
    moves = hybrimoe().moves(layer)
    copied = [move for move in moves if move.timeline == "link"]
    assert 0 < len(copied) < 40
    assert len(moves) == 60 + len(copied)
    assert moves == defined_moves(layer, "head", False)
