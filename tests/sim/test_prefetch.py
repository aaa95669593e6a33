"""Prefetch policies alone, on cases worked out by hand; ``none`` and ``next-router`` stand in test_policies.py."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from sim.policies import PREFETCH, PolicyContext, PrefetchPolicy, PrefetchView
from sim.policies.base import NEVER
from sim.presets import preset
from sim.replay.calibration import TraceCalibration
from tests.sim.hand import HandCosts, host, misses_by_step, run, trace_of

LAYERS, EXPERTS = 4, 4


def policy_of(name: str, *, future: Any = None, seed: int = 0, top_k: int = 2, **options: Any) -> PrefetchPolicy:
    return PREFETCH[name](PolicyContext(LAYERS, EXPERTS, top_k, future, seed=seed, options=options))


def nothing_gained(here: tuple[int, ...], missing: tuple[int, ...]) -> float:
    return 1.0


def view_of(
    layer: int,
    *expected: Mapping[int, int],
    there: Sequence[int] = (),
    step: int = 0,
    makespan_s: Callable[[tuple[int, ...], tuple[int, ...]], float] = nothing_gained,
    **times: float,
) -> PrefetchView:
    """The view after ``layer``; ``expected[d]`` maps the experts of a layer ahead to tokens, ``there`` are blocks."""
    named = [[*one.items()] for one in expected]
    return PrefetchView(step * LAYERS + layer, layer, named, {*there}.__contains__, makespan_s, 3.0, **times)


def block(layer: int, expert: int) -> int:
    return layer * EXPERTS + expert


# impact


def three_a_miss(here: tuple[int, ...], missing: tuple[int, ...]) -> float:
    """Copies take 3 seconds, and hide nothing."""
    return len(here) + 4.0 * len(missing)


def impact(view: PrefetchView, **options: Any) -> list[int]:
    return [*policy_of("impact", **options).candidates(view)]


def test_impact_discounts_a_gain_by_the_distance_in_layers() -> None:
    """Layer 1 gains 3, layer 2 gains 3 / 2 twice, of which the lower expert comes first."""
    view = view_of(0, {0: 1, 1: 1}, {3: 1, 2: 1}, there=[block(1, 0)], makespan_s=three_a_miss, router_s=10.0)
    assert impact(view) == [block(1, 1), block(2, 2)]
    assert impact(view, most=1) == [block(1, 1)]
    assert impact(view, most=9) == [block(1, 1), block(2, 2), block(2, 3)]


def test_the_discount_of_a_gain_can_be_chosen() -> None:
    """Layer 1 gains 2; layer 2 gains 3, which is 1.5 at a distance of 2, and 0.75 if that counts twice."""
    view = view_of(0, {1: 2}, {2: 3}, makespan_s=lambda here, missing: float(sum(missing)), router_s=10.0)
    assert [impact(view, most=1, **own) for own in ({}, {"discount": 0.0})] == [[block(1, 1)], [block(2, 2)]]
    nearer = view_of(0, {1: 1}, {2: 3}, makespan_s=lambda here, missing: float(sum(missing)), router_s=10.0)
    assert [impact(nearer, most=1, **own) for own in ({}, {"discount": 2.0})] == [[block(2, 2)], [block(1, 1)]]
    with pytest.raises(ValueError, match=r"discount must be from 0 to 8, got -1\.0"):
        impact(view, discount=-1.0)


def test_impact_takes_from_a_gain_the_delay_of_what_is_demanded() -> None:
    """The link is free at 9, so that the first copy ends at 12: 2 s after layer 1's router, which leaves 1 of 3 s. For
    layer 2, whose router chooses at 20, there is time for both of its experts, each for half its gain."""
    view = view_of(0, {1: 1}, {2: 1, 3: 1}, makespan_s=three_a_miss, link_free_s=9.0, router_s=10.0)
    assert impact(view) == [block(2, 2), block(2, 3)]
    idle = view._replace(link_free_s=7.0)  # the first ends at 10, just in time
    assert impact(idle) == [block(1, 1), block(2, 2)]


def test_impact_may_count_what_is_demanded_by_the_layers_between() -> None:
    """The copy takes 3 s, and a router 1 s: the third has not chosen when it ends, but the first waits for 2 s."""
    view = view_of(0, {}, {}, {1: 1}, makespan_s=three_a_miss, router_s=1.0)
    assert impact(view) == [block(3, 1)]
    assert impact(view, delays="nearest") == []
    assert impact(view._replace(copy_s=1.0), delays="nearest") == [block(3, 1)]
    with pytest.raises(ValueError, match="delays must be target or nearest, got 'far'"):
        impact(view, delays="far")


def test_impact_wants_nothing_that_costs_what_it_gains() -> None:
    view = view_of(0, {1: 1}, makespan_s=three_a_miss, link_free_s=10.0, router_s=10.0)
    assert impact(view) == []
    assert impact(view._replace(link_free_s=9.5)) == [block(1, 1)]


def test_impact_wants_nothing_without_a_gain() -> None:
    assert impact(view_of(0, {1: 1, 2: 1}, {0: 1}, router_s=9.0)) == []
    assert impact(view_of(0, {1: 1}, there=[block(1, 1)], makespan_s=three_a_miss, router_s=9.0)) == []
    assert impact(view_of(3)) == []


def test_impact_counts_what_it_has_chosen_as_there() -> None:
    """The first of two misses gains 6, the second 1 more; one of layer 2, where the other is there, gains 1 / 2."""
    seconds = {2: 10.0, 1: 4.0, 0: 3.0}
    view = view_of(
        0,
        {1: 1, 3: 1},
        {0: 1, 2: 1},
        there=[block(2, 0)],
        makespan_s=lambda here, missing: seconds[len(missing)],
        router_s=9.0,
    )
    assert impact(view) == [block(1, 1), block(1, 3)]
    assert impact(view, most=3) == [block(1, 1), block(1, 3), block(2, 2)]


def test_impact_breaks_ties_by_layer_and_by_tokens() -> None:
    def by_tokens(here: tuple[int, ...], missing: tuple[int, ...]) -> float:
        return float(sum(missing))

    near = view_of(0, {3: 2}, {1: 4}, makespan_s=by_tokens, router_s=9.0)
    assert impact(near, most=1) == [block(1, 3)]
    alike = view_of(0, {3: 2, 0: 1}, makespan_s=lambda here, missing: 2.0 * len(missing), router_s=9.0)
    assert impact(alike, most=1) == [block(1, 3)]
    more = view_of(0, {3: 2, 0: 1}, makespan_s=by_tokens, router_s=9.0)
    assert impact(more) == [block(1, 3), block(1, 0)]


def test_impact_asks_for_loads_and_not_for_experts() -> None:
    """Most tokens first; equal loads are asked for once, and a case that has been decided not again."""
    asked: list[Any] = []

    def makespan_s(here: tuple[int, ...], missing: tuple[int, ...]) -> float:
        asked.append((here, missing))
        return float(len(missing))

    policy = policy_of("impact", most=1)
    view = view_of(0, {2: 5, 0: 4, 1: 2, 3: 2}, there=[block(1, 0)], makespan_s=makespan_s, router_s=9.0)
    assert [*policy.candidates(view)] == [block(1, 2)]
    assert asked == [((4,), (5, 2, 2)), ((5, 4), (2, 2)), ((4, 2), (5, 2))]
    same = view_of(1, {3: 5, 1: 4, 0: 2, 2: 2}, there=[block(2, 1)], makespan_s=makespan_s, router_s=9.0)
    assert [*policy.candidates(same)] == [block(2, 3)]
    assert len(asked) == 3


def test_impact_tries_the_largest_loads() -> None:
    def odd(here: tuple[int, ...], missing: tuple[int, ...]) -> float:
        return 5.0 if 1 in missing else 0.0

    view = view_of(0, {2: 3, 0: 2, 1: 1}, makespan_s=odd, router_s=9.0)
    assert impact(view, tried=2) == []
    assert impact(view, tried=3) == [block(1, 1)]


def test_impact_shortens_a_run() -> None:
    """Layer 1 takes an expert a pass, which its slots do not hold: impact has it copied beside layer 0's work."""
    steps = [[[0], [expert]] for expert in (0, 1, 2, 3)]
    trace = trace_of(steps, lookahead=[[chosen, []] for _, chosen in steps])
    costs = HandCosts(copy=2.0, gpu=1.0, cpu=9.0, host=host(joins_layers=False))
    plain, ahead = (
        run(trace, 2, costs, place="hybrimoe", prefetch=name, options=options)
        for name, options in (("none", {}), ("impact", {"prefetch": {"depth": 1}}))
    )
    assert misses_by_step(plain) == [[1, 1], [0, 1], [0, 1], [0, 1]]
    assert [row[1] for row in misses_by_step(ahead)] == [0, 0, 0, 0]
    assert ahead.tokens["end_s"].iloc[-1] < plain.tokens["end_s"].iloc[-1]


