"""What a trace says about locality: overlap of neighbours, load of experts, and what an LRU cache would hit.

Shapes: T tokens, L MoE layers, K experts a token, E experts a layer.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from traces.errors import InputError
from traces.schema import CHUNK_ELEMENTS, NOT_ROUTED, Array, Phase, Trace
from traces.workload import sequence_rows, sorted_distinct


def neighbour_overlap(trace: Trace) -> Array:
    """Mean share of a token's experts that its predecessor had too, by layer: float64 [L].

    Neighbours are consecutive positions of one sequence. Independent uniform routing gives :func:`chance_overlap`.
    A layer in which no token has a neighbour gives nan.
    """
    pairs = [(rows[:-1], rows[1:]) for rows in sequence_rows(trace)]
    before, after = (np.concatenate(side) for side in zip(*pairs, strict=True))
    shared = np.zeros(trace.header.layers)
    routed = np.zeros(trace.header.layers)
    piece = max(1, CHUNK_ELEMENTS // (trace.header.layers * trace.header.top_k**2))
    for start in range(0, len(after), piece):
        old, new = (trace.expert_ids[rows[start : start + piece]] for rows in (before, after))
        old_routed = (old != NOT_ROUTED).any(axis=-1, keepdims=True)
        same = (new[..., :, None] == old[..., None, :]).any(axis=-1) & (new != NOT_ROUTED)
        shared += same.sum(axis=(0, 2))
        routed += ((new != NOT_ROUTED) & old_routed).sum(axis=(0, 2))
    return _ratio(shared, routed)


def chance_overlap(trace: Trace) -> float:
    """The overlap of two tokens with independent uniform routing: K / E."""
    return trace.header.top_k / trace.header.experts


def loads(trace: Trace) -> Array:
    """Assignments of every expert: int64 [L, E]."""
    layers, experts = trace.header.layers, trace.header.experts
    ids = trace.expert_ids
    counts = [np.bincount(ids[:, layer][ids[:, layer] != NOT_ROUTED], minlength=experts) for layer in range(layers)]
    return np.stack(counts)


def imbalance(trace: Trace) -> Array:
    """Load of the most loaded expert over the mean load, by layer: float64 [L]; nan where nothing was routed."""
    counts = loads(trace)
    return _ratio(counts.max(axis=1), counts.mean(axis=1))


def _ratio(over: Array, under: Array) -> Array:
    """Their quotient, nan where ``under`` is 0."""
    out: Array = np.divide(over, under, out=np.full(len(under), np.nan), where=under > 0)
    return out


def mean_union(trace: Trace, phase: Phase) -> Array:
    """Distinct experts that one forward pass (``step`` of the trace) of ``phase`` needs, its mean by layer: [L].

    It is nan when the trace has no row of that phase.
    """
    rows = np.flatnonzero(trace.phase == phase)
    passes, number = np.unique(trace.step[rows], return_inverse=True)
    if not len(passes):
        return np.full(trace.header.layers, np.nan)
    unions = []
    for layer in range(trace.header.layers):
        ids = trace.expert_ids[:, layer][rows].astype(np.int64)
        keys = (number[:, None] * trace.header.experts + ids)[ids != NOT_ROUTED]
        unions.append(len(sorted_distinct(keys)))
    return np.array(unions) / len(passes)


def lru_hit_ratio(trace: Trace, capacity: int, rng: np.random.Generator | None = None) -> float:
    """Share of expert accesses that an LRU cache of ``capacity`` slots in every layer would hit.

    Tokens come one at a time, a sequence after the other, and the cache is carried across sequences; with ``rng``
    they come in random order, which leaves the popularity of experts and takes away the locality. The contract is the
    atomic one: all experts of a token are looked up, then all are kept as the most recent, in as far as they fit.
    Among equally recent ones the lowest expert id leaves first. First touches count as misses. Raises
    :class:`InputError` unless ``capacity`` is at least 1.
    """
    if capacity < 1:
        raise InputError(f"capacity must be at least 1, got {capacity}")
    rows = np.concatenate(sequence_rows(trace))
    if rng is not None:
        rows = rng.permutation(rows)
    hits = accesses = 0
    for layer in range(trace.header.layers):
        layer_hits, layer_accesses = _lru_layer(np.sort(trace.expert_ids[:, layer][rows], axis=-1), capacity)
        hits += layer_hits
        accesses += layer_accesses
    return hits / accesses if accesses else 0.0


def _lru_layer(ids: Array, capacity: int) -> tuple[int, int]:
    """Hits and accesses of one layer; ``ids`` [T, K] ascend within a token. The dict is ordered, oldest first."""
    cache: dict[int, None] = {}
    hits = accesses = 0
    for chosen in ids.tolist():
        for expert in chosen:
            if expert == NOT_ROUTED:
                break
            accesses += 1
            if expert in cache:
                hits += 1
                del cache[expert]
            cache[expert] = None
        while len(cache) > capacity:
            del cache[next(iter(cache))]
    return hits, accesses


def summary(trace: Trace) -> dict[str, Any]:
    """The trace in plain numbers, ready for JSON: dimensions, rows by phase, and the statistics by layer.

    Lists have one entry a layer; an entry that has no value (no decode rows, say) is None.
    """
    tokens = {phase.name.lower(): int(np.count_nonzero(trace.phase == phase)) for phase in Phase}
    by_layer = {
        "neighbour_overlap": neighbour_overlap(trace),
        "max_over_mean_load": imbalance(trace),
        "mean_union_prefill": mean_union(trace, Phase.PREFILL),
        "mean_union_decode": mean_union(trace, Phase.DECODE),
    }
    return {
        "header": trace.header.model_dump(mode="json"),
        "tokens": {"total": len(trace), **tokens},
        "sequences": len(np.unique(trace.sequence)),
        "steps": len(np.unique(trace.step)),
        "arrays": {name: list(array.shape) for name, array in trace.arrays()},
        "array_bytes": sum(array.nbytes for _, array in trace.arrays()),
        "digest": trace.digest,
        "chance_overlap": chance_overlap(trace),
        "layers": {name: [_plain(value) for value in values] for name, values in by_layer.items()},
    }


def _plain(value: float) -> float | None:
    """JSON has no not-a-number."""
    return None if np.isnan(value) else float(value)
