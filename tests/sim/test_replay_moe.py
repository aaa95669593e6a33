"""The eviction policies of MoE papers and the fitted ones: their formulas worked out by hand, and their twins."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sim.policies import EVICTION, EvictionPolicy, PolicyContext
from sim.policies.evict.belady_imitator import AGES, Networks, _slopes, examples, train, usage
from sim.replay import Capacity, Feed, Replay, Settings, replay
from sim.replay.calibration import TraceCalibration
from tests.sim.hand import trace_of
from tests.sim.replaying import calibration_for, capacities, decisions, feeds
from traces.errors import InputError
from traces.schema import Trace
from traces.shipped import find_trace
from traces.store import load
from traces.workload import lock_step

FEW = settings(max_examples=10, deadline=None)
LEFT, STREAMED = 0, 1  # as in Replay.log


def policy_of(name: str, *, layers: int = 1, experts: int = 4, top_k: int = 1, **rest: Any) -> EvictionPolicy:
    return EVICTION[name](PolicyContext(layers, experts, top_k, weights=(1,) * layers, **rest))


def leaving(policy: EvictionPolicy, blocks: Sequence[int], last_used: Sequence[int]) -> list[int]:
    """The order in which ``blocks`` leave; ``last_used`` names all blocks, least recently used first."""
    recency = [last_used.index(block) for block in range(len(last_used))]
    return policy.order(blocks, recency)


def of_sequence(experts: Sequence[int], *, among: int = 4) -> Trace:
    """One layer; every pass is one token with one expert."""
    return trace_of([[[expert]] for expert in experts], experts=among)


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


# static


class Counted:
    """A calibration trace of which the uses are written down."""

    def __init__(self, uses: Sequence[int]) -> None:
        self._uses = uses

    def uses(self) -> Sequence[int]:
        return self._uses

    def events(self) -> Iterator[tuple[int, Sequence[int]]]:
        return iter(())


@pytest.mark.parametrize(
    ("shared", "capacity", "chosen"),
    [
        (False, 200, [0, 2, 3, 4, 5]),  # layer 0: two of 100 bytes, 2 and then 0 (as 1, but lower); layer 1: all
        (True, 270, [2, 3, 5]),  # 5, 3 and 2; then 0, which does not fit, ends it, though 4 would
    ],
)
def test_static_fills_a_pool_with_the_most_used(shared: bool, capacity: int, chosen: list[int]) -> None:
    given_uses = Counted([4, 4, 5, 6, 1, 9])
    context = PolicyContext(2, 3, 1, calibration=given_uses, capacity=capacity, weights=(100, 60), shared=shared)
    assert [*EVICTION["static"](context).preload()] == chosen


def test_static_never_evicts_and_leaves_what_room_is_left_to_the_first_who_fit() -> None:
    """220 of 280 bytes are set: blocks 2, 3 and 5 stay, 4 takes the rest, and 0 and 1 pass through for good."""
    trace = unequal(trace_of([[[0], [1]], [[2], [2]], [[1], [0]], [[0], [1]], [[0], [1]]], experts=3))
    way = Settings("static", Capacity(280, "bytes", ""), scope="global")
    outcome = replay(Feed.of(trace), way, calibration=Counted([4, 4, 5, 6, 1, 9]), log=True)
    assert decisions(outcome.log) == [(0, 0, STREAMED), (4, 1, STREAMED), (6, 0, STREAMED), (8, 0, STREAMED)]
    assert (outcome.static_blocks, outcome.static_load_bytes) == (3, 220)
    assert outcome.row()["hits_union"] == 5  # 2 and 5 in pass 1, 3 in pass 2, 4 in passes 3 and 4


def test_static_hits_what_it_was_given() -> None:
    """Its hits on a layer's pool are the uses of the blocks that the other trace prefers."""
    outcome = shipped_replay("static", "25%")
    mine, other = (TraceCalibration(Feed.of(shipped(name))).uses() for name in ("mixed", "code"))
    chosen = [np.argsort(-np.array(other[first : first + 32]), kind="stable")[:8] for first in range(0, 256, 32)]
    expected = sum(mine[32 * layer + expert] for layer, experts in enumerate(chosen) for expert in experts)
    assert outcome.row()["hits_union"] == expected
    assert outcome.row()["evictions"] == 0