# mrs-next


def test_mrs_next_wants_the_highest_scores_of_the_next_layer() -> None:
    """Twice the experts of a token are scored: 3 and 2 at first, then 0 and 1 with half the weight of what was."""
    policy = policy_of("mrs-next", top_k=1)
    assert [*policy.candidates(view_of(0))] == []
    policy.observe_scores(1, np.array([[0.1, 0.2, 0.3, 0.4]]))
    assert [*policy.candidates(view_of(0))] == [block(1, 3)]
    assert [*policy.candidates(view_of(1))] == []
    policy.observe_scores(1, np.array([[0.5, 0.25, 0.15, 0.1]]))  # S: 0.25, 0.125, 0.075, 0.1
    assert [*policy.candidates(view_of(0))] == [block(1, 0)]


def test_mrs_next_wants_as_many_as_it_is_told_of_those_that_have_a_score() -> None:
    policy = policy_of("mrs-next", width=4)
    policy.observe_scores(0, np.array([[0.0, 0.3, 0.3, 0.4]]))
    assert [*policy.candidates(view_of(3))] == [block(0, 3), block(0, 1), block(0, 2)]


def test_mrs_next_scores_a_batch_as_the_cache_does() -> None:
    scores = np.array([[0.9, 0.1, 0.0, 0.0], [0.0, 0.3, 0.3, 0.4], [0.0, 0.3, 0.3, 0.4]])
    for batch, first in (("first", 0), ("max", 0), ("mean", 0)):
        policy = policy_of("mrs-next", width=2, batch=batch)
        policy.observe_scores(1, scores)
        second = {"first": 1, "max": 3, "mean": 3}[batch]
        assert [*policy.candidates(view_of(0))] == [block(1, first), block(1, second)]
    with pytest.raises(ValueError, match="alpha must be above 0 and at most 1, got 0"):
        policy_of("mrs-next", alpha=0)


