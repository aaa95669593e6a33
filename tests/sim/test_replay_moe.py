"""The eviction policies of MoE papers: their formulas worked out by hand."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pytest

from sim.replay import Capacity, Feed, Settings
from sim.replay.run import replay
from tests.sim.formulas import LEFT, STREAMED, Counted, leaving, log_of, of_sequence, policy_of, shipped, with_scores
from tests.sim.replaying import decisions


def misses(sequence: Sequence[int], name: str, slots: int, **options: Any) -> list[int]:
    """Whether each pass missed, by replays of ever longer pieces."""
    totals = [0]
    for end in range(1, len(sequence) + 1):
        way = Settings(name, Capacity(slots, "slots", ""), options=options)
        totals.append(replay(Feed.of(of_sequence(sequence[:end])), way).row()["misses_union"])
    return np.diff(totals).tolist()


# mrs

ROWS = {"mean": [0.25, 0.25, 0.25, 0.25], "first": [0.5, 0.25, 0.25, 0.0], "max": [0.5, 0.25, 0.25, 0.5]}


def test_mrs_smooths_the_two_k_largest_scores() -> None:
    policy = policy_of("mrs")
    policy.observe_scores(0, np.array([[0.5, 0.25, 0.125, 0.125]]))
    assert [*policy.keys(range(4))] == [0.25, 0.125, 0.0, 0.0]
    policy.observe_scores(0, np.array([[0.125, 0.125, 0.25, 0.5]]))
    assert [*policy.keys(range(4))] == [policy.key(block) for block in range(4)] == [0.125, 0.0625, 0.125, 0.25]


def test_mrs_scores_layers_apart_and_takes_its_constants_from_the_options() -> None:
    policy = policy_of("mrs", layers=2, options={"alpha": 0.25, "p": 3})
    policy.observe_scores(1, np.array([[0.25, 0.5, 0.125, 0.125]]))
    assert [*policy.keys(range(8))] == [0, 0, 0, 0, 0.0625, 0.125, 0.03125, 0]


@pytest.mark.parametrize(
    ("batch", "smoothed"),
    [("mean", [0.125, 0.125, 0, 0]), ("first", [0.25, 0.125, 0, 0]), ("max", [0.25, 0, 0, 0.25])],
)
def test_mrs_makes_one_row_of_a_batch(batch: str, smoothed: list[float]) -> None:
    """The two largest of each row of ROWS, equal ones by the lowest expert."""
    policy = policy_of("mrs", options={"batch": batch})
    policy.observe_scores(0, np.array([[0.5, 0.25, 0.25, 0.0], [0.0, 0.25, 0.25, 0.5]]))
    assert [*policy.keys(range(4))] == smoothed
    assert smoothed == [0.5 * score if kept else 0 for score, kept in zip(ROWS[batch], smoothed, strict=True)]


def test_mrs_can_keep_an_expert_that_was_never_chosen_before_the_last() -> None:
    """Scores of 1 rise from the second place to the first; when 2 comes, 0 leaves, though it was used last."""
    scores = [[0.4, 0.35, 0.25], [0.1, 0.5, 0.4], [0.4, 0.35, 0.25], [0.0, 0.3, 0.7]]
    trace = with_scores(of_sequence([0, 1, 0, 2], among=3), scores)
    outcome = log_of(trace, "mrs", slots=2, options={"p": 3})
    # S(0) = .5*0 + .25*.4 + .125*.1 + .0625*.4 = .1375; S(1) = .15 + .0875 + .0625 + .021875 = .321875
    assert outcome == [(3, 0, LEFT)]


# least-stale, in four readings


def test_two_generation_takes_what_the_pass_has_not_touched_first_in_first_out() -> None:
    policy = policy_of("two-generation")
    policy.observe(0, [0, 1, 2], [1, 1, 1])
    policy.observe(1, [1], [1])
    policy.admit(3)  # prefetched: it has come last, and nothing has touched it
    assert leaving(policy, range(4), [3, 0, 2, 1]) == [0, 2, 3, 1]
    assert leaving(policy_of("lru"), range(4), [3, 0, 2, 1])[0] == 3


@pytest.mark.parametrize("contract", ["atomic", "serial"])
@pytest.mark.parametrize(("name", "scope"), [("code", "layer"), ("code", "global"), ("batch4", "layer")])
def test_two_generation_is_lru_on_demand(name: str, contract: Any, scope: Any) -> None:
    trace = shipped(name)
    feed = Feed.of(trace, 4 if name == "batch4" else 1)
    capacity = Capacity.slots("25%", trace.header, scope)
    logs = [
        decisions(replay(feed, Settings(one, capacity, scope, contract), by_object=by_object, log=True).log)
        for one, by_object in (("lru", False), ("two-generation", True))
    ]
    assert logs[0] == logs[1]


def test_ewma_reuse_smooths_the_intervals() -> None:
    policy = policy_of("ewma-reuse")
    for event in (0, 4, 6):
        policy.observe(event, [0], [1])
    policy.observe(7, [1], [1])
    assert [policy.key(0), policy.key(1)] == [-(0.75 * 4 + 0.25 * 2), -math.inf]
    policy.forget(0)
    assert policy.key(0) == -3.5


def test_ewma_reuse_evicts_the_largest_interval() -> None:
    """When 2 comes, 0 has come every second pass, 1 after three, so that 1 leaves, though used last."""
    assert misses([0, 1, 0, 0, 1, 2, 0], "ewma-reuse", 2) == [1, 1, 0, 0, 0, 1, 0]
    assert misses([0, 1, 0, 0, 1, 2, 0], "lru", 2)[-1] == 1


def test_lowest_layer_goes_first_and_in_it_the_least_recently_used() -> None:
    policy = policy_of("lowest-layer", layers=3, experts=2)
    assert leaving(policy, [5, 4, 3, 1, 0], [4, 3, 1, 0, 5, 2]) == [1, 0, 3, 4, 5]


def test_blend_adds_freshness_regularity_and_height() -> None:
    policy = policy_of("blend", layers=2, experts=2)
    policy.observe(0, [0], [1])
    policy.observe(2, [0, 1], [1, 1])
    policy.observe(7, [3], [1])
    # pass 3: block 0 was used two passes ago, and one pass after its first use; block 1 once; block 3 just now
    assert policy.key(0) == pytest.approx(0.5 / 3 + 0.25 * 1 + 0.25 / 2)
    assert policy.key(1) == pytest.approx(0.5 / 3 + 0.25 / 2)
    assert policy.key(3) == pytest.approx(0.5 + 0.25)


# eam and hobbit


def test_eam_multiplies_popularity_activation_and_nearness() -> None:
    policy, tiny = policy_of("eam", layers=2, experts=2), 1e-6
    policy.observe(0, [0, 1], [3, 1])
    policy.observe(1, [2], [4])
    policy.observe(2, [0], [1])
    # visits 2 1 | 1 0 of 4; tokens 4 1 of 5 | 4 0 of 4, over two rows; layer 0 runs: nearness 1 | 1/2 over 3
    near = [1 / 3 + tiny] * 2 + [1 / 6 + tiny] * 2
    visited = [2 / 4 + tiny, 1 / 4 + tiny, 1 / 4 + tiny, tiny]
    routed = [4 / 10 + tiny, 1 / 10 + tiny, 1 / 2 + tiny, tiny]
    expected = [a * b * c for a, b, c in zip(visited, routed, near, strict=True)]
    assert [*policy.keys(range(4))] == pytest.approx(expected, rel=1e-12)
    policy.begin_sequence()  # rows without tokens are uniform; visits stay
    expected = [a * (1 / 4 + tiny) * c for a, c in zip(visited, near, strict=True)]
    assert [*policy.keys(range(4))] == pytest.approx(expected, rel=1e-12)


def test_eam_is_nearest_to_the_layer_that_runs() -> None:
    policy = policy_of("eam", layers=3, experts=1)
    for event in (1, 2, 3, 5, 6, 7):  # two uses of each; what is left is the distance from layer 1
        policy.observe(event, [event % 3], [1])
    assert sorted(range(3), key=policy.key) == [0, 2, 1]


def test_hobbit_weighs_recency_frequency_and_the_layer_within_the_request() -> None:
    weights = {"recency": 0.1, "frequency": 0.2, "high_precision": 0.3, "layer": 0.4}
    policy = policy_of("hobbit", layers=2, experts=2, options=weights)
    for event, block in enumerate([0, 2, 0, 3]):
        policy.observe(event, [block], [1])
    # T = 2, layer 1 runs, layer 0 is one ahead of two
    assert policy.key(0) == pytest.approx(0.1 * 2 / 2 + 0.5 * 2 / 2 + 0.4 * 0.5)
    assert policy.key(1) == pytest.approx(0.4 * 0.5)
    assert policy.key(2) == pytest.approx(0.1 * 1 / 2 + 0.5 * 1 / 2 + 0.4)
    assert policy.key(3) == pytest.approx(0.1 * 2 / 2 + 0.5 * 1 / 2 + 0.4)
    policy.begin_sequence()
    policy.observe(4, [1], [1])
    assert [policy.key(1), policy.key(0), policy.key(2)] == pytest.approx([1.0, 0.4, 0.2])


# window-score


def test_window_score_swaps_by_the_workload_of_the_window_and_no_more_than_it_may() -> None:
    sequence = [0, 0, 1, 2, 2, 3, 1, 0, 0, 0]
    # cache   : 0 0 01 12 12 23 31 31 10 10   workload of the last two passes decides
    # pass 3: 0 has none, and leaves; 5: 1; 6: 2; pass 7 is of the window of 6, in which one has left: 0 is not kept
    options = {"window": 2, "swaps": 1}
    entries = [(3, 0, LEFT), (5, 1, LEFT), (6, 2, LEFT), (7, 0, STREAMED), (8, 3, LEFT)]
    assert log_of(of_sequence(sequence), "window-score", slots=2, options=options) == entries
    assert misses(sequence, "window-score", 2, **options) == [1, 0, 1, 1, 0, 1, 1, 1, 1, 0]
    free = log_of(of_sequence(sequence), "window-score", slots=2, options={"window": 2, "swaps": 2})
    assert (7, 3, LEFT) in free


def test_window_score_bypasses_what_has_less_workload() -> None:
    """Two tokens of a pass go to 0 and 1, one to 2: 2 is served and not kept."""
    policy = policy_of("window-score")
    policy.observe(0, [0, 1], [2, 2])
    policy.admit(0)
    policy.admit(1)
    policy.observe(1, [2], [1])
    assert leaving(policy, [0, 1, 2], [0, 1, 2, 3]) == [2, 0, 1]
    assert [*policy.keys([0, 1, 2])] == [policy.key(block) for block in range(3)] == [2, 2, 1]


def test_window_score_keeps_residents_when_the_budget_is_spent() -> None:
    policy = policy_of("window-score")
    for block in (0, 1):
        policy.admit(block)
    policy.observe(0, [2, 3], [5, 4])
    assert leaving(policy, [0, 1, 2, 3], [0, 1, 2, 3]) == [0, 3, 2, 1]
    policy.forget(0)
    assert leaving(policy, [1, 2, 3], [0, 1, 2, 3]) == [3, 2, 1]
    policy.observe(4, [2], [1])  # the next window of four
    assert leaving(policy, [1, 2, 3], [0, 1, 2, 3])[0] == 1


# Constants, and what is missing.


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("mrs", {"batch": "median"}, "batch must be one of mean, first, max, got 'median'"),
        ("mrs", {"alpha": 0.0}, "alpha must be above 0 and at most 1, got 0.0"),
        ("mrs", {"p": -1}, r"p must be at least 1 \(or 0 for 2 \* top_k\), got -1"),
        ("ewma-reuse", {"beta": 1.5}, "beta must be above 0 and at most 1, got 1.5"),
        ("window-score", {"swaps": 0}, "swaps must be from 1 to 65536, got 0"),
        ("belady-imitator", {"horizon": 0}, "horizon must be from 1 to 1048576, got 0"),
    ],
)
def test_a_constant_out_of_its_range_is_refused(name: str, options: Mapping[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"^{message}$"):
        policy_of(name, calibration=Counted([]), options=options)
