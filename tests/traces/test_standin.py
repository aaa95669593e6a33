"""Look-ahead that is made up: its recall, its seed, and its mark."""

from __future__ import annotations

import numpy as np
import pytest

from traces.errors import InputError
from traces.schema import NOT_ROUTED, Trace
from traces.standin import MOST_AHEAD, with_lookahead
from traces.synthetic import Sizes, generate


@pytest.fixture(scope="module")
def trace() -> Trace:
    return generate("zipf", 0, Sizes(sequences=4, prompt_tokens=32, new_tokens=96, layers=6, experts=32, top_k=4))


def recall(trace: Trace, distance: int) -> float:
    assert trace.lookahead is not None
    true = trace.expert_ids[:, distance:]
    named = trace.lookahead[:, : true.shape[1], distance - 1]
    return float((true[..., :, None] == named[..., None, :]).any(axis=-1).mean())


@pytest.mark.parametrize("wanted", [0.0, 0.3, 0.8, 1.0])
def test_recall_is_what_was_asked_for_at_every_distance(trace: Trace, wanted: float) -> None:
    made = with_lookahead(trace, wanted)
    for distance in range(1, MOST_AHEAD + 1):
        assert recall(made, distance) == pytest.approx(wanted, abs=0.02)


def test_nothing_is_named_beyond_the_last_layer(trace: Trace) -> None:
    made = with_lookahead(trace, 0.9)
    assert made.lookahead is not None
    assert (made.lookahead[:, -1] == NOT_ROUTED).all()
    assert (made.lookahead[:, -2, 1:] == NOT_ROUTED).all()


def test_it_is_seeded_and_marked(trace: Trace) -> None:
    one, same, other = (with_lookahead(trace, 0.5, seed=seed) for seed in (3, 3, 4))
    assert np.array_equal(one.lookahead, same.lookahead)
    assert not np.array_equal(one.lookahead, other.lookahead)
    assert one.header.synthetic
    assert "look-ahead made up with recall 0.5, seed 3" in one.header.made_by
    assert np.array_equal(one.expert_ids, trace.expert_ids)


def test_a_recall_that_is_none_is_refused(trace: Trace) -> None:
    with pytest.raises(InputError, match=r"lookahead-recall must be from 0 to 1, got 1\.5"):
        with_lookahead(trace, 1.5)
