"""The rules of the trace schema: what is accepted, and which line each broken rule gives."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from pydantic import ValidationError

import traces
from traces import NOT_ROUTED, Phase, Trace, TraceError, TraceHeader, schema
from traces.schema import Array

HEADER = TraceHeader(model="tiny", layers=2, experts=4, top_k=2, expert_bytes=(10, 20))


def arrays(**changed: Any) -> dict[str, Any]:
    """Three tokens of one sequence (two of prefill, one of decode) through two layers of four experts, top-2."""
    return {
        "expert_ids": [[[0, 1], [2, 3]], [[1, 2], [3, 0]], [[3, 0], [0, 1]]],
        "token_ids": [7, 8, 9],
        "sequence": [0, 0, 0],
        "position": [0, 1, 2],
        "step": [0, 0, 1],
        "phase": [0, 0, 1],
    } | changed


def with_id(place: tuple[int, int, int], value: int) -> Array:
    ids = np.array(arrays()["expert_ids"])
    ids[place] = value
    return ids


def test_of_casts_to_the_stored_types() -> None:
    trace = Trace.of(HEADER, **arrays(gates=np.full((3, 2, 2), 0.5)))
    assert {name: array.dtype.name for name, array in trace.arrays()} == {
        "expert_ids": "uint16",
        "token_ids": "int32",
        "sequence": "int32",
        "position": "int32",
        "step": "int32",
        "phase": "uint8",
        "gates": "float16",
    }
    assert len(trace) == 3
    assert trace.lookahead_depth == 0
    assert Phase(int(trace.phase[2])) is Phase.DECODE


def test_unrouted_places_are_allowed_several_times_in_a_token() -> None:
    ids = np.array(arrays()["expert_ids"])
    ids[1, 0] = NOT_ROUTED
    assert Trace.of(HEADER, **arrays(expert_ids=ids)).expert_ids[1, 0].tolist() == [NOT_ROUTED, NOT_ROUTED]


BROKEN: dict[str, tuple[dict[str, Any], str]] = {
    "id_too_large": ({"expert_ids": with_id((2, 1, 0), 4)}, r"expert_ids must be below 4 .*got 4 at \[2, 1, 0\]"),
    "id_twice": ({"expert_ids": with_id((1, 0, 0), 2)}, r"expert_ids must be distinct .*got 2 twice at \[1, 0\]"),
    "id_negative": ({"expert_ids": with_id((0, 0, 0), -1)}, "expert_ids must fit uint16, got values from -1 to 3"),
    "shape": ({"expert_ids": np.zeros((3, 1, 2))}, r"expert_ids must have shape \[3, 2, 2\], got \[3, 1, 2\]"),
    "scalar": ({"expert_ids": 3}, "expert_ids must have at least one token, got 0"),
    "no_tokens": ({"expert_ids": np.zeros((0, 2, 2))}, "expert_ids must have at least one token, got 0"),
    "short_column": ({"phase": [0, 1]}, r"phase must have shape \[3\], got \[2\]"),
    "phase": ({"phase": [0, 0, 2]}, "phase must be 0 .* got 2"),
    "phase_back": ({"phase": [0, 1, 0]}, "phase must not return to prefill .* at token 2 of sequence 0"),
    "step_back": ({"step": [0, 2, 1]}, "step must not decrease, got 1 after 2 at token 2"),
    "position_gap": ({"position": [0, 1, 3]}, "position must count up by one .* got 3 at token 2 of sequence 0"),
    "position_wraps": ({"position": [2**31 - 2, 2**31 - 1, 0]}, "position must count up by one .* got 0 at token 2"),
    "negative": ({"token_ids": [7, -1, 9]}, "token_ids must be at least 0, got -1"),
    "fraction": ({"position": [0, 1.5, 2]}, "position must hold whole numbers, got float64"),
    "not_a_number": ({"token_ids": [7, np.nan, 9]}, "token_ids must hold whole numbers"),
    "infinite_id": ({"token_ids": [7, np.inf, 9]}, "token_ids must hold whole numbers"),
    "text": ({"token_ids": ["a", "b", "c"]}, "token_ids must be an array of numbers, got list"),
    "unknown": ({"routes": [1]}, "array must be one of expert_ids, .* got routes"),
    "gate_nan": ({"gates": np.full((3, 2, 2), np.nan)}, r"gates must be finite .* got nan at \[0, 0, 0\]"),
    "gate_overflow": ({"gates": np.full((3, 2, 2), 1e9)}, r"gates must be finite .* got inf at \[0, 0, 0\]"),
    "score_negative": ({"scores": np.full((3, 2, 4), -0.5)}, r"scores must be finite and at least 0, got -0.5"),
    "lookahead_depth": ({"lookahead": np.zeros((3, 2, 0, 2))}, r"lookahead must have shape \[3, 2, 'at least 1', 2\]"),
    "lookahead_rank": ({"lookahead": np.zeros((3, 2))}, r"lookahead must have shape .* got \[3, 2\]"),
    "lookahead_id": (
        {"lookahead": [[[[0, 4]], [[NOT_ROUTED] * 2]]] * 3},
        r"lookahead must be below 4 .* got 4 at \[0, 0, 0, 1\]",
    ),
    "lookahead_beyond": (
        {"lookahead": [[[[0, 1]], [[0, 1]]]] * 3},
        r"lookahead must be 65535 beyond the last layer, got 0 at \[0, 1, 0, 0\]",
    ),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_rule_is_named_with_its_place(case: str) -> None:
    changed, message = BROKEN[case]
    with pytest.raises(TraceError, match=message) as raised:
        Trace.of(HEADER, **arrays(**changed))
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("name", ["expert_ids", "token_ids", "sequence", "position", "step", "phase"])
def test_every_required_array_must_be_given(name: str) -> None:
    with pytest.raises(TraceError, match=f"{name} must be given"):
        Trace.of(HEADER, **arrays(**{name: None}))


def test_places_are_right_when_checked_in_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(schema, "CHUNK_ELEMENTS", 4)
    for case in ("id_too_large", "id_twice", "lookahead_beyond", "score_negative"):
        changed, message = BROKEN[case]
        with pytest.raises(TraceError, match=message):
            Trace.of(HEADER, **arrays(**changed))


def test_sequence_must_have_a_domain_when_domains_are_given() -> None:
    header = HEADER.model_copy(update={"domains": ("prose",)})
    with pytest.raises(TraceError, match="sequence must be below the 1 domains of the header, got 1"):
        Trace.of(header, **arrays(sequence=[0, 0, 1], position=[0, 1, 0]))


def test_digest_is_of_the_content_not_of_who_recorded_it() -> None:
    trace = Trace.of(HEADER, **arrays())
    other = Trace.of(HEADER.model_copy(update={"made_by": "somebody else"}), **arrays())
    changed = Trace.of(HEADER, **arrays(token_ids=[7, 8, 8]))
    assert trace.digest == other.digest
    assert trace.digest != changed.digest
    assert trace.digest != Trace.of(HEADER.model_copy(update={"expert_bytes": (10, 21)}), **arrays()).digest


HEADER_VALUES: dict[str, Any] = HEADER.model_dump(mode="json")


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"schema_version": 2}, r"schema_version must be 1 .*, got 2"),
        ({"layers": 0}, "layers must be greater than 0, got 0"),
        ({"top_k": 5}, r"top_k must be at most experts \(4\), got 5"),
        ({"expert_bytes": [1]}, r"expert_bytes must have one entry a layer \(2\), got 1"),
        ({"experts": "many"}, "experts must be a valid integer.*got 'many'"),
        ({"colour": "blue"}, "header must have no other field .*got colour"),
        ({"model": ""}, "model .*got ''"),
    ],
)
def test_header_errors_are_one_line(changed: dict[str, Any], message: str) -> None:
    with pytest.raises(TraceError, match=message) as raised:
        TraceHeader.of(HEADER_VALUES | changed)
    assert "\n" not in str(raised.value)


def test_a_header_without_a_field_or_that_is_no_object() -> None:
    without = {name: value for name, value in HEADER_VALUES.items() if name != "experts"}
    with pytest.raises(TraceError, match="experts must be given, got nothing"):
        TraceHeader.of(without)
    with pytest.raises(TraceError, match=r"header must be .*got 3"):
        TraceHeader.of(3)


def test_a_header_survives_json() -> None:
    assert TraceHeader.of(HEADER_VALUES) == HEADER


def test_a_header_of_another_version_cannot_be_built() -> None:
    with pytest.raises(ValidationError, match="schema_version must be 1, got 2"):
        HEADER.model_validate(HEADER_VALUES | {"schema_version": 2})


def test_a_trace_built_past_the_casts_is_checked_for_types() -> None:
    trace = Trace.of(HEADER, **arrays())
    wrong = Trace(HEADER, **dict(trace.arrays()) | {"step": trace.step.astype(np.int64)})
    with pytest.raises(TraceError, match="step must be int32, got int64"):
        wrong.check()


def test_public_names_exist() -> None:
    assert len(set(traces.__all__)) == len(traces.__all__)
    assert all(hasattr(traces, name) for name in traces.__all__)