# eam


def request(policy: PrefetchPolicy, *rows: Mapping[int, int]) -> None:
    """A request that routes so many tokens to the experts of each layer."""
    policy.begin_sequence()
    for layer, row in enumerate(rows):
        experts = sorted(row)
        policy.observe(layer, [block(layer, expert) for expert in experts], [row[expert] for expert in experts])


def test_eam_ranks_what_the_past_request_used_by_share_and_distance() -> None:
    """P: layer 1 * (1 - 1/5), layer 2 * (1 - 2/5), layer 3 * (1 - 3/5): 0.6, 0.2; 0.6; 0.24 and 0.16; then nothing."""
    policy = policy_of("eam", most=6)
    request(policy, {0: 1}, {0: 3, 1: 1}, {2: 7}, {3: 6, 1: 4})
    request(policy, {0: 2})
    ranked = [(1, 0), (2, 2), (3, 3), (1, 1), (3, 1), (1, 2)]
    assert [*policy.candidates(view_of(0))] == [block(*one) for one in ranked]
    assert [*policy.candidates(view_of(2))][:3] == [block(3, 3), block(3, 1), block(3, 0)]
    assert [*policy.candidates(view_of(3))] == []


def test_eam_predicts_nothing_without_a_past_and_without_a_row() -> None:
    policy = policy_of("eam")
    request(policy, {0: 1}, {1: 1})
    assert [*policy.candidates(view_of(1))] == []
    policy.begin_sequence()
    assert [*policy.candidates(view_of(0))] == []


def test_eam_goes_by_the_nearest_matrix_over_the_rows_it_has_seen() -> None:
    """By layer 0 the first request is the nearest, by layers 0 and 1 together the second: its cosines are 0.8 and 1."""
    policy = policy_of("eam", most=1)
    request(policy, {0: 5}, {0: 1}, {0: 1}, {0: 1})
    request(policy, {0: 4, 1: 3}, {1: 1}, {1: 1}, {1: 1})
    policy.begin_sequence()
    policy.observe(0, [block(0, 0)], [1])
    assert [*policy.candidates(view_of(0))] == [block(1, 0)]
    policy.observe(1, [block(1, 1)], [1])
    assert [*policy.candidates(view_of(1))] == [block(2, 1)]
    for step in (1, 2):
        policy.observe(step * LAYERS, [block(0, 0)], [2])
        policy.observe(step * LAYERS + 1, [block(1, 0)], [9])  # layer 1 has now turned to expert 0
    assert [*policy.candidates(view_of(1, step=2))] == [block(2, 0)]


