"""The mean router inputs in a header: there and back, cut with the layers, dropped where traces differ."""

from __future__ import annotations

import numpy as np
import pytest

from tests.sim.hand import trace_of
from traces.edit import concat, slice_trace
from traces.router_means import packed, unpacked
from traces.schema import Trace, TraceError, TraceHeader

MEANS = np.array([[1.5, -2.0], [0.25, 0.0], [3.0, 4.0]])


def residual(means: np.ndarray | None = MEANS, steps: int = 2) -> Trace:
    trace = trace_of([[[0], [1], [2]]] * steps, lookahead=[[[1], [2], []]] * steps)
    told = {"lookahead_router": "residual", "router_means": "" if means is None else packed(means)}
    header = TraceHeader.of({**trace.header.model_dump(), **told})
    return Trace.of(header, **dict(trace.arrays()))


def test_means_come_back_as_float16_says_them() -> None:
    assert np.array_equal(unpacked(packed(MEANS), 3), MEANS.astype(np.float32))
    assert np.array_equal(residual().header.means, MEANS)
    assert trace_of([[[0]]]).header.means is None


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("?", r"router_means must be base64, got '\?'"),
        (packed(MEANS[:2]), "router_means must hold float16 for each of 3 layers, got 8 bytes"),
        (packed(np.full((3, 2), np.inf)), "router_means must be finite"),
    ],
)
def test_other_text_is_refused(text: str, told: str) -> None:
    header = residual().header.model_dump()
    with pytest.raises(TraceError, match=f"^{told}"):
        TraceHeader.of({**header, "router_means": text})


def test_a_router_that_nobody_knows_is_refused() -> None:
    with pytest.raises(TraceError, match=r"^lookahead_router must be 'plain' or 'residual', got 'magic'$"):
        TraceHeader.of({**residual().header.model_dump(), "lookahead_router": "magic"})


def test_a_slice_keeps_the_means_of_its_layers() -> None:
    part = slice_trace(residual(), layers="0,2").header
    assert part.lookahead_router == "residual"
    assert np.array_equal(part.means, MEANS[[0, 2]])


def test_traces_of_one_router_are_joined_with_it() -> None:
    joined, notes = concat([residual(), residual()])
    assert np.array_equal(joined.header.means, MEANS)
    assert not notes


@pytest.mark.parametrize(("other", "router"), [(residual(MEANS + 1), "residual"), (trace_of([[[0]] * 3]), "plain")])
def test_traces_of_different_routers_lose_the_means_and_say_so(other: Trace, router: str) -> None:
    joined, notes = concat([residual(), other])
    assert (joined.header.lookahead_router, joined.header.means) == (router, None)
    assert any(note.startswith("look-ahead was corrected by other means") for note in notes)
