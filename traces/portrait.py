"""The routing of a trace in a few numbers that can be compared with those of another one, whatever its dimensions.

Shapes: T tokens, L MoE layers, K experts a token, E experts a layer, S sequences.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from traces.locality import batch_unions, overlap_profile
from traces.schedule import by_sequence
from traces.schema import NOT_ROUTED, Array, Trace
from traces.stats import loads, lru_hit_ratio

LAGS = (1, 2, 8, 32)
BATCHES = (1, 2, 4, 8, 16)
DISTANCES = (1, 3)
PLACES = 128
"""Tokens of a sequence that are compared with those at the same place of others."""
LABELS = {
    "busiest_tenth": "choices on the busiest tenth of experts",
    "gini": "Gini coefficient of the load",
    "overlap_between": "overlap of tokens of different sequences",
    "overlap_domain": "the same, of one domain",
    "overlap_place": "the same, of one domain at the same place",
    **{f"overlap_lag_{lag}": f"overlap of tokens {lag} apart" for lag in LAGS},
    **{f"cross_layer_{d}": f"known from {d} layer{'s' if d > 1 else ''} before" for d in DISTANCES},
    **{f"union_{batch}": f"distinct experts at batch {batch}" for batch in BATCHES},
    "lru_25": "LRU hit ratio at 25 %",
    "lru_50": "LRU hit ratio at 50 %",
    "largest_gate": "largest gate of a token",
    **{f"lookahead_{d}": f"recall of the look-ahead, {d} layer{'s' if d > 1 else ''}" for d in (1, 2, 3)},
}
"""Every entry of a portrait in words. They are defined in ``docs/trace-format.md``."""

Portrait = dict[str, float | None]
"""Value by the names of :data:`LABELS`, each a mean over layers; None where the trace does not tell it."""


def portrait(trace: Trace) -> Portrait:
    """Measures everything in :data:`LABELS`. It costs about a second for 20 million choices."""
    experts = trace.header.experts
    between = between_sequences(trace)
    values: dict[str, float] = {
        "busiest_tenth": _busiest_share(trace),
        "gini": _gini(trace),
        "overlap_between": between.anywhere,
        "overlap_domain": between.same_domain,
        "overlap_place": between_places(trace, 0, PLACES).same_domain,
        **_named("overlap_lag", LAGS, overlap_profile(trace, LAGS)),
        **{f"cross_layer_{distance}": cross_layer(trace, distance) for distance in DISTANCES},
        **_named("union", BATCHES, batch_unions(trace, BATCHES)[0]),
        "lru_25": lru_hit_ratio(trace, max(1, experts // 4)),
        "lru_50": lru_hit_ratio(trace, max(1, experts // 2)),
        "largest_gate": largest_gate(trace),
        **{f"lookahead_{depth}": recall for depth, recall in enumerate(lookahead_recall(trace), start=1)},
    }
    return {name: None if np.isnan(values.get(name, np.nan)) else float(values[name]) for name in LABELS}


class Between(NamedTuple):
    """Mean overlap of two tokens of different sequences; nan where no pair is of the kind."""

    anywhere: float
    same_domain: float
    other_domain: float


def between_sequences(trace: Trace) -> Between:
    """What tokens of different sequences share, from the loads of the sequences: it knows popularity, and no order.

    Domains are those of the header; without them there is one domain only.
    """
    parts = _kinds_of_pairs(_sequence_loads(trace), domain_of(trace), trace.header.top_k)
    return Between(*(_mean_ratio(*part) for part in parts))


def _kinds_of_pairs(counts: Array, domain: Array, top_k: int) -> Array:
    """:func:`_pairs` of each kind of :class:`Between`, float64 [3, 2], of the loads [L, S, E] of sequences."""
    same = np.stack([counts[:, domain == one].sum(axis=1) for one in np.unique(domain)], axis=1)
    alone, by_domain, everything = (_pairs(part, top_k) for part in (counts, same, counts.sum(axis=1)[:, None]))
    return np.array([everything - alone, by_domain - alone, everything - by_domain])


def _pairs(counts: Array, top_k: int) -> Array:
    """Experts shared by all pairs of tokens of one group, and what they could share: float64 [2], of [L, groups, E]."""
    return np.array([(counts**2).sum(), (counts.sum(axis=2) ** 2).sum() / top_k])


def shared_openings(trace: Trace) -> tuple[int, int]:
    """The first tokens that sequences of all domains have in common, and those that the sequences of a domain have.

    Templates and markers of the beginning make them. They end before the first place at which different sequences
    share less than halfway between what they share anywhere, and everything.
    """
    kinds = ("other_domain", "same_domain") if len(np.unique(domain_of(trace))) > 1 else ("anywhere", "anywhere")
    general, of_domain = (_opening(trace, kind) for kind in kinds)
    return general, max(general, of_domain)


def _opening(trace: Trace, kind: str) -> int:
    """The first tokens that all sequences have in common in pairs of ``kind``, a field of :class:`Between`."""
    bar = (1 + getattr(between_sequences(trace), kind)) / 2
    place = 0
    while getattr(between_places(trace, place, place + 1), kind) > bar:  # nan where no pair is left
        place += 1
    return place


def between_places(trace: Trace, start: int, end: int) -> Between:
    """What tokens at the same place of different sequences share, for places from ``start`` to before ``end``."""
    order, domain = by_sequence(trace), domain_of(trace)
    length = np.diff(order.starts, append=len(trace))
    parts = np.zeros((3, 2))
    for place in range(start, min(end, int(length.max()))):
        lanes = np.flatnonzero(length > place)
        ids = trace.expert_ids[order.rows[order.starts[lanes] + place]]
        chosen = _indicators(ids, trace.header.experts).swapaxes(0, 1)
        parts += _kinds_of_pairs(chosen, domain[lanes], trace.header.top_k)
    return Between(*(_mean_ratio(*part) for part in parts))


def domain_of(trace: Trace) -> Array:
    """Number of the domain of each sequence in order of appearance, int64 [S]; all 0 without domains."""
    order = by_sequence(trace)
    if not trace.header.domains:
        return np.zeros(len(order.starts), dtype=np.int64)
    sequences = np.asarray(trace.sequence)[order.rows[order.starts]]
    numbers: Array = np.unique([trace.header.domains[sequence] for sequence in sequences], return_inverse=True)[1]
    return numbers


def cross_layer(trace: Trace, distance: int) -> float:
    """What the experts of one layer tell about those ``distance`` layers on, beyond their popularity; 0 to 1.

    The guess for a token is the K experts that most often follow its own experts, as counted on the other half of the
    sequences (even ones against odd ones; halves of the rows when there is one sequence). With r the share of experts
    that are guessed right, and p that of guessing the K most popular ones, the value is (r - p) / (1 - p), its mean
    over layers; nan where no layer is so far away.
    """
    order = by_sequence(trace)
    return known_from(np.asarray(trace.expert_ids)[order.rows], order.lane_of(), trace.header.experts, distance)


def known_from(ids: Array, lane: Array, experts: int, distance: int) -> float:
    """:func:`cross_layer` of ids [T, L, K] in the order of sequences, whose numbers from 0 on are ``lane`` [T]."""
    half = lane % 2 == 0 if lane[-1] else np.arange(len(lane)) < len(lane) // 2
    if ids.shape[1] <= distance or half.all():
        return float("nan")
    layers = np.minimum(ids, experts).astype(np.int64).swapaxes(0, 1)  # one expert more stands for what was not routed
    pairs = zip(layers[:-distance], layers[distance:], strict=True)
    return float(np.mean([_gain(before, after, half, experts) for before, after in pairs]))


def _gain(before: Array, after: Array, half: Array, experts: int) -> float:
    """:func:`cross_layer` of two layers, whose ids [T, K] are ``experts`` where nothing was routed."""
    size, top_k = experts + 1, after.shape[1]
    told = popular = total = 0
    for fit in (half, ~half):
        pairs = before[fit][:, :, None] * size + after[fit][:, None, :]
        together = np.bincount(pairs.ravel(), minlength=size**2).reshape(size, size)[:, :experts]
        follows = together / np.maximum(np.bincount(before[fit].ravel(), minlength=size), 1)[:, None]
        follows[experts] = 0
        guess = np.argpartition(-follows[before[~fit]].sum(axis=1), top_k - 1, axis=1)[:, :top_k]
        often = np.argsort(-np.bincount(after[fit].ravel(), minlength=size)[:experts], kind="stable")[:top_k]
        true = after[~fit]
        told += int(np.count_nonzero(hits(true, guess)))
        popular += int(np.count_nonzero(np.isin(true, often)))
        total += int(np.count_nonzero(true < experts))
    return _mean_ratio(told - popular, total - popular)


def largest_gate(trace: Trace) -> float:
    """Mean of the largest gate of a token in a layer; nan without gates."""
    if trace.gates is None:
        return float("nan")
    return float(np.mean([gates.max(axis=-1).mean(dtype=np.float64) for gates in trace.gates.swapaxes(0, 1)]))


def lookahead_recall(trace: Trace) -> list[float]:
    """Share of the experts of layer l+d that the look-ahead of layer l has, by distance d from 1 on."""
    layers, depth = trace.header.layers, min(trace.lookahead_depth, trace.header.layers - 1)
    return [
        _mean_ratio(*np.sum([recalled(trace, layer, ahead) for layer in range(layers - ahead)], axis=0))
        for ahead in range(1, depth + 1)
    ]


def recalled(trace: Trace, layer: int, ahead: int) -> tuple[int, int]:
    """Experts of layer ``layer + ahead`` that the look-ahead of ``layer`` has, and all that were chosen there."""
    assert trace.lookahead is not None
    true, predicted = trace.expert_ids[:, layer + ahead], trace.lookahead[:, layer, ahead - 1]
    return int(hits(true, predicted).sum()), int(np.count_nonzero(true != NOT_ROUTED))


def hits(true: Array, predicted: Array) -> Array:
    """Whether each of the experts ``true`` is among ``predicted``: bool [T, K]."""
    found: Array = (true[..., :, None] == predicted[..., None, :]).any(axis=-1) & (true != NOT_ROUTED)
    return found


def _chosen(trace: Trace) -> Iterator[Array]:
    """Yields each layer's choices as 0 or 1, float64 [T, E], in the order of sequences."""
    rows = by_sequence(trace).rows
    for layer in range(trace.header.layers):
        yield _indicators(trace.expert_ids[:, layer][rows], trace.header.experts)


