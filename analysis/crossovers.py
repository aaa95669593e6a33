"""Where curves over one axis cross, which of them leads where, and which points no other point beats."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations, pairwise

import numpy as np
import numpy.typing as npt

Numbers = npt.NDArray[np.float64]
ALIKE = 1e-9
"""Values that differ by no more than this share of the larger one are equal."""


@dataclass(frozen=True)
class Crossing:
    """Two curves change places at ``x``, interpolated between the measured points ``low`` and ``high``."""

    x: float
    low: float
    high: float
    below: str  # who is better to the left
    above: str  # who is better to the right


@dataclass(frozen=True)
class Lead:
    """Those that are best, equal to each other, from ``start`` to ``end``."""

    names: tuple[str, ...]
    start: float
    end: float


def crossings(x: Sequence[float], curves: Mapping[str, Sequence[float]], *, log: bool, lower: bool) -> list[Crossing]:
    """All crossings of two curves, from left to right; equal places in the order of the curves.

    ``x`` is ascending. Between two points the difference of two curves is linear in x, or in its logarithm with
    ``log``. Points where either curve is nan are passed over; where curves are equal over a stretch and then change
    places, they cross where it begins. ``lower`` says that smaller values are better.
    """
    found = []
    for one, other in combinations(curves, 2):
        gap = _gap(np.asarray(curves[one], float), np.asarray(curves[other], float)) * (-1 if lower else 1)
        apart = np.flatnonzero(np.isfinite(gap) & (gap != 0))
        for left, right in pairwise(apart.tolist()):
            if gap[left] * gap[right] > 0:
                continue
            known = next(place for place in range(left + 1, right + 1) if np.isfinite(gap[place]))
            at = _root(x[left], x[known], gap[left], gap[known], log=log)
            winners = (one, other) if gap[left] > 0 else (other, one)
            found.append(Crossing(at, float(x[left]), float(x[right]), *winners))
    return sorted(found, key=lambda crossing: crossing.x)


def _gap(one: Numbers, other: Numbers) -> Numbers:
    gap = one - other
    with np.errstate(invalid="ignore"):
        gap[np.abs(gap) <= ALIKE * np.maximum(np.abs(one), np.abs(other))] = 0.0
    return gap


def _root(left: float, right: float, at_left: float, at_right: float, *, log: bool) -> float:
    share = at_left / (at_left - at_right)
    if log:
        return float(np.exp(np.log(left) + share * (np.log(right) - np.log(left))))
    return float(left + share * (right - left))


def leads(x: Sequence[float], curves: Mapping[str, Sequence[float]], *, log: bool, lower: bool) -> list[Lead]:
    """Who is best from the first to the last of ``x``, in stretches from left to right; see :func:`crossings`.

    A curve takes part between its known points; stretches in which none does are left out.
    """
    places = sorted({*map(float, x), *(one.x for one in crossings(x, curves, log=log, lower=lower))})
    found: list[Lead] = []
    for start, end in pairwise(places):
        middle = float(np.sqrt(start * end)) if log else (start + end) / 2
        names = _best({name: _value(middle, x, curve, log=log) for name, curve in curves.items()}, lower=lower)
        if found and found[-1].names == names and found[-1].end == start:
            found[-1] = Lead(names, found[-1].start, end)
        elif names:
            found.append(Lead(names, start, end))
    return found


def _value(at: float, x: Sequence[float], curve: Sequence[float], *, log: bool) -> float:
    known = np.isfinite(np.asarray(curve, float))
    places, values = np.asarray(x, float)[known], np.asarray(curve, float)[known]
    if not len(places):
        return float("nan")
    if log:
        at, places = float(np.log(at)), np.log(places)
    return float(np.interp(at, places, values, left=np.nan, right=np.nan))


def _best(values: Mapping[str, float], *, lower: bool) -> tuple[str, ...]:
    known = {name: -value if lower else value for name, value in values.items() if np.isfinite(value)}
    if not known:
        return ()
    top = max(known.values())
    return tuple(name for name, value in known.items() if top - value <= ALIKE * max(abs(top), abs(value)))


def pareto(costs: Sequence[float], values: Sequence[float], *, lower: bool) -> list[int]:
    """Indices of the points that no other beats in both cost and value, by cost; of equal points the first one.

    Lower costs are better, and so are lower values with ``lower``. Points with nan are passed over.
    """
    worth = [-value if lower else value for value in values]
    known = [place for place in range(len(worth)) if np.isfinite(costs[place]) and np.isfinite(worth[place])]
    front: list[int] = []
    for place in sorted(known, key=lambda place: (costs[place], -worth[place], place)):
        if not front or worth[place] > worth[front[-1]]:
            front.append(place)
    return front
