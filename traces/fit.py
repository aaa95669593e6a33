"""Reads from a recorded trace the law that :mod:`traces.fitted` generates by.

Each statistic of the source sets one number: what different sequences share sets popularity and domains, what tokens at
growing distance share sets what a sequence remembers, what layers tell of one another sets rank and drift, the largest
gate sets the sharpness. What a number does is simulated at the dimensions of the source, as exactly K experts are
chosen there. Shapes: T rows, L layers, K experts a token, E experts, R the rank.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from scipy.optimize import nnls
from scipy.special import ndtri

from traces.edit import slice_trace
from traces.errors import InputError
from traces.fitted import Lanes, Law, directions, fits_of, gates_of, layer_fits, routed, softmax
from traces.locality import overlap_profile
from traces.portrait import (
    DISTANCES,
    PLACES,
    Portrait,
    between_places,
    between_sequences,
    cross_layer,
    domain_of,
    known_from,
    largest_gate,
    lookahead_recall,
    portrait,
    shared_openings,
)
from traces.schedule import by_sequence
from traces.schema import Array, Trace
from traces.stats import loads
from traces.synthetic import winners

LEAST_TOKENS = 64
LAGS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64)
WINDOWS = (2, 4, 8, 32, 128)
"""Tokens for which a part of the hidden vector may last; which of them do is fitted."""
NEIGHBOUR_WEIGHT = 4.0
"""How much more than a longer lag the overlap of neighbours counts: it decides what a small cache hits."""
LIKENESS = np.linspace(0, 1, 33)
"""Correlations of two hidden vectors at which the overlap of their experts is simulated."""
BIAS_STEPS = 32
MOST_SCALE = 3.0
MOST_DRIFT_LOST = 0.5
SEARCH_TOKENS = 8192
SEARCH_LAYERS = 6
RANKS = 12
"""Ranks that are tried, each with draws of its own: what layers tell of one another scatters with the draws."""
DRAWS = 16
"""Layers, of :data:`PAIRS` pairs of tokens each, by which an overlap is simulated."""
PAIRS = 512

Say = Callable[[str], None]


def _nothing(what: str) -> None:
    """Tells nobody."""


def fit(trace: Trace, rng: np.random.Generator, *, say: Say = _nothing) -> Law:
    """The law of ``trace``; ``rng`` draws what is simulated on the way, and ``say`` is told what is being fitted.

    Domains and sequences need a trace that has several of them, the dependence of layers one of several layers; what
    the trace does not tell keeps the default of :class:`Law`. Raises :class:`InputError` for a trace in which the
    router has no choice, or that has fewer than :data:`LEAST_TOKENS` tokens.
    """
    _check(trace)
    seed = int(rng.integers(2**32))
    opening, domain_opening = shared_openings(trace)
    law = Law(
        source=trace.header.model,
        source_digest=trace.digest,
        bias=_curve(trace),
        opening=opening,
        domain_opening=domain_opening,
        rank=min(8.0, trace.header.experts),
        scores=trace.scores is not None,
        renormalised=_renormalised(trace),
        lookahead_recall=tuple(round(recall, 4) for recall in lookahead_recall(trace)),
        lookahead_router=trace.header.lookahead_router,
        domains=_domains(trace),
    )
    overlaps = _Overlaps.of(trace, domain_opening)
    say("popularity and memory")
    law = _with_memory(law, overlaps, trace, seed)
    say("dependence of layers")
    law = _with_layers(law, trace, seed)
    say("popularity and memory at this dependence")
    law = _with_memory(law, overlaps, trace, seed)
    say("gates")
    return _with_gates(law, trace, seed)


def twin(law: Law, rng: np.random.Generator, trace: Trace) -> Trace:
    """A trace that follows ``law`` and has the dimensions and the rows of ``trace``, to be compared with it."""
    order = by_sequence(trace)
    arrays = routed(law, rng, Lanes(order.starts, len(trace), domain_of(trace)), trace.header)
    back = np.empty(len(trace), dtype=np.int64)
    back[order.rows] = np.arange(len(trace))
    rows = {name: getattr(trace, name) for name in ("token_ids", "sequence", "position", "step", "phase")}
    header = trace.header.model_copy(update={"synthetic": True, "made_by": f"twin of {law.source}: {law.told()}"})
    return Trace.of(header, **rows, **{name: array[back] for name, array in arrays.items()})


def likeness(law: Law, rng: np.random.Generator, trace: Trace) -> tuple[Portrait, Portrait]:
    """How good a fit is: the portrait of ``trace``, and that of its :func:`twin`."""
    return portrait(trace), portrait(twin(law, rng, trace))


def _check(trace: Trace) -> None:
    header = trace.header
    if header.top_k == header.experts:
        raise InputError(f"trace must have more experts than top_k ({header.top_k}) to choose from, got as many")
    if len(trace) < LEAST_TOKENS:
        raise InputError(f"trace must have at least {LEAST_TOKENS} tokens to be fitted, got {len(trace)}")
    if np.diff(by_sequence(trace).starts, append=len(trace)).max() < 2:
        raise InputError("trace must have a sequence of 2 tokens or more to be fitted, got single tokens")


def _renormalised(trace: Trace) -> bool:
    """Whether the gates of a token add up to 1, as far as float16 can tell; so it is taken to be without gates."""
    if trace.gates is None:
        return True
    some = trace.gates[:: max(1, len(trace) // 1000)]
    return bool(abs(some.sum(axis=-1, dtype=np.float64).mean() - 1) < 0.01)


def _domains(trace: Trace) -> tuple[str, ...]:
    order = by_sequence(trace)
    sequences = trace.sequence[order.rows[order.starts]]
    return tuple(trace.header.domains[sequence] for sequence in sequences) if trace.header.domains else ()


def _curve(trace: Trace) -> tuple[float, ...]:
    """Biases that would give the loads of the experts if a fixed bar were all, the mean over layers at equal ranks."""
    counts = np.sort(loads(trace), axis=1)[:, ::-1]
    often = np.clip(counts / len(trace), 0.5 / len(trace), 1 - 0.5 / len(trace))
    biases = ndtri(often).mean(axis=0)
    experts = len(biases)
    steps = min(experts, BIAS_STEPS)
    curve = np.interp((np.arange(steps) + 0.5) / steps, (np.arange(experts) + 0.5) / experts, biases)
    return _rounded(curve - curve.mean())


def _rounded(values: Any) -> tuple[float, ...]:
    return tuple(round(float(value), 4) + 0.0 for value in values)  # no -0.0


@dataclass(frozen=True)
class _Overlaps:
    """What two tokens of the source share.

    They are of different sequences (``unrelated``, of one domain, or there at the same place, past the opening), or
    ``lags`` apart in one sequence.
    """

    unrelated: float
    same_domain: float
    same_place: float
    lags: Array  # int64 [those that some sequence is long enough for]
    lagged: Array  # float64 [same]

    @classmethod
    def of(cls, trace: Trace, opening: int) -> _Overlaps:
        between, profile = between_sequences(trace), overlap_profile(trace, LAGS)
        known = ~np.isnan(profile).all(axis=1)
        lagged = np.nanmean(profile[known], axis=1)
        candidates = (between.other_domain, between.anywhere, float(lagged[-1]))
        unrelated = next(value for value in candidates if not np.isnan(value))
        same_place = between_places(trace, opening, opening + PLACES).same_domain
        return cls(unrelated, between.same_domain, same_place, np.array(LAGS)[known], lagged)


def _with_memory(law: Law, overlaps: _Overlaps, trace: Trace, seed: int) -> Law:
    """``law`` with the popularity, the domains, the sequences and the windows that give the measured overlaps."""
    curve = np.array(_curve(trace))

    def unrelated(scale: float) -> float:
        return float(_simulated(replace(law, bias=tuple(scale * curve)), trace, seed, np.zeros(1))[0])

    law = replace(law, bias=_rounded(_solve(unrelated, overlaps.unrelated, 0.0, MOST_SCALE) * curve))
    table = np.maximum.accumulate(_simulated(law, trace, seed, LIKENESS))

    def alike(overlap: Any) -> Any:
        """The likeness that makes an overlap; 0 for one that is not known."""
        return np.nan_to_num(np.interp(overlap, table, LIKENESS))

    domain = round(float(alike(overlaps.same_domain)), 4) if len(set(law.domains)) > 1 else 0.0
    place = round(max(float(alike(overlaps.same_place)) - domain, 0.0), 4)
    sequence, windows = _parts(overlaps.lags, alike(overlaps.lagged) - domain, 1 - domain - place)
    return replace(law, domain=domain, place=place, sequence=sequence, windows=windows)


def _simulated(law: Law, trace: Trace, seed: int, likeness: Array) -> Array:
    """Mean overlap of two tokens whose hidden vectors have each of the correlations ``likeness``: float64 [same]."""
    rng, header = np.random.default_rng(seed), trace.header
    shared = np.zeros(len(likeness))
    for _ in range(DRAWS):
        toward = directions(rng, header.experts, law.rank)
        bias = rng.permutation(law.bias_of(header.experts))
        one, other = rng.standard_normal((2, PAIRS, toward.shape[1]))
        first = _sets(fits_of(one, toward) + bias, header.top_k)
        for place, alike in enumerate(likeness):
            second = _sets(fits_of(alike * one + np.sqrt(1 - alike**2) * other, toward) + bias, header.top_k)
            shared[place] += np.count_nonzero(first & second)
    return shared / (DRAWS * PAIRS * header.top_k)


def _sets(fits: Array, top_k: int) -> Array:
    chosen = np.zeros(fits.shape, dtype=bool)
    np.put_along_axis(chosen, winners(-fits, top_k), True, axis=-1)
    return chosen


def _parts(lags: Array, alike: Array, most: float) -> tuple[float, tuple[tuple[int, float], ...]]:
    """The shares of the sequence and of windows, ``most`` in all, that come nearest to ``alike`` at all lags."""
    windows = [tokens for tokens in WINDOWS if tokens <= 2 * lags[-1]]
    parts = np.stack([np.ones(len(lags)), *(np.maximum(0, 1 - lags / tokens) for tokens in windows)], axis=1)
    weight = np.where(lags == 1, NEIGHBOUR_WEIGHT, 1.0)
    shares, _ = nnls(parts * weight[:, None], np.maximum(alike, 0) * weight)
    if shares.sum() > most:
        shares *= most / shares.sum()
    shares = np.floor(shares * 1e4) / 1e4
    kept = tuple((tokens, float(share)) for tokens, share in zip(windows, shares[1:], strict=True) if share > 0)
    return float(shares[0]), kept


def _with_layers(law: Law, trace: Trace, seed: int) -> Law:
    """``law`` with the rank and the drift by which layers tell as much of one another as in the source."""
    some = _smaller(trace)
    near, far = (cross_layer(some, distance) for distance in DISTANCES)
    order, header = by_sequence(some), trace.header
    lanes = Lanes(order.starts, len(some), domain_of(some))
    layers = min(header.layers, SEARCH_LAYERS)

    def known(seed: int, **changed: Any) -> Array:
        fits = layer_fits(replace(law, **changed), np.random.default_rng(seed), lanes, layers, header.experts)
        ids = np.stack([winners(-one, header.top_k) for one in fits], axis=1)
        return np.array([known_from(ids, lanes.of_row(), header.experts, distance) for distance in DISTANCES])

    def kept(lost: float) -> float:
        near_too, far_too = known(seed, drift=1 - lost)
        return float(far_too / near_too)

    for _ in range(0 if np.isnan(near) else 1 if np.isnan(far) else 2):
        if not np.isnan(far):
            lost = _solve(kept, far / near, 0.0, MOST_DRIFT_LOST, 7)
            law = replace(law, drift=round(1 - lost, 4))
        powers = np.linspace(1, np.log2(2 * header.experts), RANKS)
        told = [known(seed + number, rank=2**power)[0] for number, power in enumerate(powers)]
        law = replace(law, rank=round(float(2 ** _where(near, powers, np.array(told))), 2))
    return law


def _where(goal: float, places: Array, values: Array) -> float:
    """Where a smooth curve through ``values``, which scatter, is nearest to ``goal``."""
    fine = np.linspace(places[0], places[-1], 1000)
    curve = np.polynomial.Polynomial.fit(places, values, 3)(fine)
    return float(fine[np.abs(curve - goal).argmin()])


def _smaller(trace: Trace) -> Trace:
    """Sequences from all over ``trace`` with about :data:`SEARCH_TOKENS` tokens in all; the longest ones are cut."""
    order = by_sequence(trace)
    sequences = trace.sequence[order.rows[order.starts]]
    most = max(2, SEARCH_TOKENS * len(sequences) // len(trace))
    taken = sequences[:: -(-len(sequences) // most)]
    return slice_trace(trace, sequences=",".join(map(str, taken)), tokens=2 * SEARCH_TOKENS // len(taken))


def _with_gates(law: Law, trace: Trace, seed: int) -> Law:
    """``law`` with the sharpness that gives the measured largest gate, where there are gates that tell it."""
    goal, header = largest_gate(trace), trace.header
    if np.isnan(goal) or (law.renormalised and header.top_k == 1):
        return law
    rng = np.random.default_rng(seed)
    fits = []
    for _ in range(DRAWS):
        toward = directions(rng, header.experts, law.rank)
        vectors = rng.standard_normal((PAIRS, toward.shape[1]))
        fits.append(fits_of(vectors, toward) + law.bias_of(header.experts))
    together = np.concatenate(fits)
    ids = winners(-together, header.top_k)

    def largest(power: float) -> float:
        return float(gates_of(law, softmax(2**power * together), ids)[:, 0].mean())

    return replace(law, sharpness=round(float(2 ** _solve(largest, goal, -6.0, 6.0)), 4))


def _solve(function: Callable[[float], float], goal: float, low: float, high: float, steps: int = 14) -> float:
    """Where a monotone ``function`` is ``goal``, by bisection; the nearer end when it is nowhere."""
    ends = function(low), function(high)
    if not min(ends) < goal < max(ends):
        return low if abs(goal - ends[0]) <= abs(goal - ends[1]) else high
    rising = ends[1] > ends[0]
    for _ in range(steps):
        middle = (low + high) / 2
        low, high = (middle, high) if (function(middle) < goal) == rising else (low, middle)
    return (low + high) / 2
