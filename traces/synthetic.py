"""Seeded generators of routing traces, for tests and what-ifs; every trace they make is marked synthetic.

In all of them the experts of a layer have a Zipf popularity (weight r^-skew at rank r) in an order of the layer's own,
and a token draws top_k distinct experts by it: an exponential race, in which the k smallest of Exp(1)/weight win, is
sampling without replacement (Efraimidis and Spirakis 2006). Shapes: T rows, L layers, K experts a token, E experts.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np

from traces.errors import InputError, unknown_name
from traces.limits import MOST_EXPERT_BYTES, MOST_LAYERS
from traces.memory import check_free
from traces.schema import CHUNK_ELEMENTS, NOT_ROUTED, Array, Phase, Trace, TraceHeader

MOST_NUMBER = 2**31 - 1
"""Sequences, and positions in one, are 32-bit numbers."""

MOST_SKEW = 8.0
"""Beyond it the rarest of some thousand experts has a weight that float32 cannot hold."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """The dimensions of a generated trace; raises :class:`InputError` for a value that makes no trace.

    A sequence has ``prompt_tokens`` rows of prefill and ``new_tokens`` rows of decode. ``expert_bytes`` is one number
    or one a layer.
    """

    sequences: int = 8
    prompt_tokens: int = 64
    new_tokens: int = 64
    layers: int = 8
    experts: int = 32
    top_k: int = 4
    expert_bytes: int | tuple[int, ...] = 1 << 20

    def __post_init__(self) -> None:
        for name, least in (("sequences", 1), ("prompt_tokens", 0), ("new_tokens", 0)):
            within(name, getattr(self, name), least, MOST_NUMBER)
        within("layers", self.layers, 1, MOST_LAYERS)
        within("prompt-tokens + new-tokens", self.tokens, 1)
        within("experts", self.experts, 1, NOT_ROUTED - 1)
        within("top_k", self.top_k, 1, self.experts)
        if len(self.layer_bytes) != self.layers:
            raise InputError(f"expert-bytes must have one entry or {self.layers} entries, got {len(self.layer_bytes)}")
        for size in (min(self.layer_bytes), max(self.layer_bytes)):
            within("expert_bytes", size, 0, MOST_EXPERT_BYTES)

    @property
    def tokens(self) -> int:
        """Rows of one sequence."""
        return self.prompt_tokens + self.new_tokens

    @property
    def layer_bytes(self) -> tuple[int, ...]:
        """Bytes of one expert, for each layer."""
        return (self.expert_bytes,) * self.layers if isinstance(self.expert_bytes, int) else self.expert_bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class Sizes(Shape):
    """What all generators here have in common; raises :class:`InputError` for a value that makes no trace.

    ``lookahead`` is the depth D of the predictions (0: none), ``lookahead_recall`` the probability that a true expert
    is among them.
    """

    skew: float = 1.0
    scores: bool = False
    lookahead: int = 0
    lookahead_recall: float = 0.9

    def __post_init__(self) -> None:
        Shape.__post_init__(self)  # a class with slots is made anew, and super() would look for the old one
        within("lookahead", self.lookahead, 0, MOST_LAYERS)
        within("skew", self.skew, 0.0, MOST_SKEW)
        within("lookahead_recall", self.lookahead_recall, 0.0, 1.0)


def zipf(rng: np.random.Generator, sizes: Sizes) -> Trace:
    """Independent tokens: every token draws its experts by the layer's Zipf popularity."""
    streams = rng.spawn(4)
    ranks = _independent(streams[0], sizes)
    return _trace("zipf", {}, sizes, _experts(streams[1], sizes, ranks, sizes.sequences * sizes.tokens), streams[2:])


def phase_change(rng: np.random.Generator, sizes: Sizes, *, period: int = 256) -> Trace:
    """As :func:`zipf`, but every ``period`` rows of the trace the popularity goes to other experts, in every layer."""
    within("period", period, 1, MOST_NUMBER)
    streams = rng.spawn(4)
    ranks = _independent(streams[0], sizes)
    ids = _experts(streams[1], sizes, ranks, period)
    return _trace("phase_change", {"period": period}, sizes, ids, streams[2:])


def markov(rng: np.random.Generator, sizes: Sizes, *, locality: float = 0.5) -> Trace:
    """A token keeps each expert of its predecessor with probability ``locality``, and draws the others by popularity.

    Predecessor: the same layer, the token before in the same sequence. Locality 0 gives the trace of :func:`zipf`.
    """
    within("locality", locality, 0.0, 1.0)
    streams = rng.spawn(5)
    ranks = _sticky(streams[0], streams[4], sizes, locality)
    ids = _experts(streams[1], sizes, ranks, sizes.sequences * sizes.tokens)
    return _trace("markov", {"locality": locality}, sizes, ids, streams[2:4])


GENERATORS: dict[str, Callable[..., Trace]] = {"zipf": zipf, "phase_change": phase_change, "markov": markov}
"""The generators by name; each takes (rng, sizes) and its own parameters by keyword."""


