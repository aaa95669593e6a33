"""How sure a hit ratio is: bootstrap intervals over sequences, and paired differences between policies.

Tokens of one sequence resemble each other: what is drawn anew are sequences (or lock-step batches of them), never
tokens. The estimator is the ratio of sums, hits over uses of all drawn sequences together, so that a long sequence
weighs what it weighs in the trace. Intervals are percentiles of the resamples (Efron, "Bootstrap methods: another look
at the jackknife", Annals of Statistics 7(1), 1979). Differences between policies are *paired*: all policies see the
same resamples, so that what makes a sequence hard for every policy drops out.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from traces.schema import Array

RESAMPLES = 2000
CONFIDENCE = 0.95
FEWEST = 5
"""Sequences below which no interval is given: resamples of so few hardly differ, and the interval would flatter."""
FEW = 20
"""Sequences below which an interval is known to come out narrower than its name says."""

_MOST_DRAWS = 1 << 22


@dataclass(frozen=True)
class Interval:
    """Where a figure lies, with :data:`CONFIDENCE`."""

    low: float
    high: float

    def holds(self, value: float) -> bool:
        """Whether ``value`` lies within, the ends included."""
        return self.low <= value <= self.high


@dataclass(frozen=True, eq=False)
class Resampled:
    """Ratios of P policies on the same G sequences, and those on R resamples of the sequences."""

    ratios: Array  # float64 [P], nan where nothing was used
    draws: Array  # float64 [R, P]; no rows below FEWEST sequences
    sequences: int  # G, those with a use

    @classmethod
    def of(cls, hits: Array, uses: Array, *, rng: np.random.Generator, resamples: int = RESAMPLES) -> Resampled:
        """From ``hits`` [P, G] and ``uses`` [G]; sequences without a use, such as those without decode, do not count.

        ``rng`` draws the resamples. Raises ValueError when the shapes do not belong together.
        """
        hits, uses = np.asarray(hits, np.float64), np.asarray(uses, np.float64)
        if hits.ndim != 2 or uses.shape != hits.shape[1:]:
            raise ValueError(f"hits must be [policies, groups] with uses [groups], got {hits.shape} and {uses.shape}")
        hits, uses = hits[:, uses > 0], uses[uses > 0]
        if not len(uses):
            return cls(np.full(len(hits), np.nan), np.empty((0, len(hits))), 0)
        draws = _draws(hits, uses, rng, resamples if len(uses) >= FEWEST else 0)
        return cls(hits.sum(axis=1) / uses.sum(), draws, len(uses))

    def interval(self, policy: int) -> Interval | None:
        """Of the ratio of ``policy``, its place in ``ratios``; None with too few sequences."""
        return _percentiles(self.draws[:, policy])

    def difference(self, policy: int, other: int) -> Interval | None:
        """Of the ratio of ``policy`` minus that of ``other``, on the same resamples; None with too few sequences."""
        return _percentiles(self.draws[:, policy] - self.draws[:, other])

    def alike(self, policy: int, other: int) -> bool | None:
        """Whether the two are not distinguishable: the interval of their difference holds 0. None: nobody can say."""
        between = self.difference(policy, other)
        return None if between is None else between.holds(0.0)


def _draws(hits: Array, uses: Array, rng: np.random.Generator, resamples: int) -> Array:
    """The ratios of each resample, float64 [R, P]: a sequence counts as often as it was drawn."""
    groups = len(uses)
    out = np.empty((resamples, len(hits)))
    chunk = max(1, _MOST_DRAWS // groups)
    for at in range(0, resamples, chunk):
        part = out[at : at + chunk]
        times = rng.multinomial(groups, np.full(groups, 1 / groups), size=len(part)).astype(np.float64)
        part[:] = (times @ hits.T) / (times @ uses)[:, None]
    return out


def _percentiles(draws: Array) -> Interval | None:
    if not len(draws):
        return None
    low, high = np.quantile(draws, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    return Interval(float(low), float(high))


def caveat(sequences: int) -> str | None:
    """What has to be said of intervals over so many sequences, or None."""
    if sequences < FEWEST:
        return f"no intervals: {sequences} sequences are too few to resample (at least {FEWEST})"
    if sequences < FEW:
        return f"intervals over {sequences} sequences only: they come out too narrow"
    return None
