"""Ids and gates from a file into the arrays of the schema; the first one that is wrong is named with its place."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from traces.schema import NOT_ROUTED, Array, TraceError

Place = Callable[[int, int], str]
"""Where (token, layer) of a part stands: the file and the row, for a message."""

Shape = tuple[int, int, int]
"""Tokens, layers, experts a token."""


def as_ids(values: Sequence[Any] | Array, shape: Shape, place: Place, experts: int | None) -> Array:
    """Expert ids uint16 of ``shape`` from flat ``values``, with 65535 for a place that was not routed.

    Raises :class:`TraceError` for an id that is no whole number, below 0, or not below ``experts`` (when known), and
    for one that a token has twice.
    """
    if _mixed(values, {int}):
        _refuse_others(values, shape, place)
    array = np.asarray(values)
    if array.size and array.dtype.kind not in "iu":
        _refuse_others(values, shape, place)
    below = NOT_ROUTED if experts is None else experts
    array = array.reshape(shape)
    wrong = (array < 0) | ((array >= below) & (array != NOT_ROUTED))
    if wrong.any():
        token, layer, rank = _first(wrong)
        got = array[token, layer, rank]
        raise TraceError(f"{place(token, layer)}: expert ids must be from 0 to {below - 1}, got {got}")
    ids = array.astype(np.uint16)
    check_distinct(ids, place)
    return ids


def check_distinct(ids: Array, place: Place) -> None:
    """Raises :class:`TraceError` when a token has an expert twice in a layer; ids [n, L, K]."""
    ordered = np.sort(ids, axis=-1)
    twice = (ordered[..., 1:] == ordered[..., :-1]) & (ordered[..., 1:] != NOT_ROUTED)
    if twice.any():
        token, layer, rank = _first(twice)
        got = ordered[token, layer, rank]
        raise TraceError(f"{place(token, layer)}: expert ids must be distinct within a token, got {got} twice")


def as_gates(values: Sequence[Any] | Array, shape: Shape, place: Place) -> Array:
    """Gates float16 of ``shape`` from flat ``values``.

    Raises :class:`TraceError` for one that is no number, negative, or not finite as a float16 (above 65504).
    """
    if _mixed(values, {float}):
        _refuse_others(values, shape, place, name="gates")
    array = np.asarray(values, dtype=np.float64).reshape(shape)
    with np.errstate(over="ignore"):
        gates = array.astype(np.float16)
    wrong = ~np.isfinite(gates) | (array < 0)
    if wrong.any():
        token, layer, rank = _first(wrong)
        got = array[token, layer, rank]
        raise TraceError(f"{place(token, layer)}: gates must be finite and at least 0, got {got}")
    return gates


def _mixed(values: Sequence[Any] | Array, kinds: set[type]) -> bool:
    """Whether there are others than ``kinds`` in a list, which numpy would cast (true becomes 1) or choke on."""
    return not isinstance(values, np.ndarray) and not set(map(type, values)) <= kinds


def _first(wrong: Array) -> tuple[int, int, int]:
    token, layer, rank = (int(i) for i in np.unravel_index(int(wrong.argmax()), wrong.shape))
    return token, layer, rank


def _refuse_others(values: Sequence[Any] | Array, shape: Shape, place: Place, name: str = "expert ids") -> None:
    """Names the first of ``values`` that is no number of the kind wanted, or an integer too large for an array."""
    value: Any
    kinds = (int, np.integer) if name == "expert ids" else (int, float, np.number)
    rule = f"whole numbers up to {NOT_ROUTED}" if name == "expert ids" else "numbers"
    most = NOT_ROUTED if name == "expert ids" else sys.float_info.max
    for flat, value in enumerate(values):
        if not isinstance(value, kinds) or isinstance(value, bool) or (isinstance(value, int) and abs(value) > most):
            token, layer, _ = (int(i) for i in np.unravel_index(flat, shape))
            raise TraceError(f"{place(token, layer)}: {name} must be {rule}, got {value!r:.60}")
