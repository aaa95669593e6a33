"""What the next tokens of a sequence have in common: the best fixed sets (SRP) and the segment oracle (SCH).

Both scores are of "Not All Models Suit Expert Offloading: On Local Routing Consistency of Mixture-of-Expert Models"
(arXiv 2505.16056); ``docs/metrics.md`` defines them in symbols. Shapes: T tokens, S sequences, L MoE layers, K experts
a token, E experts a layer, W window lengths.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np

from traces.schedule import by_sequence
from traces.schema import CHUNK_ELEMENTS, Array, Trace

PIECE_ELEMENTS = 250_000
"""Counts (rows times experts) that are worked on together: they stay in a processor's cache, several times faster."""

WINDOWS = (4, 16, 64, 256)
"""Window lengths in tokens, those of the paper."""

CONFIDENCE = 0.95
"""Share of resamples that an interval covers."""


def nothing() -> None:
    """What is called after each layer when nobody watches."""


Tick = Callable[[], None]


class Piece(NamedTuple):
    """Whole sequences of one layer, one after the other: n tokens."""

    ids: Array  # int64 [n, K], E where a place was not routed
    sequence: Array  # int64 [n], the number of the sequence in the trace, in order of first appearance
    start: Array  # int64 [n], the first row of its sequence in this piece
    end: Array  # int64 [n], the row after its last