# belady-imitator


def test_the_imitator_reads_recency_and_two_frequencies() -> None:
    """Passes use 0, then 1, 1 and nothing: as of the last, features are of ages 3, 1 and of uses faded since."""
    used = np.array([[1, 0, 0], [0, 1, 0], [0, 1, 0], [0, 0, 0]], bool)[:, None]
    features, reuse = examples(used, horizon=1, samples=9)
    assert features.shape == (1, 9, 3)  # three passes of three experts; the last is not known
    seen = features.reshape(3, 3, 3)  # pass, expert, feature
    assert seen[:, 0, 0].tolist() == [1, 1 / 2, 1 / 3]
    assert seen[:, 1, 0].tolist() == [1 / (AGES + 1), 1, 1]
    assert seen[:, 0, 1].tolist() == [1 / 8, 7 / 64, 49 / 512]
    assert seen[2, 1, 1:].tolist() == [7 / 64 + 1 / 8, 63 / 4096 + 1 / 64]
    assert reuse.tolist() == [[1.0] * 9]


def test_the_imitator_learns_the_passes_until_the_next_use() -> None:
    used = np.array([[1, 0], [0, 1], [0, 0], [1, 0], [0, 0], [0, 0], [0, 0]], bool)[:, None]
    _, reuse = examples(used, horizon=4, samples=9)
    assert (reuse.reshape(3, 2) * 4).tolist() == [[3, 1], [2, 4], [1, 4]]


def test_the_imitator_ranks_by_its_networks() -> None:
    policy: Any = policy_of("belady-imitator", layers=2, experts=2, calibration=TraceCalibration(Feed.of(two_layers())))
    into = np.array([[[1.0, -2.0], [3.0, 1.0], [0.0, 0.0]], [[0.0, 0.0], [0.0, 0.0], [0.0, 8.0]]])
    policy.networks = Networks(into, np.array([[0.0, 1.0], [0.0, 0.0]]), np.ones((2, 2)), np.array([0.5, 0.25]))
    policy.observe(0, [0], [1])
    policy.observe(1, [3], [1])
    policy.observe(4, [1], [1])
    # block 0, two passes on: recency 1/3, faded 49/512 and 63^2/64^3; units max(0, 1/3 + 147/512), max(0, 1 - 2/3 + ..)
    assert policy.key(0) == pytest.approx(-(0.5 + 1 / 3 + 3 * 49 / 512 + 1 - 2 / 3 + 49 / 512))
    assert policy.key(1) == pytest.approx(-(0.5 + 1 + 3 / 8 + 0))  # the second unit is 1 - 2 + 1/8: silent
    # block 3, of layer 1, which has had one pass since: faded once
    assert policy.key(3) == pytest.approx(-(0.25 + 8 * 63 / 4096))
    assert policy.key(2) == pytest.approx(-0.25)


def test_the_gradients_are_those_of_the_error() -> None:
    rng = np.random.default_rng(1)
    networks = Networks(*(rng.normal(size=shape) for shape in [(2, 3, 4), (2, 4), (2, 4), (2,)]))
    features, reuse = rng.random((2, 5, 3)), rng.random((2, 5))

    def error(place: int, step: Any) -> float:
        moved = networks._replace(**{networks._fields[place]: networks[place] + step})
        level = np.maximum(np.einsum("lnf,lfh->lnh", features, moved.into) + moved.bias[:, None], 0)
        found = np.einsum("lnh,lh->ln", level, moved.out) + moved.out_bias[:, None]
        return float(((found - reuse) ** 2).mean(axis=1).sum() / 2)

    for place, slope in enumerate(_slopes(networks, features, reuse)):
        direction = rng.normal(size=slope.shape)
        rise = (error(place, 1e-6 * direction) - error(place, -1e-6 * direction)) / 2e-6
        assert float((slope * direction).sum()) == pytest.approx(rise, rel=1e-6)


