"""Is a model worth caching? What popularity and order of its routing promise, in numbers and in one sentence.

Every number is defined in symbols in ``docs/metrics.md``. Shapes: T tokens, L MoE layers, K experts a token, E experts
a layer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from traces.schedule import by_sequence
from traces.schema import NOT_ROUTED, Array, Trace
from traces.segments import (
    CONFIDENCE,
    WINDOWS,
    SegmentRouting,
    Tick,
    nothing,
    segment_hits,
    segment_routing,
    stride_of,
)
from traces.stats import chance_overlap, loads

LAGS = tuple(range(1, 65))
SPANS = tuple(1 << power for power in range(11))
"""Window lengths of the working set, in tokens."""
BATCHES = tuple(1 << power for power in range(7))
SHARES = (0.125, 0.25, 0.5, 0.75)
"""Capacities as shares of the experts of a layer; a capacity is rounded down, and at least 1."""

AT_WORK = 0.05
"""A share of experts beyond what is expected without it, from which on popularity or order is said to be at work."""

Progress = Callable[[int, int], None]
"""Is told the work done and all work, in layers."""


def popularity_entropy(trace: Trace) -> Array:
    """Entropy of the experts' shares of all choices over its maximum ln E, by layer: float64 [L].

    1 is uniform, 0 one expert alone; nan for a layer that was never routed, or has one expert.
    """
    counts = loads(trace).astype(np.float64)
    total = counts.sum(axis=1)
    with np.errstate(divide="ignore", invalid="ignore"):
        share = counts / total[:, None]
        terms = np.where(share > 0, share * np.log(share), 0.0)
        entropy = -terms.sum(axis=1) / np.log(trace.header.experts)
    known: Array = np.where(total > 0, np.abs(entropy), np.nan)  # one expert alone gives -0.0
    return known


def popularity_overlap(trace: Trace) -> Array:
    """The overlap of any two different tokens, wherever they stand, by layer: float64 [L].

    It is what neighbours would share on average if the tokens were shuffled: popularity without order. It is nan
    where fewer than two tokens were routed.
    """
    counts = loads(trace).astype(np.float64)
    ids = trace.expert_ids
    tokens = np.array([(ids[:, layer] != NOT_ROUTED).any(axis=-1).sum() for layer in range(trace.header.layers)])
    return _quotient((counts * (counts - 1)).sum(axis=1), counts.sum(axis=1) * (tokens - 1))


def overlap_profile(trace: Trace, lags: Sequence[int] = LAGS, *, tick: Tick = nothing) -> Array:
    """Mean share of a token's experts that the token ``lag`` positions before had too: float64 [lags, L].

    Lag 1 is :func:`traces.stats.neighbour_overlap`. It is nan where no sequence is long enough.
    """
    lane = by_sequence(trace).lane_of()
    after = [lag + np.flatnonzero(lane[lag:] == lane[:-lag]) for lag in lags]
    shared = np.zeros((len(lags), trace.header.layers))
    routed = np.zeros_like(shared)
    for layer, sets in enumerate(_sets(trace)):
        size = np.bitwise_count(sets).sum(axis=1)
        for place, (lag, rows) in enumerate(zip(lags, after, strict=True)):
            shared[place, layer] = np.bitwise_count(sets[rows] & sets[rows - lag]).sum()
            routed[place, layer] = size[rows][size[rows - lag] > 0].sum()
        tick()
    return _quotient(shared, routed)


def working_set(trace: Trace, *, tick: Tick = nothing) -> tuple[Array, list[int]]:
    """Mean distinct experts in a window of consecutive tokens, and the windows: float64 [len(SPANS), L], int [same].

    Windows of :data:`SPANS` tokens stay within a sequence and begin at every token; where no sequence is long enough
    the mean is nan.
    """
    lane = by_sequence(trace).lane_of()
    starts = [np.flatnonzero(lane[span - 1 :] == lane[: max(0, len(lane) - span + 1)]) for span in SPANS]
    sizes = np.full((len(SPANS), trace.header.layers), np.nan)
    for layer, sets in enumerate(_sets(trace)):
        union = sets  # of the window from each row on; it runs into the next sequence where no start looks it up
        for place, (span, rows) in enumerate(zip(SPANS, starts, strict=True)):
            if not len(rows):
                break
            if span > 1:
                union = union[: -(span // 2)] | union[span // 2 :]
            sizes[place, layer] = np.bitwise_count(union[rows]).sum() / len(rows)
        tick()
    return sizes, [len(rows) for rows in starts]


def batch_unions(trace: Trace, batches: Sequence[int] = BATCHES, *, tick: Tick = nothing) -> tuple[Array, list[int]]:
    """Mean number of distinct experts that tokens of B sequences need together, and the events: float64 [B, L], ints.

    Lock-step: sequences in order of first appearance fill lanes; the n-th prefill tokens of all lanes meet, and so do
    the n-th decode tokens. Only events in which all B lanes take part count; without one the mean is nan.
    """
    groups = [_events(trace, batch) for batch in batches]
    sizes = np.full((len(batches), trace.header.layers), np.nan)
    for layer, sets in enumerate(_sets(trace)):
        for place, rows in enumerate(groups):
            if len(rows):
                union = np.bitwise_or.reduce(sets[rows], axis=1)
                sizes[place, layer] = np.bitwise_count(union).sum() / len(rows)
        tick()
    return sizes, [len(rows) for rows in groups]


def uniform_union(trace: Trace, tokens: int) -> float:
    """Distinct experts that n ``tokens`` need on average if routing is independent and uniform: E (1 - (1 - K/E)^n)."""
    experts: int = trace.header.experts
    return experts * (1 - (1 - chance_overlap(trace)) ** tokens)


def _events(trace: Trace, batch: int) -> Array:
    """Places in the order of sequences, int64 [events, batch], of the tokens that meet."""
    order = by_sequence(trace)
    lane = order.lane_of()
    phase = trace.phase[order.rows].astype(np.int64)
    block = lane * 2 + phase  # ascends: a sequence's prefill comes before its decode
    first = np.searchsorted(block, block)
    index = np.arange(len(lane)) - first
    rows = np.lexsort((lane, index, phase))
    keys = np.stack([lane // batch, phase, index])[:, rows]
    begins = np.flatnonzero(np.append(True, (keys[:, 1:] != keys[:, :-1]).any(axis=0)))
    full = begins[np.diff(np.append(begins, len(rows))) == batch]
    met: Array = rows[full[:, None] + np.arange(batch)]
    return met


def _sets(trace: Trace) -> Iterator[Array]:
    """Yields each layer's chosen experts as bits, uint64 [T, E // 64 + 1], in the order of sequences."""
    rows, experts = by_sequence(trace).rows, trace.header.experts
    for layer in range(trace.header.layers):
        chosen = np.zeros((len(rows), (experts // 64 + 1) * 64), dtype=bool)
        chosen[np.arange(len(rows))[:, None], np.minimum(trace.expert_ids[:, layer], experts)[rows]] = True
        chosen[:, experts] = False  # where what was not routed has gone
        yield np.packbits(chosen, axis=1).view(np.uint64)


def _quotient(over: Array, under: Array) -> Array:
    """Their quotient, nan where ``under`` is 0."""
    out: Array = np.divide(over, under, out=np.full(over.shape, np.nan), where=under > 0)
    return out


def locality(
    trace: Trace, *, rng: np.random.Generator, resamples: int = 200, progress: Progress | None = None
) -> dict[str, Any]:
    """The locality of ``trace`` in plain numbers, ready for JSON, with a verdict; what has no value is None.

    ``mean`` is over the layers that have a value, ``layers`` has one entry a layer; capacities are slots of a layer.
    ``rng`` draws the resamples of the intervals of SRP, nothing else. The keys are explained in ``docs/metrics.md``.
    """
    tick = _counter(5 * trace.header.layers, progress)
    profile = overlap_profile(trace, tick=tick)
    expected = popularity_overlap(trace)
    record = {
        "tokens": len(trace),
        "sequences": len(by_sequence(trace).starts),
        **{name: getattr(trace.header, name) for name in ("layers", "experts", "top_k")},
        "window_stride": stride_of(trace),
        "resamples": resamples,
        "confidence": CONFIDENCE,
        "popularity_entropy": _by_layer(popularity_entropy(trace)),
        "overlap": {
            "chance": chance_overlap(trace),
            "popularity": _by_layer(expected),
            "lags": [{"lag": lag, **_by_layer(values)} for lag, values in zip(LAGS, profile, strict=True)],
        },
        "srp": [_srp(found) for found in segment_routing(trace, rng, resamples=resamples, tick=tick)],
        "sch": _sch(trace, segment_hits(trace, tick=tick)),
        "working_set": _sizes(trace, "window", SPANS, *working_set(trace, tick=tick)),
        "batch_union": _sizes(trace, "batch", BATCHES, *batch_unions(trace, tick=tick)),
    }
    return record | {"verdict": verdict(record)}


def _counter(total: int, progress: Progress | None) -> Tick:
    done = 0

    def tick() -> None:
        nonlocal done
        done += 1
        if progress is not None:
            progress(done, total)

    return tick


def _plain(value: float) -> float | None:
    """JSON has no not-a-number."""
    return None if np.isnan(value) else float(value)


def _by_layer(values: Array) -> dict[str, Any]:
    known = values[~np.isnan(values)]
    return {"mean": float(known.mean()) if len(known) else None, "layers": [_plain(value) for value in values]}


def _srp(found: SegmentRouting) -> dict[str, Any]:
    low, high = found.interval or (None, None)
    return {
        "window": found.window,
        "windows": found.windows,
        "sequences": found.sequences,
        "low": low,
        "high": high,
        **{name: _plain(value.item()) for name, value in found.model._asdict().items()},
        "layers": {name: [_plain(value) for value in values] for name, values in found.layers._asdict().items()},
    }


def capacities(trace: Trace) -> list[int]:
    """The slots a layer for which SCH is reported: K, 2K, 4K (E at most), and :data:`SHARES` of the experts."""
    experts, top_k = trace.header.experts, trace.header.top_k
    wanted = {*(min(times * top_k, experts) for times in (1, 2, 4)), *(max(1, int(s * experts)) for s in SHARES)}
    return sorted(wanted)


def _sch(trace: Trace, curves: Array) -> list[dict[str, Any]]:
    return [
        {"window": window, "capacity_slots": slots, **_by_layer(curve[:, slots])}
        for window, curve in zip(WINDOWS, curves, strict=True)
        for slots in capacities(trace)
    ]


def _sizes(trace: Trace, name: str, tokens: Sequence[int], sizes: Array, counts: Sequence[int]) -> list[dict[str, Any]]:
    return [
        {name: number, "observed": count, **_by_layer(values), "uniform": uniform_union(trace, number)}
        for number, values, count in zip(tokens, sizes, counts, strict=True)
    ]


def verdict(record: dict[str, Any]) -> dict[str, Any]:
    """What is at work, ``popularity``, ``order`` or ``neither``, and what to do about it, from the numbers of a report.

    By popularity any two tokens share more experts than by chance, by order neighbours share more than any two. What
    adds :data:`AT_WORK` or more is at work; of both the larger, of equals order.
    """
    overlap = record["overlap"]
    chance, anywhere, neighbours = overlap["chance"], overlap["popularity"]["mean"], overlap["lags"][0]["mean"]
    order = 0.0 if neighbours is None else neighbours - anywhere
    popularity = 0.0 if anywhere is None else anywhere - chance
    at_work = "order" if order >= popularity else "popularity"
    if max(order, popularity) < AT_WORK:
        at_work = "neither"
    sentence = _SENTENCES[at_work](record)
    return {"at_work": at_work, "order_gain": order, "popularity_gain": popularity, "sentence": sentence}


def _facts(record: dict[str, Any]) -> str:
    overlap = record["overlap"]
    neighbours, anywhere = overlap["lags"][0]["mean"], overlap["popularity"]["mean"]
    return (
        f"neighbouring tokens share {_share(neighbours)} of their experts "
        f"(any two {_share(anywhere)}, chance {_share(overlap['chance'])})"
    )


def _share(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


def _cache(record: dict[str, Any]) -> str:
    """What an oracle would hit with twice the active experts: the knee is near there, by arXiv 2505.16056."""
    slots = min(2 * record["top_k"], record["experts"])
    hits = next(entry for entry in record["sch"] if entry["window"] == 16 and entry["capacity_slots"] == slots)
    return (
        f"with {slots} of {record['experts']} slots a layer, an oracle of the next 16 tokens hits "
        f"{_share(hits['mean'])}, chance {_share(slots / record['experts'])}"
    )


def _order(record: dict[str, Any]) -> str:
    return f"order: {_facts(record)}; keep what was just used (lru, lfru): {_cache(record)}"


def _popularity(record: dict[str, Any]) -> str:
    return f"popularity: {_facts(record)}; keep what is used most (lfu, static): {_cache(record)}"


def _neither(record: dict[str, Any]) -> str:
    few = next(entry for entry in reversed(record["working_set"][:7]) if entry["mean"] is not None)
    return (
        f"neither: {_facts(record)}; {few['window']} tokens use {few['mean']:.0f} of {record['experts']} experts, so a "
        f"policy hits little more than the share of experts that it holds: more memory or smaller experts help, "
        f"policies do not"
    )


_SENTENCES: dict[str, Callable[[dict[str, Any]], str]] = {
    "order": _order,
    "popularity": _popularity,
    "neither": _neither,
}