def generate(name: str, seed: int, sizes: Sizes, **own: Any) -> Trace:
    """The trace of generator ``name`` with a fresh ``seed``, which stands in the header's ``made_by``.

    ``own`` are the generator's own parameters. Raises :class:`InputError` for an unknown name or parameter, and for a
    trace that the host's free memory would not hold while it is made.
    """
    if name not in GENERATORS:
        raise unknown_name("generator", name, GENERATORS)
    within("seed", seed, 0)
    known = list(inspect.signature(GENERATORS[name]).parameters)[2:]
    for parameter in own:
        if parameter not in known:
            raise InputError(f"{parameter} must be left out for {name}, got {own[parameter]}")
    _check_memory(sizes, own.get("period"))
    trace = GENERATORS[name](np.random.default_rng(seed), sizes, **own)
    made_by = trace.header.made_by.replace("(", f"(seed={seed}, ", 1)
    return replace(trace, header=trace.header.model_copy(update={"made_by": made_by}))


def _check_memory(sizes: Sizes, period: int | None) -> None:
    """Raises :class:`InputError` when the free memory is less than about the peak of making a trace.

    The bytes of a row, of a choice (one expert of one token in one layer) and of a score are as they were measured.
    """
    rows = sizes.sequences * sizes.tokens
    places = sizes.layers * sizes.experts
    choice_bytes = 10 + (20 + 5 * sizes.lookahead if sizes.lookahead else 0)
    row_bytes = 76 + choice_bytes * sizes.layers * sizes.top_k + 2 * places * sizes.scores
    keys_bytes = 12 * sizes.sequences * places  # of one position of all sequences
    orders_bytes = 4 * places * (rows // period if period else 1)
    needed = rows * row_bytes + keys_bytes + orders_bytes
    check_free(
        needed,
        "sequences x tokens x layers",
        f"{sizes.sequences} x {sizes.tokens} x {sizes.layers}, which take about {needed / 1e9:.1f} GB",
    )


def within(name: str, value: float, least: float, most: float | None = None) -> None:
    """Raises :class:`InputError` unless ``least <= value <= most``; not-a-number is never within.

    The error names the option of the command line, which has dashes.
    """
    if not value >= least or (most is not None and not value <= most):
        rule = f"be at least {least}" if most is None else f"be from {least} to {most}"
        raise InputError(f"{name.replace('_', '-')} must {rule}, got {value}")


def _races(rng: np.random.Generator, sizes: Sizes) -> Iterator[tuple[int, Array]]:
    """Yields (first position, keys [P, sequences, L, E]) for pieces of consecutive positions; small keys win."""
    weight = np.arange(1, sizes.experts + 1, dtype=np.float64) ** -sizes.skew
    shape = (sizes.sequences, sizes.layers, sizes.experts)
    piece = max(1, CHUNK_ELEMENTS // int(np.prod(shape)))
    for start in range(0, sizes.tokens, piece):
        keys = rng.standard_exponential((min(piece, sizes.tokens - start), *shape), dtype=np.float32)
        keys /= weight.astype(np.float32)
        yield start, keys


def winners(keys: Array, top_k: int) -> Array:
    """Places of the ``top_k`` smallest keys along the last axis, the smallest first."""
    places = np.argpartition(keys, top_k - 1, axis=-1)[..., :top_k]
    order = np.argsort(np.take_along_axis(keys, places, axis=-1), axis=-1)
    return np.take_along_axis(places, order, axis=-1)


def _independent(rng: np.random.Generator, sizes: Sizes) -> Array:
    """Popularity ranks uint16 [sequences, tokens, L, K], all drawn afresh."""
    ranks = np.empty((sizes.sequences, sizes.tokens, sizes.layers, sizes.top_k), dtype=np.uint16)
    for start, keys in _races(rng, sizes):
        ranks[:, start : start + len(keys)] = winners(keys, sizes.top_k).swapaxes(0, 1)
    return ranks


def _sticky(rng: np.random.Generator, keep_rng: np.random.Generator, sizes: Sizes, locality: float) -> Array:
    """Popularity ranks uint16 [sequences, tokens, L, K]; a kept expert wins the race by a negative key."""
    ranks = np.empty((sizes.sequences, sizes.tokens, sizes.layers, sizes.top_k), dtype=np.uint16)
    before: Array | None = None
    ahead = np.arange(-sizes.top_k, 0, dtype=np.float32)  # kept experts stay in their order
    for start, block in _races(rng, sizes):
        for place, keys in enumerate(block):
            if before is not None:
                kept = keep_rng.random(before.shape) < locality
                drawn = np.take_along_axis(keys, before, axis=-1)
                np.put_along_axis(keys, before, np.where(kept, ahead, drawn), axis=-1)
            before = winners(keys, sizes.top_k)
            ranks[:, start + place] = before
    return ranks


def _experts(rng: np.random.Generator, sizes: Sizes, ranks: Array, period: int) -> Array:
    """Expert ids [T, L, K] of popularity ranks: every layer has its own order, renewed every ``period`` rows."""
    rows = sizes.sequences * sizes.tokens
    phases = -(-rows // period)
    order = np.tile(np.arange(sizes.experts, dtype=np.uint16), (phases, sizes.layers, 1))
    order = rng.permuted(order, axis=-1)  # [phases, L, E]
    phase = np.arange(rows) // period
    ids: Array = order[phase[:, None, None], np.arange(sizes.layers)[:, None], ranks.reshape(rows, sizes.layers, -1)]
    return ids


def _gates(rng: np.random.Generator, ids: Array) -> Array:
    """Random weights float32 [T, L, K] of the chosen experts: descending, and 1 in sum."""
    weights = rng.standard_exponential(ids.shape, dtype=np.float32) + np.float32(0.25)  # none vanishes in float16
    weights = np.sort(weights, axis=-1)[..., ::-1]
    gates: Array = weights / weights.sum(axis=-1, keepdims=True)
    return gates


def _scores(rng: np.random.Generator, ids: Array, gates: Array, experts: int) -> Array:
    """Full scores float16 [T, L, E] of sum 1, whose top-k are ``ids`` in the proportions of ``gates``."""
    scores = np.empty((*ids.shape[:2], experts), dtype=np.float16)
    piece = max(1, CHUNK_ELEMENTS // (ids.shape[1] * experts))
    for start in range(0, len(ids), piece):
        rows = slice(start, start + piece)
        full = rng.random(scores[rows].shape, dtype=np.float32)
        full *= np.float32(0.9) * gates[rows, :, -1:]  # the others stay below the least chosen one
        np.put_along_axis(full, ids[rows].astype(np.int64), gates[rows], axis=-1)
        scores[rows] = full / full.sum(axis=-1, keepdims=True)
    return scores


def predict(rng: np.random.Generator, ids: Array, experts: int, depth: int, recall: float) -> Array:
    """Predictions uint16 [T, L, D, K] of ids [T, L, K]: a true expert stays with probability ``recall``, else another.

    The replacements in one prediction are neighbours, in a circle, among the wrong experts, from a random place on;
    where there are too few wrong experts, and beyond the last layer, an entry is NOT_ROUTED.
    """
    rows, layers, top_k = ids.shape
    wrong = experts - top_k
    predicted = np.full((rows, layers, depth, top_k), NOT_ROUTED, dtype=np.uint16)
    for ahead in range(1, min(depth, layers - 1) + 1):
        true = ids[:, ahead:]
        missed = rng.random(true.shape) >= recall
        number = np.cumsum(missed, axis=-1) - 1
        first = rng.integers(0, max(wrong, 1), size=(*true.shape[:2], 1))
        other = _nth_absent(true, (first + number) % max(wrong, 1))
        other[number >= wrong] = NOT_ROUTED
        predicted[:, : layers - ahead, ahead - 1] = np.where(missed, other, true)
    return predicted


def _nth_absent(present: Array, n: Array) -> Array:
    """The n-th (from 0) of the experts that are not in ``present``, along the last axis; int64."""
    absent = n.astype(np.int64)
    for expert in np.moveaxis(np.sort(present, axis=-1), -1, 0):
        absent += absent >= expert[..., None]
    return absent


def _trace(name: str, own: dict[str, Any], sizes: Sizes, ids: Array, streams: list[np.random.Generator]) -> Trace:
    """Adds gates, options, rows and the header. Token ids are all 0: there is no text, and 0 is in any vocabulary."""
    gate_rng, option_rng = streams
    score_rng, ahead_rng = option_rng.spawn(2)
    gates = _gates(gate_rng, ids)
    header = TraceHeader(
        model=name,
        layers=sizes.layers,
        experts=sizes.experts,
        top_k=sizes.top_k,
        expert_bytes=sizes.layer_bytes,
        made_by=f"{name}({', '.join(f'{key}={value}' for key, value in (own | asdict(sizes)).items())})",
        synthetic=True,
        software={"numpy": np.__version__},
    )
    return Trace.of(
        header,
        expert_ids=ids,
        token_ids=np.zeros(len(ids)),
        gates=gates,
        scores=_scores(score_rng, ids, gates, sizes.experts) if sizes.scores else None,
        lookahead=predict(ahead_rng, ids, sizes.experts, sizes.lookahead, sizes.lookahead_recall)
        if sizes.lookahead
        else None,
        **rows_of(sizes),
    )


def rows_of(sizes: Shape) -> dict[str, Array]:
    """The columns of a run of one sequence at a time: a prompt is one forward pass, every decode token is another."""
    position = np.tile(np.arange(sizes.tokens), sizes.sequences)
    decode = position >= sizes.prompt_tokens
    passes = sizes.new_tokens + (sizes.prompt_tokens > 0)
    sequence = np.repeat(np.arange(sizes.sequences), sizes.tokens)
    within = np.where(decode, position - sizes.prompt_tokens + (sizes.prompt_tokens > 0), 0)
    phase = np.where(decode, int(Phase.DECODE), int(Phase.PREFILL))
    return {"sequence": sequence, "position": position, "step": sequence * passes + within, "phase": phase}