def test_training_fits_and_depends_on_the_seed_alone() -> None:
    rng = np.random.default_rng(0)
    features = rng.random((2, 2000, 3))
    reuse = np.stack([features[0, :, 0] - 0.5 * features[0, :, 1], 0.3 + 0 * features[1, :, 0]])
    one, same, other = (train(features, reuse, 8, 300, np.random.default_rng(seed)) for seed in (5, 5, 6))
    level = np.maximum(features @ one.into + one.bias[:, None], 0)
    found = (level @ one.out[:, :, None])[:, :, 0] + one.out_bias[:, None]
    assert np.sqrt(((found - reuse) ** 2).mean(axis=1)).max() < 0.1 * reuse[0].std()
    assert all((a == b).all() for a, b in zip(one, same, strict=True))
    assert (one.into != other.into).any()


def test_the_imitator_learns_to_keep_what_a_loop_needs_next() -> None:
    """A loop over four experts: lru with three slots never hits; who has learned that the longest unused comes next
    keeps it. The loop that it learned from runs in another order."""
    judged, learned = of_sequence([0, 1, 2, 3] * 50), of_sequence([0, 2, 1, 3] * 50)
    calibration = TraceCalibration.of(learned, judged)
    capacity = Capacity(3, "slots", "")
    hits = {
        name: replay(Feed.of(judged), Settings(name, capacity), calibration=calibration).row()["hit_ratio_union"]
        for name in ("lru", "belady-imitator", "belady")
    }
    assert hits["lru"] == 0
    assert 0.6 < hits["belady-imitator"] <= hits["belady"]


def test_the_imitator_between_lru_and_belady_on_another_trace() -> None:
    for percent in ("25%", "50%"):
        lru, imitator, belady = (
            shipped_replay(name, percent).row()["hits_union"] for name in ("lru", "belady-imitator", "belady")
        )
        assert lru < imitator < belady


def test_the_imitator_says_what_a_decision_costs() -> None:
    calibration = TraceCalibration(Feed.of(two_layers()))
    policy: Any = policy_of(
        "belady-imitator", layers=2, experts=2, capacity=5, calibration=calibration, options={"hidden": 2}
    )
    # 1 / (age + 1): 2; two faded frequencies: 2; a unit: 3 products, 3 sums, threshold, into the sum: 2; sign: 1
    assert policy.flops_a_block == 2 + 2 + 2 * 9 + 1
    assert policy.flops_a_decision == (5 + 1) * policy.flops_a_block


def test_a_policy_that_is_made_again_is_not_trained_again() -> None:
    calibration = TraceCalibration(Feed.of(two_layers()))
    first, second, seeded = (
        policy_of("belady-imitator", layers=2, experts=2, calibration=calibration, seed=seed) for seed in (0, 0, 1)
    )
    assert first.networks is second.networks  # type: ignore[attr-defined]
    assert first.networks is not seeded.networks  # type: ignore[attr-defined]


# The calibration trace.


def test_the_calibration_gives_uses_and_events() -> None:
    trace = trace_of([[[2, 0], [1]], [[], [1]], [[], []], [[0], [3]]], experts=4)
    calibration = TraceCalibration(Feed.of(trace))
    assert [*calibration.events()] == [(0, [0, 2]), (1, [5]), (3, [5]), (6, [0]), (7, [7])]
    assert [*calibration.uses()] == [2, 0, 1, 0, 0, 2, 0, 1]


def test_the_calibration_counts_a_batch_once() -> None:
    trace = shipped("batch4")
    calibration = TraceCalibration(Feed.of(trace, 4))
    events = [*calibration.events()]
    expected = []
    workload = lock_step(trace, 4)
    for step in workload.steps:
        for layer in range(8):
            blocks = 32 * layer + np.unique(trace.expert_ids[step.rows, layer])
            expected.append((8 * step.index + layer, blocks.tolist()))
    assert events == expected
    counts = np.bincount(np.concatenate([blocks for _, blocks in events]), minlength=256)
    assert [*calibration.uses()] == counts.tolist()


