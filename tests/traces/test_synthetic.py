"""The generators: seeded, valid, with the popularity, locality and recall that was asked for."""

from __future__ import annotations

import dataclasses
import math
import tracemalloc
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from traces import NOT_ROUTED, InputError, Phase, Trace
from traces.stats import loads, lru_hit_ratio, neighbour_overlap
from traces.synthetic import GENERATORS, Sizes, generate, markov, phase_change, zipf

LONG = Sizes(sequences=4, prompt_tokens=500, new_tokens=1500, layers=2, experts=16, top_k=2)


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def with_(**changed: Any) -> Sizes:
    return dataclasses.replace(LONG, **changed)


@pytest.mark.parametrize("name", GENERATORS)
def test_rows_are_one_sequence_after_the_other(name: str) -> None:
    sizes = Sizes(sequences=2, prompt_tokens=3, new_tokens=2, layers=2, experts=6, top_k=2, expert_bytes=(5, 7))
    trace = GENERATORS[name](rng(), sizes)
    trace.check()
    assert trace.sequence.tolist() == [0] * 5 + [1] * 5
    assert trace.position.tolist() == [0, 1, 2, 3, 4] * 2
    assert trace.phase.tolist() == [0, 0, 0, 1, 1] * 2
    assert trace.step.tolist() == [0, 0, 0, 1, 2, 3, 3, 3, 4, 5]
    assert trace.header.synthetic
    assert trace.header.model == name
    assert trace.header.expert_bytes == (5, 7)


def test_without_a_prompt_the_first_pass_decodes() -> None:
    trace = zipf(rng(), Sizes(sequences=2, prompt_tokens=0, new_tokens=2))
    assert trace.step.tolist() == [0, 1, 2, 3]
    assert set(trace.phase.tolist()) == {Phase.DECODE}


@pytest.mark.parametrize("name", GENERATORS)
def test_equal_seeds_give_equal_traces_and_others_do_not(name: str) -> None:
    digests = [generate(name, seed, Sizes(scores=True, lookahead=2)).digest for seed in (3, 3, 4)]
    assert digests[0] == digests[1] != digests[2]


def test_options_do_not_change_the_routing() -> None:
    plain, full = zipf(rng(), Sizes()), zipf(rng(), Sizes(scores=True, lookahead=3))
    np.testing.assert_array_equal(plain.expert_ids, full.expert_ids)
    np.testing.assert_array_equal(plain.gates, full.gates)


def test_popularity_follows_zipf() -> None:
    trace = zipf(rng(), with_(top_k=1, skew=1.2))
    weight = np.arange(1, 17) ** -1.2
    for counts in loads(trace):
        share = np.sort(counts)[::-1] / counts.sum()
        np.testing.assert_allclose(share, weight / weight.sum(), atol=0.02)


def test_skew_zero_is_uniform_and_layers_have_orders_of_their_own() -> None:
    np.testing.assert_allclose(loads(zipf(rng(), with_(skew=0.0))) / 1000, 1.0, atol=0.15)
    favourites = loads(zipf(rng(1), with_(layers=8))).argmax(axis=1)
    assert len(set(favourites.tolist())) > 1


def test_all_experts_can_be_chosen() -> None:
    trace = zipf(rng(), Sizes(experts=4, top_k=4, lookahead=1, lookahead_recall=0.0))
    np.testing.assert_array_equal(np.sort(trace.expert_ids, axis=-1), np.broadcast_to(np.arange(4), (1024, 8, 4)))
    assert trace.lookahead is not None
    assert (trace.lookahead == NOT_ROUTED).all()  # there is no wrong expert to predict


def test_locality_zero_is_independent() -> None:
    local, independent = markov(rng(), LONG, locality=0.0), zipf(rng(), LONG)
    np.testing.assert_array_equal(local.expert_ids, independent.expert_ids)


def test_locality_one_never_changes_within_a_sequence() -> None:
    trace = markov(rng(), LONG, locality=1.0)
    assert neighbour_overlap(trace).tolist() == [1.0, 1.0]
    assert not np.array_equal(trace.expert_ids[0], trace.expert_ids[2000])


