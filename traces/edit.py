"""Cutting a trace down to what is wanted, and putting several into one; both give a valid trace.

Shapes: T tokens, L MoE layers, K experts a token, D look-ahead depth.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np

from traces.errors import InputError, unknown_name
from traces.router_means import packed
from traces.schema import NOT_ROUTED, Array, Phase, Trace, TraceError, TraceHeader

NO_DOMAIN = "unknown"
"""Domain of a sequence whose trace names none, when it is joined with one that does."""

_ITEM = re.compile(r"(?P<one>\d{1,18})|(?P<first>\d{0,18}):(?P<end>\d{0,18})")


def slice_trace(
    trace: Trace,
    *,
    sequences: str = "",
    domains: Sequence[str] = (),
    phase: Phase | None = None,
    layers: str = "",
    steps: str = "",
    tokens: int | None = None,
) -> Trace:
    """The part of ``trace`` that every given choice leaves: a trace of its own.

    ``sequences``, ``layers`` and ``steps`` are numbers and ranges with commas, as ``0:4,7``; the end of a range is
    left out, and either side may be open. ``tokens`` keeps the first ones of each sequence, counted in what the other
    choices leave. Sequences and layers are numbered anew from 0, in their old order; steps and positions stay.
    Look-ahead is of the layers that are left: what predicted a dropped layer goes, and so do depths that predict
    nothing any more. Raises :class:`InputError` when a choice is malformed or selects nothing, and when ``steps``
    would tear a gap into a sequence.
    """
    given = {"sequences": sequences, "domains": ",".join(domains), "layers": layers, "steps": steps}
    said = [f"{name}={value}" for name, value in given.items() if value]
    said += [f"phase={phase.name.lower()}"] if phase is not None else []
    said += [f"tokens={tokens}"] if tokens is not None else []
    keep = _all_of(
        len(trace),
        _within("sequences", sequences, trace.sequence),
        _of_domains(trace, domains),
        _of_phase(trace, phase),
        _within("steps", steps, trace.step),
    )
    rows = _first_tokens(trace, np.flatnonzero(keep), tokens)
    if not len(rows):
        raise InputError(f"the choices together must leave a token, got none for {', '.join(said)}")
    _check_gaps(trace, rows, steps)
    every = np.arange(trace.header.layers)
    wanted = _within("layers", layers, every)
    return _taken(trace, rows, every if wanted is None else every[wanted], f"slice({', '.join(said)})")


def _within(field: str, text: str, values: Array) -> Array | None:
    """Which ``values`` are in the ranges of ``text``: bool, or None when there is no text."""
    if not text:
        return None
    inside = np.zeros(len(values), dtype=bool)
    for item in text.split(","):
        match = _ITEM.fullmatch(item.strip())
        if match is None:
            raise InputError(f"{field} must be numbers and ranges such as 0:4,7, got {text!r}")
        first = int(match["one"] or match["first"] or 0)
        end = first + 1 if match["one"] else int(match["end"] or values.max() + 1)
        hit = (values >= first) & (values < end)
        if not hit.any():
            raise InputError(f"{field} must be among {values.min()} to {values.max()}, got {item.strip()}")
        inside |= hit
    return inside


def _of_domains(trace: Trace, wanted: Sequence[str]) -> Array | None:
    if not wanted:
        return None
    known = trace.header.domains
    for name in wanted:
        if not known:
            raise InputError(f"domains must be left out for a trace that names none, got {name}")
        if name not in known:
            raise unknown_name("domain", name, set(known))
    inside: Array = np.isin(known, wanted)[trace.sequence]
    return inside


def _of_phase(trace: Trace, phase: Phase | None) -> Array | None:
    if phase is None:
        return None
    inside: Array = trace.phase == phase
    if not inside.any():
        raise InputError(f"phase must be one that the trace has, got {phase.name.lower()}")
    return inside


def _all_of(tokens: int, *choices: Array | None) -> Array:
    keep = np.ones(tokens, dtype=bool)
    for choice in choices:
        if choice is not None:
            keep &= choice
    return keep


def _first_tokens(trace: Trace, rows: Array, tokens: int | None) -> Array:
    """Those of ``rows`` that are among the first ``tokens`` of their sequence's."""
    if tokens is None:
        return rows
    if tokens < 1:
        raise InputError(f"tokens must be at least 1, got {tokens}")
    _, first, number = np.unique(trace.sequence[rows], return_index=True, return_inverse=True)
    position = trace.position[rows]
    kept: Array = rows[position - position[first][number] < tokens]
    return kept