def test_the_calibration_is_read_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = [*TraceCalibration(Feed.of(shipped("code"))).events()]
    monkeypatch.setattr("sim.replay.calibration._CHUNK", 100)
    assert [*TraceCalibration(Feed.of(shipped("code"))).events()] == whole


def test_the_usage_ends_where_it_is_asked_to() -> None:
    context = PolicyContext(2, 4, 2)
    calibration = TraceCalibration(Feed.of(trace_of([[[2, 0], [1]], [[], []], [[0], [3]]], experts=4)))
    used = usage(calibration, context, 9)
    assert np.argwhere(used).tolist() == [[0, 0, 0], [0, 0, 2], [0, 1, 1], [2, 0, 0], [2, 1, 3]]
    assert len(usage(calibration, context, 2)) == 1  # the second pass routed nothing, the third is beyond


def test_a_calibration_trace_that_is_the_judged_one_is_refused() -> None:
    again = trace_of([[[0], [1]], [[1], [1]]], experts=2)
    with pytest.raises(InputError, match=r"^calibration trace must be another than the one replayed, got [0-9a-f]{12}"):
        TraceCalibration.of(again, trace_of([[[0], [1]], [[1], [1]]], experts=2))


@pytest.mark.parametrize(
    ("other", "got"),
    [
        (trace_of([[[0]]], experts=2), "1 layers, 2 experts, top 1"),
        (trace_of([[[0], [1]]], experts=3), "2 layers, 3 experts, top 1"),
        (trace_of([[[0], [0, 1]]], experts=2), "2 layers, 2 experts, top 2"),
    ],
)
def test_a_calibration_trace_of_other_dimensions_is_refused(other: Trace, got: str) -> None:
    rule = "calibration trace must have 2 layers, 2 experts, top 1 as the one replayed, got "
    with pytest.raises(InputError, match=rule + got):
        TraceCalibration.of(other, two_layers())


# Constants, and what is missing.


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("mrs", {"batch": "median"}, "batch must be one of mean, first, max, got 'median'"),
        ("mrs", {"alpha": 0.0}, "alpha must be above 0 and at most 1, got 0.0"),
        ("mrs", {"p": -1}, r"p must be at least 1 \(or 0 for 2 \* top_k\), got -1"),
        ("ewma-reuse", {"beta": 1.5}, "beta must be above 0 and at most 1, got 1.5"),
        ("window-score", {"swaps": 0}, "swaps must be at least 1, got 0"),
        ("belady-imitator", {"horizon": 0}, "horizon must be at least 1, got 0"),
    ],
)
def test_a_constant_out_of_its_range_is_refused(name: str, options: Mapping[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"^{message}$"):
        policy_of(name, calibration=Counted([]), options=options)


@pytest.mark.parametrize("name", ["static", "belady-imitator"])
def test_a_fitted_policy_without_a_calibration_trace_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match=f"{name} must be given a calibration trace, got none"):
        policy_of(name)


# The twins, with other constants than those that stand by themselves.

OPTIONS: dict[str, st.SearchStrategy[dict[str, Any]]] = {
    "mrs": st.fixed_dictionaries(
        {"alpha": st.floats(0.01, 1), "p": st.integers(0, 5), "batch": st.sampled_from(["mean", "first", "max"])}
    ),
    "two-generation": st.just({}),
    "ewma-reuse": st.fixed_dictionaries({"beta": st.floats(0.01, 1)}),
    "lowest-layer": st.just({}),
    "blend": st.fixed_dictionaries({name: st.floats(0, 1) for name in ("freshness", "regularity", "height")}),
    "eam": st.just({}),
    "hobbit": st.fixed_dictionaries(
        {name: st.floats(0, 1) for name in ("recency", "frequency", "high_precision", "layer")}
    ),
    "window-score": st.fixed_dictionaries({"window": st.integers(1, 4), "swaps": st.integers(1, 3)}),
    "static": st.just({}),
    "belady-imitator": st.fixed_dictionaries(
        {"hidden": st.integers(1, 4), "horizon": st.integers(1, 9), "updates": st.just(5)}
    ),
}