def test_locality_is_the_overlap_beyond_chance() -> None:
    sizes = with_(skew=0.0)
    chance = sizes.top_k / sizes.experts
    for locality in (0.0, 0.3, 0.7):
        overlap = neighbour_overlap(markov(rng(), sizes, locality=locality))
        assert (overlap >= locality).all()
        assert (overlap <= locality + (1 - locality) * (chance + 0.03)).all()


def test_locality_raises_hits_over_the_shuffled_trace() -> None:
    trace = markov(rng(), with_(sequences=2), locality=0.6)
    assert lru_hit_ratio(trace, 4) > lru_hit_ratio(trace, 4, rng()) + 0.1
    independent = zipf(rng(), with_(sequences=2))
    assert abs(lru_hit_ratio(independent, 4) - lru_hit_ratio(independent, 4, rng())) < 0.02


def top_expert(trace: Trace, start: int, end: int) -> int:
    return int(np.bincount(trace.expert_ids[start:end, 0].ravel()).argmax())


def test_phases_move_the_popularity_at_the_period() -> None:
    trace = phase_change(rng(2), with_(skew=2.0), period=1000)
    favourites = [top_expert(trace, start, start + 1000) for start in range(0, 8000, 1000)]
    halves = [top_expert(trace, start, start + 500) for start in range(0, 8000, 500)]
    assert halves == [favourite for favourite in favourites for _ in range(2)]
    assert len(set(favourites)) > 2


def test_one_long_phase_is_zipf() -> None:
    np.testing.assert_array_equal(phase_change(rng(), LONG, period=10**6).expert_ids, zipf(rng(), LONG).expert_ids)


@settings(max_examples=50)
@given(
    seed=st.integers(0, 9),
    experts=st.integers(1, 40),
    top_k=st.integers(1, 8),
    skew=st.floats(0, 8),
    depth=st.integers(1, 3),
)
def test_gates_and_scores_belong_to_the_chosen(seed: int, experts: int, top_k: int, skew: float, depth: int) -> None:
    top_k = min(top_k, experts)
    sizes = Sizes(sequences=1, prompt_tokens=2, new_tokens=3, layers=2, experts=experts, top_k=top_k, skew=skew)
    trace = zipf(rng(seed), dataclasses.replace(sizes, scores=True, lookahead=depth))
    assert trace.gates is not None
    assert trace.scores is not None
    gates, scores = trace.gates.astype(np.float64), trace.scores.astype(np.float64)
    assert (np.diff(gates, axis=-1) <= 0).all()
    np.testing.assert_allclose(gates.sum(axis=-1), 1, atol=5e-3)
    np.testing.assert_allclose(scores.sum(axis=-1), 1, atol=5e-3)
    best = np.argsort(scores, axis=-1)[..., ::-1][..., :top_k]
    np.testing.assert_array_equal(np.sort(best, axis=-1), np.sort(trace.expert_ids, axis=-1))
    chosen = np.take_along_axis(scores, trace.expert_ids.astype(np.int64), axis=-1)
    np.testing.assert_allclose(chosen / chosen.sum(axis=-1, keepdims=True), gates, atol=5e-3)


def kept_share(trace: Trace, depth: int) -> float:
    """Share of the true experts of layer l + depth that layer l predicted."""
    assert trace.lookahead is not None
    true = trace.expert_ids[:, depth:]
    predicted = trace.lookahead[:, : trace.header.layers - depth, depth - 1]
    return float((true[..., :, None] == predicted[..., None, :]).any(axis=-1).mean())


@pytest.mark.parametrize("recall", [0.0, 0.35, 0.9, 1.0])
def test_lookahead_has_the_recall_that_was_asked_for(recall: float) -> None:
    trace = zipf(rng(), with_(layers=4, top_k=4, lookahead=2, lookahead_recall=recall))
    for depth in (1, 2):
        assert kept_share(trace, depth) == pytest.approx(recall, abs=0.01)
    assert trace.lookahead is not None
    assert (trace.lookahead[:, :2] != NOT_ROUTED).all()
    assert (trace.lookahead[:, 3] == NOT_ROUTED).all()
    assert (trace.lookahead[:, 2, 1] == NOT_ROUTED).all()