def pieces(trace: Trace, layer: int) -> Iterator[Piece]:
    """Yields a layer in pieces of whole sequences, at least one, of about :data:`PIECE_ELEMENTS` rows times E."""
    order, experts = by_sequence(trace), trace.header.experts
    bounds = np.append(order.starts, len(order.rows))
    ids = np.minimum(trace.expert_ids[:, layer], experts)[order.rows].astype(np.int64)
    first = 0
    while first < len(order.starts):
        room = int(bounds[first]) + max(1, PIECE_ELEMENTS // (experts + 1))
        after = max(first + 1, int(np.searchsorted(bounds, room, side="right")) - 1)
        lengths = np.diff(bounds[first : after + 1])
        start = np.repeat(bounds[first:after] - bounds[first], lengths)
        yield Piece(
            ids=ids[bounds[first] : bounds[after]],
            sequence=np.repeat(np.arange(first, after), lengths),
            start=start,
            end=start + np.repeat(lengths, lengths),
        )
        first = after


def stride_of(trace: Trace) -> int:
    """Every which token a window begins at: 1, and more where a layer has over :data:`CHUNK_ELEMENTS` T x E counts."""
    return max(1, -(-len(trace) * trace.header.experts // CHUNK_ELEMENTS))


def _sampled(piece: Piece, stride: int) -> Array:
    """Rows of a piece whose place in their sequence is a multiple of ``stride``."""
    return np.flatnonzero((np.arange(len(piece.start)) - piece.start) % stride == 0)


def _uses(piece: Piece, experts: int) -> Array:
    """Uses before each row: int32 [n + 1, E + 1]; the last column takes what was not routed, and means nothing."""
    uses = np.zeros((len(piece.ids) + 1, experts + 1), dtype=np.int32)
    uses[np.arange(1, len(uses))[:, None], piece.ids] = 1
    return np.cumsum(uses, axis=0, out=uses)


class Best(NamedTuple):
    """The best fixed sets of n tables of windows: float64 [n] each; nan where nothing was chosen."""

    srp: Array
    threshold: Array  # an expert is in the set when it is chosen so often in the window
    cache_size: Array  # the mean size of the set, in units of the active experts


class SegmentRouting(NamedTuple):
    """SRP of one window length: how well a fixed set of experts, the best for each window, serves it."""

    window: int
    windows: int  # in each layer
    sequences: int  # with at least one window
    model: Best  # one value each: one threshold for the windows of all layers
    interval: tuple[float, float] | None  # of the model's score; None below two sequences
    layers: Best  # float64 [L] each: a threshold for each layer


def segment_routing(
    trace: Trace,
    rng: np.random.Generator,
    windows: Sequence[int] = WINDOWS,
    *,
    stride: int | None = None,
    resamples: int = 200,
    tick: Tick = nothing,
) -> list[SegmentRouting]:
    """SRP(m) for each m of ``windows`` (arXiv 2505.16056, section 2.2), with a percentile bootstrap over sequences.

    Windows are m consecutive tokens of one sequence, one beginning at every ``stride``-th token (by default
    :func:`stride_of`). Among equally good thresholds it is the highest, that of the smallest set. A resample draws as
    many sequences as have a window, keeps the layers of each together, and finds its own threshold.
    """
    stride = stride or stride_of(trace)
    lengths = np.bincount(by_sequence(trace).lane_of())
    total = [np.zeros((len(lengths), window + 1), dtype=np.int64) for window in windows]
    by_layer: list[list[Best]] = [[] for _ in windows]
    for layer in range(trace.header.layers):
        for place, counts in enumerate(_histograms(trace, layer, windows, stride, len(lengths))):
            by_layer[place].append(_best(counts.sum(axis=0, keepdims=True)))
            total[place] += counts
        tick()
    return [
        SegmentRouting(
            window=window,
            windows=int(((lengths[lengths >= window] - window) // stride + 1).sum()),
            sequences=int((lengths >= window).sum()),
            model=_best(counts.sum(axis=0, keepdims=True)),
            interval=_interval(counts[lengths >= window], rng, resamples),
            layers=Best(*(np.concatenate(values) for values in zip(*layers, strict=True))),
        )
        for window, counts, layers in zip(windows, total, by_layer, strict=True)
    ]


def _interval(counts: Array, rng: np.random.Generator, resamples: int) -> tuple[float, float] | None:
    """The middle :data:`CONFIDENCE` of the scores of resampled sequences; ``counts`` [S, m + 1] has a row for each."""
    number = len(counts)
    if number < 2:
        return None
    draws = rng.multinomial(number, np.full(number, 1 / number), size=resamples)
    scores = _best(draws @ counts).srp
    scores = scores[~np.isnan(scores)]
    if not len(scores):
        return None
    low, high = np.quantile(scores, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    return float(low), float(high)


def _histograms(trace: Trace, layer: int, windows: Sequence[int], stride: int, sequences: int) -> list[Array]:
    """How often an expert was chosen c times in a window of m tokens: int64 [S, m + 1] for each m."""
    experts = trace.header.experts
    tables = [np.zeros((sequences, window + 1), dtype=np.int64) for window in windows]
    for piece in pieces(trace, layer):
        uses, sampled = _uses(piece, experts)[:, :-1], _sampled(piece, stride)
        number = piece.sequence - piece.sequence[0]
        for window, table in zip(windows, tables, strict=True):
            rows = sampled[sampled + window <= piece.end[sampled]]
            bins = uses[rows + window] - uses[rows] + (number[rows] * (window + 1))[:, None]
            counts = np.bincount(bins.ravel(), minlength=(number[-1] + 1) * (window + 1))
            table[piece.sequence[0] : piece.sequence[-1] + 1] += counts.reshape(-1, window + 1)
    return tables


def _best(counts: Array) -> Best:
    """The threshold t >= 1 of the highest 2 Match / (Pred + Act) for each row of ``counts`` [n, m + 1]."""
    window = counts.shape[1] - 1
    chosen = counts[:, :0:-1].astype(np.float64)  # experts chosen m, m-1, ..., 1 times
    match = np.cumsum(chosen * np.arange(window, 0, -1), axis=1)
    size = np.cumsum(chosen, axis=1) * window
    act = match[:, -1:]
    with np.errstate(invalid="ignore"):  # 0 / 0 is nan: nothing was chosen
        score, share = 2 * match / (size + act), size / act
    place = np.argmax(score, axis=1)  # the first of equals has the highest threshold
    rows = np.arange(len(counts))
    threshold = np.where(act[:, 0] > 0, window - place, np.nan)
    return Best(score[rows, place], threshold, share[rows, place])


def segment_hits(
    trace: Trace, windows: Sequence[int] = WINDOWS, *, stride: int | None = None, tick: Tick = nothing
) -> Array:
    """SCH(m, C): share of choices that a cache of the C experts most used in the next m tokens holds: [W, L, E + 1].

    The last axis is C from 0 to E. A token is the first of its own next m, and the window ends with its sequence.
    Among equally used experts those used most recently before, in the same sequence, are held; after that those that
    the token itself chooses, in rank order (no other choice matters for it). Judged at every ``stride``-th token of
    each sequence, by default :func:`stride_of`. After arXiv 2505.16056, section 2.3, with one departure: there an
    expert enters the cache when it is demanded, and only the victim is foreseen; here the cache is filled ahead, so
    it is 1 wherever the distinct experts of m tokens fit.
    """
    stride, experts = stride or stride_of(trace), trace.header.experts
    curves = np.full((len(windows), trace.header.layers, experts + 1), np.nan)
    for layer in range(trace.header.layers):
        ranks = np.zeros((len(windows), experts + 1), dtype=np.int64)
        for piece in pieces(trace, layer):
            rows = _sampled(piece, stride)
            uses, recent = _uses(piece, experts), _recent(piece, rows, experts)
            for place, window in enumerate(windows):
                used = uses[np.minimum(rows + window, piece.end[rows])] - uses[rows]
                ranks[place] += _ranks(used, recent, piece.ids[rows])
        total = ranks.sum(axis=1, keepdims=True)
        hits = np.cumsum(ranks, axis=1) - ranks
        np.divide(hits, total, out=curves[:, layer], where=total > 0)
        tick()
    return curves


def _recent(piece: Piece, rows: Array, experts: int) -> Array:
    """When an expert was last used before each of ``rows``, in its sequence: int64 [len(rows), E + 1]; 0 for never."""
    last = np.zeros((len(piece.ids) + 1, experts + 1), dtype=np.int64)
    after = np.arange(1, len(last))
    last[after[:, None], piece.ids] = after[:, None]
    np.maximum.accumulate(last, axis=0, out=last)
    before = last[rows]
    return np.where(before > piece.start[rows, None], before, 0)


def _ranks(used: Array, recent: Array, ids: Array) -> Array:
    """How many of the choices ``ids`` [n, K] have rank 0, 1, ... in what the oracle would hold: int64 [E + 1]."""
    experts, top_k = used.shape[1] - 1, ids.shape[1]
    worth = (used * np.int64(recent.max(initial=0) + 1) + recent) * (top_k + 1)
    chosen = np.take_along_axis(worth, ids, axis=1) + np.arange(top_k, 0, -1)
    np.put_along_axis(worth, ids, chosen, axis=1)
    worth[:, experts] = -1  # the column of what was not routed is never held
    ahead = np.empty_like(ids)
    columns = np.ascontiguousarray(worth.T)  # summing over the first axis is several times faster
    for rank in range(top_k):
        ahead[:, rank] = (columns > chosen[:, rank]).sum(axis=0, dtype=np.uint16)
    return np.bincount(ahead[ids < experts], minlength=experts + 1)