def _check_gaps(trace: Trace, rows: Array, steps: str) -> None:
    """Only a choice of steps can leave out tokens between others of the same sequence."""
    ids, first, count = np.unique(trace.sequence[rows], return_index=True, return_counts=True)
    last = len(rows) - 1 - np.unique(trace.sequence[rows][::-1], return_index=True)[1]
    torn = np.flatnonzero(trace.position[rows[last]] - trace.position[rows[first]] + 1 != count)
    if torn.size:
        raise InputError(f"steps must leave each sequence in one piece, got {steps}, a gap in sequence {ids[torn[0]]}")


def _taken(trace: Trace, rows: Array, layers: Array, how: str) -> Trace:
    """The trace of ``rows`` and ``layers``, both ascending."""
    old = trace.header
    ids, number = np.unique(trace.sequence[rows], return_inverse=True)
    whole = len(ids) == len(np.unique(trace.sequence))
    header = old.model_copy(
        update={
            "layers": len(layers),
            "expert_bytes": tuple(old.expert_bytes[layer] for layer in layers),
            "domains": tuple(old.domains[sequence] for sequence in ids) if old.domains else (),
            "prompts_digest": old.prompts_digest if whole else "",
            "router_means": "" if old.means is None else packed(old.means[layers]),
            "made_by": f"{how} of {trace.digest}" + (f" ({old.made_by})" if old.made_by else ""),
        }
    )
    arrays = {name: _part(name, array, rows, layers) for name, array in trace.arrays()}
    return Trace.of(header, **arrays | {"sequence": number})


def _part(name: str, array: Array, rows: Array, layers: Array) -> Array | None:
    if array.ndim == 1:
        return array[rows]
    part = array[rows] if len(layers) == array.shape[1] else array[np.ix_(rows, layers)]
    return _relative(part, layers) if name == "lookahead" else part


def _relative(ahead: Array, layers: Array) -> Array | None:
    """Look-ahead [T, len(layers), D, K] by distance in ``layers`` instead of in the old model; None when none is left.

    Entry (i, d) is to predict layers[i + 1 + d], which the old entry at depth layers[i + 1 + d] - layers[i] - 1 did.
    """
    depth = ahead.shape[2]
    source = np.full((len(layers), depth), depth)  # the depth that is one too many: nothing is known
    for d in range(min(depth, len(layers) - 1)):
        source[: len(layers) - 1 - d, d] = np.minimum(layers[1 + d :] - layers[: -1 - d] - 1, depth)
    left = int((source < depth).any(axis=0).sum())
    if not left:
        return None
    source = source[None, :, :left, None]
    known = np.take_along_axis(ahead, np.minimum(source, depth - 1), axis=2)
    return np.where(source < depth, known, np.uint16(NOT_ROUTED))


class Joined(NamedTuple):
    """Several traces as one, and what a person should know about it."""

    trace: Trace
    notes: list[str]  # one sentence each, for what could not be kept as it was


def concat(traces: Sequence[Trace], names: Sequence[str] = ()) -> Joined:
    """The rows of all ``traces``, one after the other; ``names`` are what errors and notes call them.

    Sequences and steps are numbered from 0, on through all traces. An optional array is kept when all have it, and
    look-ahead to the smallest depth. A domain is ``unknown`` where its trace names none and another does. Raises
    :class:`TraceError` unless there are two traces or more, equal in layers, experts, top_k and expert_bytes.
    """
    if len(traces) < 2:
        raise TraceError(f"traces must be at least 2, got {len(traces)}")
    names = names or [f"trace {number}" for number in range(len(traces))]
    _check_dimensions([trace.header for trace in traces], names)
    notes: list[str] = []
    arrays: dict[str, Any] = {name: _joined(name, traces, names, notes) for name, _ in traces[0].arrays()}
    notes += [
        f"{name} is left out: {names[0]} does not have it"
        for name in dict.fromkeys(name for trace in traces for name, _ in trace.arrays() if name not in arrays)
    ]
    for name in ("sequence", "step"):
        arrays[name] = _numbered([getattr(trace, name) for trace in traces])
    return Joined(Trace.of(_common_header(traces, notes), **arrays), notes)


