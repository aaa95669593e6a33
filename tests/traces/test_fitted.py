"""Generation by a law: the parts that the law names are in the trace, in the shares that it names."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from traces import NOT_ROUTED, InputError, Trace
from traces.fitted import Lanes, Law, directions, fits_of, generate, layer_fits
from traces.locality import overlap_profile
from traces.portrait import Between, between_sequences, cross_layer, lookahead_recall, shared_openings
from traces.stats import loads
from traces.synthetic import Shape

PLAIN = Law(source="hand", source_digest="0", bias=(0.0,))
SHAPE = Shape(sequences=8, prompt_tokens=32, new_tokens=96, layers=4, experts=24, top_k=3)


def made(shape: Shape = SHAPE, seed: int = 0, **law: Any) -> Trace:
    return generate(replace(PLAIN, **law), seed, shape)


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def test_rows_and_header_are_those_of_a_generator() -> None:
    shape = Shape(sequences=2, prompt_tokens=2, new_tokens=1, layers=2, experts=6, top_k=2, expert_bytes=(5, 7))
    law = replace(PLAIN, domains=("a", "b"), lookahead_router="residual")
    trace = generate(law, 7, shape, dtype="bf16")
    assert trace.sequence.tolist() == [0, 0, 0, 1, 1, 1]
    assert trace.position.tolist() == [0, 1, 2] * 2
    assert trace.step.tolist() == [0, 0, 1, 2, 2, 3]
    assert trace.phase.tolist() == [0, 0, 1] * 2
    header = trace.header
    assert (header.model, header.synthetic, header.dtype) == ("fitted", True, "bf16")
    assert (header.expert_bytes, header.domains) == ((5, 7), ("a", "b"))
    assert header.lookahead_router == "residual"
    assert header.made_by.startswith(
        "fitted(seed=7, sequences=2, prompt_tokens=2, new_tokens=1) like hand: source_digest=0, bias=(0.0,), domain=0.0"
    )


def test_equal_seeds_give_equal_traces_and_others_do_not() -> None:
    digests = [made(seed=seed, scores=True, lookahead_recall=(0.8,)).digest for seed in (3, 3, 4)]
    assert digests[0] == digests[1] != digests[2]


def test_options_do_not_change_the_routing() -> None:
    plain, full = made(), made(scores=True, lookahead_recall=(0.8, 0.7))
    np.testing.assert_array_equal(plain.expert_ids, full.expert_ids)
    np.testing.assert_array_equal(plain.gates, full.gates)


@settings(max_examples=30)
@given(
    sequences=st.integers(1, 4),
    tokens=st.tuples(st.integers(0, 5), st.integers(1, 5)),
    layers=st.integers(1, 4),
    experts=st.integers(1, 12),
    data=st.data(),
)
def test_every_law_makes_a_valid_trace(
    sequences: int, tokens: tuple[int, int], layers: int, experts: int, data: st.DataObject
) -> None:
    law = replace(
        PLAIN,
        bias=tuple(data.draw(st.lists(st.floats(-3, 3), min_size=1, max_size=4))),
        domain=data.draw(st.floats(0, 0.3)),
        place=data.draw(st.floats(0, 0.2)),
        sequence=data.draw(st.floats(0, 0.2)),
        windows=((2, 0.1), (128, 0.2)),
        opening=data.draw(st.integers(0, 3)),
        domain_opening=data.draw(st.integers(0, 12)),
        rank=data.draw(st.floats(1.1, 20)),
        drift=data.draw(st.floats(0, 1)),
        sharpness=data.draw(st.floats(0.01, 60)),
        renormalised=data.draw(st.booleans()),
        scores=True,
        lookahead_recall=(0.9, 0.2, 1.0),
        domains=("a", "b", "a"),
    )
    top_k = data.draw(st.integers(1, experts))
    shape = Shape(
        sequences=sequences, prompt_tokens=tokens[0], new_tokens=tokens[1], layers=layers, experts=experts, top_k=top_k
    )
    trace = generate(law, 0, shape)
    trace.check()
    assert trace.expert_ids.max() < experts
    assert_chosen_have_the_highest_scores(trace)


def assert_chosen_have_the_highest_scores(trace: Trace) -> None:
    assert trace.scores is not None
    chosen = np.take_along_axis(trace.scores, trace.expert_ids.astype(np.int64), axis=-1)
    assert (np.diff(chosen.astype(np.float64), axis=-1) <= 0).all()
    others = trace.scores.copy()
    np.put_along_axis(others, trace.expert_ids.astype(np.int64), -1, axis=-1)
    assert (others.max(axis=-1) < chosen.min(axis=-1)).all()


def test_scores_are_a_softmax_and_gates_are_those_of_the_chosen() -> None:
    raw, normal = made(scores=True, renormalised=False), made(scores=True)
    assert raw.scores is not None
    assert raw.gates is not None
    assert normal.gates is not None
    np.testing.assert_allclose(raw.scores.sum(axis=-1, dtype=np.float64), 1, atol=2e-3)
    chosen = np.take_along_axis(raw.scores, raw.expert_ids.astype(np.int64), axis=-1)
    np.testing.assert_array_equal(raw.gates, chosen)
    np.testing.assert_allclose(normal.gates.sum(axis=-1, dtype=np.float64), 1, atol=2e-3)


def test_predictions_have_the_recall_that_was_asked_for() -> None:
    trace = made(lookahead_recall=(1.0, 0.8, 0.5))
    np.testing.assert_allclose(lookahead_recall(trace), [1.0, 0.8, 0.5], atol=0.01)
    assert trace.lookahead is not None
    assert (trace.lookahead[:, 3] == NOT_ROUTED).all()
    assert (trace.lookahead[:, 1, 2] == NOT_ROUTED).all()


def test_deeper_predictions_than_layers_are_left_out() -> None:
    assert made(Shape(layers=2, experts=8, top_k=2), lookahead_recall=(0.9, 0.8, 0.7)).lookahead_depth == 1
    assert made(Shape(layers=1, experts=8, top_k=2), lookahead_recall=(0.9,)).lookahead is None


def test_a_law_of_nothing_is_chance() -> None:
    trace = made(rank=24.0)
    chance = SHAPE.top_k / SHAPE.experts
    assert abs(between_sequences(trace).anywhere - chance) < 0.01
    assert np.abs(overlap_profile(trace, (1, 8)).mean(axis=1) - chance).max() < 0.01


def test_bias_makes_some_popular_in_an_order_of_each_layer() -> None:
    counts = loads(made(bias=(1.5, 0.0, -1.5)))
    assert (np.sort(counts, axis=1)[:, -4:].sum(axis=1) > 0.4 * counts.sum(axis=1)).all()
    assert len(set(counts.argmax(axis=1).tolist())) > 1


def test_a_window_lasts_for_its_tokens_and_a_sequence_for_all() -> None:
    near, beyond = overlap_profile(made(windows=((4, 0.9),), rank=24.0), (1, 5)).mean(axis=1)
    assert near > 0.35
    assert abs(beyond - SHAPE.top_k / SHAPE.experts) < 0.03
    lags = overlap_profile(made(sequence=0.6, rank=24.0), (1, 32)).mean(axis=1)
    assert abs(lags[0] - lags[1]) < 0.02
    assert lags.min() > 0.3


def between(**law: Any) -> Between:
    return between_sequences(made(domains=("a", "a", "b", "b"), **law))


def test_a_domain_is_shared_by_its_sequences_only() -> None:
    found = between(domain=0.6)
    assert found.same_domain > 0.3
    assert found.other_domain < 0.16
    assert between(sequence=0.6).same_domain < 0.16


def test_openings_are_the_same_everywhere_or_in_a_domain() -> None:
    trace = made(opening=2, domain_opening=5, domains=("a", "a", "b", "b"))
    assert shared_openings(trace) == (2, 5)
    ids = trace.expert_ids.reshape(8, 128, 4, 3)
    np.testing.assert_array_equal(ids[0, :5], ids[3, :5])
    np.testing.assert_array_equal(ids[0, :2], ids[7, :2])
    assert not np.array_equal(ids[0, 2:5], ids[7, 2:5])


def test_layers_know_less_of_one_another_with_rank_and_with_drift() -> None:
    few, many = (cross_layer(made(rank=rank), 1) for rank in (4.0, 24.0))
    assert few > many + 0.2
    drifting = made(rank=4.0, drift=0.8)
    assert few > cross_layer(drifting, 1) + 0.05 > cross_layer(drifting, 3) + 0.2
    assert abs(cross_layer(made(rank=4.0, drift=0.0), 1)) < 0.05


def test_a_fraction_of_a_dimension_counts_for_as_much() -> None:
    shares = [(directions(rng(), 4000, rank) ** 2).mean(axis=0) for rank in (4.0, 4.25, 4.001)]
    assert [len(share) for share in shares] == [4, 5, 5]
    np.testing.assert_allclose(shares[0], 1 / 4, atol=0.01)
    assert shares[1][-1] / shares[1][0] == pytest.approx(0.3, abs=0.1)  # 0.25 before all have length 1
    assert shares[2][-1] < 0.001


def test_directions_have_length_1_and_stand_apart() -> None:
    toward = directions(rng(), 10, 4.0)
    np.testing.assert_allclose(np.linalg.norm(toward, axis=1), 1)
    np.testing.assert_allclose(toward[:4] @ toward[:4].T, np.eye(4), atol=1e-12)
    assert np.abs(np.mean([directions(rng(seed), 1, 4.0)[0] for seed in range(400)], axis=0)).max() < 0.1


def test_fits_are_products() -> None:
    vectors, toward = rng(1).standard_normal((5, 3)), rng(2).standard_normal((7, 3))
    np.testing.assert_allclose(fits_of(vectors, toward), vectors @ toward.T, atol=1e-14)


def test_hidden_parts_have_the_correlations_of_their_shares() -> None:
    law = replace(PLAIN, domain=0.2, place=0.1, sequence=0.15, windows=((4, 0.4),), rank=1.0)
    lanes = Lanes(np.array([0, 6]), 12, np.array([0, 0]))
    draws = [next(layer_fits(law, rng(seed), lanes, 1, 1))[:, 0] for seed in range(2500)]
    found = np.mean([np.outer(one, one) for one in draws], axis=0)
    assert found.diagonal() == pytest.approx(1, abs=0.08)
    assert found[0, 1] == pytest.approx(0.2 + 0.15 + 0.4 * 3 / 4, abs=0.08)
    assert found[1, 5] == pytest.approx(0.2 + 0.15, abs=0.08)  # 4 apart: outside of the window
    assert found[2, 8] == pytest.approx(0.2 + 0.1, abs=0.08)  # the same place of the other sequence
    assert found[2, 9] == pytest.approx(0.2, abs=0.08)


def test_rows_of_an_opening_take_the_first_sequence_as_their_model() -> None:
    lanes = Lanes(np.array([0, 2, 6, 9]), 12, np.array([0, 1, 1, 0]))
    assert lanes.of_row().tolist() == [0, 0, 1, 1, 1, 1, 2, 2, 2, 3, 3, 3]
    assert lanes.models(0, 0).tolist() == list(range(12))
    # sequence 3 follows sequence 0, which ends after 2 tokens; sequence 2 follows sequence 1, but for the first token
    assert lanes.models(1, 3).tolist() == [0, 1, 0, 3, 4, 5, 0, 3, 4, 0, 1, 11]


def test_biases_and_domains_keep_their_proportions() -> None:
    law = replace(PLAIN, bias=(2.0, 0.0), domains=("a", "a", "b"))
    assert law.bias_of(4).tolist() == [2.0, 1.5, 0.5, 0.0]
    assert law.bias_of(2).tolist() == [2.0, 0.0]
    assert law.domains_of(6) == ("a", "a", "a", "a", "b", "b")
    assert law.domains_of(1) == ("a",)
    assert PLAIN.domains_of(3) == ()


@pytest.mark.parametrize(
    ("seed", "shape", "message"),
    [
        (-1, SHAPE, "seed must be at least 0, got -1"),
        (0, Shape(sequences=10**9, layers=1000), "sequences x tokens x layers must fit the host's free memory"),
    ],
)
def test_what_cannot_be_made_is_refused(seed: int, shape: Shape, message: str) -> None:
    with pytest.raises(InputError, match=f"^{message}"):
        generate(PLAIN, seed, shape)