def departures(outcome: Replay) -> list[tuple[int, ...]]:
    """The log in order; without the numbers of decisions where every pass is one use a layer, for there both contracts
    mean the same, and number by events or by uses."""
    entries = decisions(outcome.log)
    return [entry[1:] for entry in entries] if outcome.feed.single else entries


def same(feed: Feed, way: Settings) -> None:
    """The compiled replay is that of the object, decision by decision."""
    calibration = calibration_for(feed)
    compiled, by_object = (
        replay(feed, way, calibration=calibration, by_object=by_object, log=True) for by_object in (False, True)
    )
    assert departures(compiled) == departures(by_object)
    assert compiled.table.tolist() == by_object.table.tolist()
    assert compiled.histogram.tolist() == by_object.histogram.tolist()


@pytest.mark.parametrize("name", [*OPTIONS])
@pytest.mark.parametrize("contract", ["atomic", "serial"])
@pytest.mark.parametrize("scope", ["layer", "global"])
@FEW
@given(data=st.data())
def test_the_twin_is_the_policy_whatever_its_constants(name: str, contract: Any, scope: Any, data: Any) -> None:
    feed = data.draw(feeds())
    sequences, in_bytes = data.draw(st.sampled_from(["carry", "fresh"])), data.draw(st.booleans())
    capacity = data.draw(capacities(feed.trace.header, scope, in_bytes))
    options = data.draw(OPTIONS[name])
    same(feed, Settings(name, capacity, scope, contract, sequences=sequences, options=options))


@pytest.mark.parametrize("batch", ["mean", "first", "max"])
@FEW
@given(data=st.data())
def test_mrs_reads_gates_where_there_are_no_scores(batch: str, data: Any) -> None:
    feed = data.draw(feeds())
    arrays = {**dict(feed.trace.arrays()), "scores": None}
    gated = Feed.of(Trace.of(feed.trace.header, **arrays), feed.plan.batch)
    capacity = data.draw(capacities(feed.trace.header, "global", False))
    same(gated, Settings("mrs", capacity, "global", options={"batch": batch}))


@pytest.mark.parametrize(("name", "contract"), [*zip(OPTIONS, ["atomic", "serial"] * 5, strict=True)])
def test_the_twin_is_the_policy_on_a_recording(name: str, contract: Any) -> None:
    """Prompts whose unions do not fit, in lock-step batches; new policies for each."""
    trace = shipped("batch4")
    capacity = Capacity.slots("25%", trace.header, "layer")
    way = Settings(name, capacity, contract=contract, sequences="fresh")
    same(Feed.of(trace, 4), way)


# Helpers that read or replay traces.


@cache
def shipped(name: str) -> Trace:
    return load(find_trace(name))


@cache
def calibration_of_code() -> TraceCalibration:
    return TraceCalibration.of(shipped("code"), shipped("mixed"))


def shipped_replay(name: str, percent: str) -> Replay:
    """``mixed`` per layer under the atomic contract; fitted policies have learned from ``code``."""
    trace = shipped("mixed")
    capacity = Capacity.slots(percent, trace.header, "layer")
    return replay(Feed.of(trace), Settings(name, capacity), calibration=calibration_of_code())


def log_of(trace: Trace, name: str, *, slots: int, options: Mapping[str, Any]) -> list[tuple[int, ...]]:
    way = Settings(name, Capacity(slots, "slots", ""), options=options)
    return decisions(replay(Feed.of(trace), way, log=True).log)


def two_layers() -> Trace:
    return trace_of([[[0], [1]], [[1], [1]]], experts=2)


def with_scores(trace: Trace, rows: Sequence[Sequence[float]]) -> Trace:
    arrays = {**dict(trace.arrays()), "scores": np.array(rows)[:, None]}
    return Trace.of(trace.header, **arrays)


def unequal(trace: Trace) -> Trace:
    """The trace with experts of 100 bytes in layer 0 and 60 in layer 1."""
    return Trace.of(trace.header.model_copy(update={"expert_bytes": (100, 60)}), **dict(trace.arrays()))