def _check_dimensions(headers: Sequence[TraceHeader], names: Sequence[str]) -> None:
    for header, name in zip(headers[1:], names[1:], strict=True):
        for field in ("layers", "experts", "top_k", "expert_bytes"):
            wanted, got = getattr(headers[0], field), getattr(header, field)
            if wanted != got:
                raise TraceError(f"{name}: {field} must be as in {names[0]} ({_short(wanted)}), got {_short(got)}")


def _short(value: int | tuple[int, ...]) -> str:
    return str(value) if isinstance(value, int) or len(set(value)) > 1 else f"{value[0]} in every layer"


def _joined(name: str, traces: Sequence[Trace], names: Sequence[str], notes: list[str]) -> Array | None:
    parts = [getattr(trace, name) for trace in traces]
    without = [label for label, part in zip(names, parts, strict=True) if part is None]
    if without:
        notes.append(f"{name} is left out: {without[0]} does not have it")
        return None
    if name == "lookahead":
        depths = {part.shape[2] for part in parts}
        if len(depths) > 1:
            notes.append(f"lookahead is cut to the smallest depth, {min(depths)} of {max(depths)}")
        parts = [part[:, :, : min(depths)] for part in parts]
    return np.concatenate(parts)


def _numbered(columns: Iterable[Array]) -> Array:
    """The values of each column numbered from 0 in their order, and on from column to column."""
    parts, next_number = [], 0
    for column in columns:
        values, number = np.unique(column, return_inverse=True)
        parts.append(number + next_number)
        next_number += len(values)
    return np.concatenate(parts)


def _common_header(traces: Sequence[Trace], notes: list[str]) -> TraceHeader:
    headers = [trace.header for trace in traces]
    texts = {}
    for field in ("model", "revision", "dtype", "licence"):
        values = list(dict.fromkeys(getattr(header, field) for header in headers))
        texts[field] = values[0] if field == "dtype" else " + ".join(value for value in values if value)
        if len(values) > 1:
            notes.append(f"{field} differs: {', '.join(repr(value) for value in values)}; written as {texts[field]!r}")
    prompts = {header.prompts_digest for header in headers}
    update: dict[str, Any] = {
        **texts,
        "domains": _common_domains(traces, notes),
        "synthetic": any(header.synthetic for header in headers),
        "software": _merged([header.software for header in headers]),
        "prompts_digest": prompts.pop() if len(prompts) == 1 else "",
        "made_by": f"concat of {', '.join(trace.digest for trace in traces)}",
        **_common_router(headers, notes),
    }
    return headers[0].model_copy(update=update)


def _common_router(headers: Sequence[TraceHeader], notes: list[str]) -> dict[str, str]:
    """What is told of the look-ahead: the plain router where it is not the same in all."""
    fields = ("lookahead_router", "router_means")
    told: dict[str, str] = {field: getattr(headers[0], field) for field in fields}
    if all(getattr(header, field) == told[field] for header in headers for field in fields):
        return told
    routers = {header.lookahead_router for header in headers}
    notes.append("look-ahead was corrected by other means of the routers, or not in all: these are left out")
    return {"lookahead_router": "plain" if "plain" in routers else "residual", "router_means": ""}


def _common_domains(traces: Sequence[Trace], notes: list[str]) -> tuple[str, ...]:
    if not any(trace.header.domains for trace in traces):
        return ()
    if not all(trace.header.domains for trace in traces):
        notes.append(f"domains are {NO_DOMAIN!r} where a trace names none")
    return tuple(
        trace.header.domains[sequence] if trace.header.domains else NO_DOMAIN
        for trace in traces
        for sequence in np.unique(trace.sequence).tolist()
    )


def _merged(tables: Sequence[dict[str, str]]) -> dict[str, str]:
    """Software of all; where versions of one differ, all of them, in order of appearance."""
    versions: dict[str, list[str]] = {}
    for table in tables:
        for name, version in table.items():
            versions.setdefault(name, []).append(version)
    return {name: ", ".join(dict.fromkeys(found)) for name, found in versions.items()}