def test_wrong_predictions_spread_over_the_wrong_experts() -> None:
    trace = zipf(rng(), with_(layers=2, skew=0.0, lookahead=1, lookahead_recall=0.0))
    assert trace.lookahead is not None
    counts = np.bincount(trace.lookahead[:, 0, 0].ravel(), minlength=16)
    np.testing.assert_allclose(counts / counts.mean(), 1, atol=0.15)


def test_made_by_tells_the_generator_the_seed_and_the_parameters() -> None:
    made_by = generate("markov", 5, Sizes(experts=6, top_k=3), locality=0.25).header.made_by
    assert made_by.startswith("markov(seed=5, locality=0.25, sequences=8, ")
    assert "experts=6, top_k=3" in made_by


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"sequences": 0}, "sequences must be from 1 to 2147483647, got 0"),
        ({"prompt_tokens": 0, "new_tokens": 0}, r"prompt-tokens \+ new-tokens must be at least 1, got 0"),
        ({"new_tokens": -1}, "new-tokens must be from 0 to 2147483647, got -1"),
        ({"layers": 0}, "layers must be from 1 to 65536, got 0"),
        ({"experts": 70000}, "experts must be from 1 to 65534, got 70000"),
        ({"top_k": 17}, "top-k must be from 1 to 16, got 17"),
        ({"skew": -0.1}, "skew must be from 0.0 to 8.0, got -0.1"),
        ({"skew": math.nan}, "skew must be from 0.0 to 8.0, got nan"),
        ({"expert_bytes": (1, 2, 3)}, "expert-bytes must have one entry or 2 entries, got 3"),
        ({"expert_bytes": -1}, "expert-bytes must be from 0 to 68719476736, got -1"),
        ({"lookahead": -1}, "lookahead must be from 0 to 65536, got -1"),
        ({"lookahead_recall": 1.5}, "lookahead-recall must be from 0.0 to 1.0, got 1.5"),
    ],
)
def test_sizes_that_make_no_trace(changed: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        with_(**changed)


@pytest.mark.parametrize(
    ("name", "own", "message"),
    [
        ("zipff", {}, "generator must be a known name, got 'zipff' .did you mean zipf"),
        ("zipf", {"period": 3}, "period must be left out for zipf, got 3"),
        ("phase_change", {"period": 0}, "period must be from 1 to 2147483647, got 0"),
        ("markov", {"locality": 1.1}, "locality must be from 0.0 to 1.0, got 1.1"),
    ],
)
def test_generators_refuse_what_they_do_not_know(name: str, own: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        generate(name, 0, Sizes(), **own)


def test_a_seed_is_not_negative() -> None:
    with pytest.raises(InputError, match="seed must be at least 0, got -1"):
        generate("zipf", -1, Sizes())


@pytest.mark.parametrize(
    ("name", "changed", "own"),
    [
        ("zipf", {}, {}),
        ("markov", {}, {"locality": 0.5}),
        ("zipf", {"scores": True}, {}),
        ("zipf", {"lookahead": 3}, {}),
        ("zipf", {"layers": 1, "top_k": 1}, {}),
        ("phase_change", {"experts": 256}, {"period": 1}),
    ],
)
def test_memory_is_asked_for_as_much_as_is_taken(
    name: str, changed: dict[str, Any], own: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes = Sizes(**{"sequences": 4, "prompt_tokens": 0, "new_tokens": 2000, "layers": 4, **changed})
    monkeypatch.setattr("traces.synthetic.CHUNK_ELEMENTS", 1)
    tracemalloc.start()
    generate(name, 0, sizes, **own)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    monkeypatch.setattr("traces.memory.free_bytes", lambda: 2 * peak)
    generate(name, 0, sizes, **own)
    monkeypatch.setattr("traces.memory.free_bytes", lambda: peak // 2)
    with pytest.raises(InputError, match="sequences x tokens x layers must fit the host's free memory"):
        generate(name, 0, sizes, **own)