def _indicators(ids: Array, experts: int) -> Array:
    """Ids [..., K] as 0 or 1 for every expert, float64 [..., E]; what was not routed is nowhere."""
    chosen = np.zeros((*ids.shape[:-1], experts + 1))
    np.put_along_axis(chosen, np.minimum(ids, experts).astype(np.int64), 1, axis=-1)
    return chosen[..., :experts]


def _sequence_loads(trace: Trace) -> Array:
    """Choices of every expert by every sequence, in order of appearance: float64 [L, S, E]."""
    starts = by_sequence(trace).starts
    return np.stack([np.add.reduceat(chosen, starts, axis=0) for chosen in _chosen(trace)])


def _busiest_share(trace: Trace) -> float:
    """The share of the choices that goes to the tenth of the experts, rounded up, that have the most of them."""
    counts = np.sort(loads(trace), axis=1)[:, ::-1]
    most = -(-trace.header.experts // 10)
    return _mean_ratio(counts[:, :most].sum(), counts.sum())


def _gini(trace: Trace) -> float:
    """Gini coefficient of the experts' loads, the mean over layers."""
    counts = np.sort(loads(trace), axis=1)
    experts = trace.header.experts
    weight = 2 * np.arange(1, experts + 1) - experts - 1
    return float(np.mean([_mean_ratio((row * weight).sum(), experts * row.sum()) for row in counts]))


def _named(name: str, keys: tuple[int, ...], values: Array) -> dict[str, float]:
    """Means of the rows of ``values`` under names with the keys; layers that have no value do not count."""
    known = ((key, row[~np.isnan(row)]) for key, row in zip(keys, values, strict=True))
    return {f"{name}_{key}": float(row.mean()) if len(row) else float("nan") for key, row in known}


def _mean_ratio(over: float, under: float) -> float:
    return float(over / under) if under else float("nan")