def test_eam_takes_an_empty_row_as_uniform() -> None:
    """Layer 1 of the past is empty: each of its experts counts 1 / 4, and the lowest goes first."""
    policy = policy_of("eam", most=5)
    request(policy, {0: 1}, {}, {1: 1}, {})
    request(policy, {0: 1})
    assert [*policy.candidates(view_of(0))] == [block(2, 1), *[block(1, expert) for expert in range(4)]]


def test_eam_counts_only_what_is_not_there() -> None:
    policy = policy_of("eam", most=1)
    request(policy, {0: 1}, {0: 3, 1: 1}, {2: 7}, {3: 1})
    request(policy, {0: 2})
    assert [*policy.candidates(view_of(0, there=[block(1, 0)]))] == [block(1, 0), block(2, 2)]
    near = policy_of("eam", most=3, ahead=1)
    request(near, {0: 1}, {0: 3, 1: 1}, {2: 7}, {3: 1})
    request(near, {0: 2})
    assert [*near.candidates(view_of(0))] == [block(1, 0), block(1, 1), block(1, 2)]


@pytest.mark.parametrize(("library", "predicted"), [(3, 0), (2, 2)])
def test_eam_keeps_so_many_matrices_and_replaces_the_oldest(library: int, predicted: int) -> None:
    """With room for two, the third request takes the place of the first, and none is near: the first place counts."""
    policy = policy_of("eam", library=library, most=1)
    for expert in (0, 1, 2):
        request(policy, {expert: 1}, {expert: 1})
    request(policy, {0: 1})
    assert [*policy.candidates(view_of(0))] == [block(1, predicted)]


def test_eam_begins_with_the_requests_of_the_calibration_trace() -> None:
    """Three requests in batches of two; what is not routed counts nowhere."""
    trace = trace_of([[[0], [1]], [[0, 2], [1, 3]], [[], [2]]])
    trace = replace(trace, sequence=np.array([0, 1, 2], np.int32), position=np.zeros(3, np.int32))
    past = TraceCalibration.of(trace, None, 2)
    assert [matrix.tolist() for matrix in past.requests()] == [
        [[2, 0, 1, 0], [0, 2, 0, 1]],
        [[0, 0, 0, 0], [0, 0, 1, 0]],
    ]
    policy = PREFETCH["eam"](PolicyContext(2, 4, 2, calibration=past, options={"most": 2}))
    policy.begin_sequence()
    policy.observe(0, [0], [1])
    assert [*policy.candidates(view_of(0))] == [block(1, 1), block(1, 3)]


# whole-next-layer, popularity


def test_whole_next_layer_wants_every_expert_and_goes_round() -> None:
    policy = policy_of("whole-next-layer")
    assert [*policy.candidates(view_of(1))] == [block(2, expert) for expert in range(EXPERTS)]
    assert [*policy.candidates(view_of(3))] == [block(0, expert) for expert in range(EXPERTS)]


def test_popularity_wants_what_the_next_layer_has_used_most_often() -> None:
    """Events count, not tokens; of equally used ones the lower comes first, and what was never used is not wanted."""
    policy = policy_of("popularity")
    assert [*policy.candidates(view_of(0))] == []
    policy.observe(1, [block(1, 3)], [9])
    assert [*policy.candidates(view_of(0))] == [block(1, 3)]
    policy.observe(5, [block(1, 1), block(1, 2)], [1, 1])
    policy.observe(9, [block(1, 2)], [1])
    assert [*policy.candidates(view_of(0))] == [block(1, 2), block(1, 1)]
    assert [*policy.candidates(view_of(1))] == []
    policy.observe(12, [block(0, 1)], [1])
    assert [*policy.candidates(view_of(3))] == [block(0, 1)]
    wide = policy_of("popularity", width=3)
    wide.observe(1, [block(1, 0), block(1, 1), block(1, 2), block(1, 3)], [1, 1, 1, 1])
    assert [*wide.candidates(view_of(0))] == [block(1, expert) for expert in range(3)]


# oracle


class Timetable:
    """A future that is written down: block -> events in which it is used."""

    def __init__(self, uses: Mapping[int, Sequence[int]]) -> None:
        self.uses = uses

    def next_use(self, block: int, event: int) -> int:
        return next((use for use in self.uses.get(block, ()) if use > event), NEVER)


