"""The policies that are fitted, static and belady-imitator, and the calibration trace that they learn from."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from sim.policies import EVICTION, PolicyContext
from sim.policies.evict.belady_imitator import AGES, Networks, _slopes, examples, train, usage
from sim.replay import Capacity, Feed, Settings
from sim.replay.calibration import TraceCalibration
from sim.replay.run import replay
from tests.sim.formulas import STREAMED, Counted, of_sequence, policy_of, shipped, shipped_replay, two_layers, unequal
from tests.sim.hand import trace_of
from tests.sim.replaying import decisions
from traces.errors import InputError
from traces.schema import Trace
from traces.workload import lock_step


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


@pytest.mark.parametrize("name", ["static", "belady-imitator"])
def test_a_fitted_policy_without_a_calibration_trace_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match=f"{name} must be given a calibration trace, got none"):
        policy_of(name)