FUTURE = Timetable({0: [0, 8], 1: [4], 5: [1], 6: [1, 5], 9: [2, 6], 12: [7], 15: [3]})


def test_the_oracle_wants_the_next_layers_in_their_order() -> None:
    policy = policy_of("oracle", future=FUTURE, horizon=2)
    assert [*policy.candidates(view_of(0))] == [5, 6, 9]
    assert [*policy.candidates(view_of(1))] == [9, 15]
    assert [*policy.candidates(view_of(2))] == [15, 1]
    assert [*policy.candidates(view_of(3))] == [1, 6]
    assert [*policy.candidates(view_of(3, step=1))] == [0]
    assert [*policy.candidates(view_of(0))] == [5, 6, 9], "asked again, and back in time"


def test_the_oracle_sees_one_pass_at_most() -> None:
    policy = policy_of("oracle", future=FUTURE, horizon=99)
    assert [*policy.candidates(view_of(0))] == [5, 6, 9, 15, 1]


def test_an_oracle_that_does_not_cross_ends_with_the_pass() -> None:
    policy = policy_of("oracle", future=FUTURE, horizon=2, crosses=False)
    assert [*policy.candidates(view_of(1))] == [9, 15]
    assert [*policy.candidates(view_of(2))] == [15]
    assert [*policy.candidates(view_of(3))] == []
    assert preset("pre-gated").system.options_of("prefetch")["crosses"] is False


def test_a_late_oracle_knows_in_the_layer_before() -> None:
    """However late, what is to be used next is known; and with no lateness all is known as soon as it can be."""
    late = policy_of("oracle", future=FUTURE, horizon=3, lateness=99)
    for step in range(2):
        for layer in range(LAYERS):
            event = step * LAYERS + layer
            nearest = sorted(b for b, uses in FUTURE.uses.items() if event + 1 in uses)
            assert [*late.candidates(view_of(layer, step=step))][: len(nearest)] == nearest


def test_an_oracle_without_precision_names_others_of_the_same_layer() -> None:
    """A precision of 1/2 asks for as many wrong as right ones; a layer with 4 experts, of which 3 are used, has one."""
    policy = policy_of("oracle", future=Timetable({4: [1], 5: [1], 6: [1], 8: [2]}), horizon=2, precision=0.5)
    named = [*policy.candidates(view_of(0))]
    assert [b for b in named if b < 8] == [4, 5, 6, 7]
    assert 8 in named
    assert len([b for b in named if b >= 8]) == 2


def test_the_oracle_without_a_future_is_refused() -> None:
    with pytest.raises(ValueError, match="oracle must be given the future routing, got none"):
        policy_of("oracle")


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("impact", {"depth": 0}, "depth must be from 1 to 3, got 0"),
        ("impact", {"depth": 4}, "depth must be from 1 to 3, got 4"),
        ("impact", {"most": 0}, "most must be a whole number of at least 1, got 0"),
        ("impact", {"tried": 1.5}, "tried must be a whole number, got 1.5"),
        ("next-router", {"width": -1}, "width must be a whole number of at least 0, got -1"),
        ("mrs-next", {"width": -1}, "width must be a whole number of at least 0, got -1"),
        ("mrs-next", {"batch": "least"}, "batch must be one of mean, first, max, got 'least'"),
        ("popularity", {"width": "x"}, "width must be a whole number, got 'x'"),
        ("eam", {"library": 0}, "library must be from 1 to 16384, got 0"),
        ("eam", {"most": -1}, "most must be a whole number of at least 0, got -1"),
        ("eam", {"ahead": -1}, "ahead must be a whole number of at least 0, got -1"),
        ("oracle", {"horizon": 0}, "horizon must be a whole number of at least 1, got 0"),
        ("oracle", {"lateness": -1}, "lateness must be a whole number of at least 0, got -1"),
        ("oracle", {"recall": 0}, "recall must be above 0 and at most 1, got 0"),
        ("oracle", {"recall": 1.5}, "recall must be above 0 and at most 1, got 1.5"),
        ("oracle", {"precision": float("nan")}, "precision must be above 0 and at most 1, got nan"),
    ],
)
def test_constants_that_make_no_sense_are_refused(name: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match="must") as caught:
        policy_of(name, future=FUTURE, **options)
    assert str(caught.value) == message
