"""Whether the best of a sweep can be told from the others: paired over the sequences that all of them decoded."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd

from analysis.sweep_fairness import few
from analysis.sweep_table import Axis, Shown, hue_label
from analysis.uncertainty import Resampled, caveat
from traces.schema import Array

JUDGED = "tokens_per_s"
"""The figure whose parts a sweep keeps by sequence."""

SECONDS, TOKENS = "decode_s_by_group", "decode_tokens_by_group"
MOST_JUDGED = 500
"""Points that are held against the best, the quickest ones: each takes thousands of resamples."""


def judged(rows: Sequence[pd.DataFrame]) -> Resampled | None:
    """Seconds a decode token of each of ``rows``, points over their seeds, on the same resamples of the sequences.

    None where they did not decode the same ones, in the same groups, or where the sweep has not kept them.
    """
    found = [_summed(one) for one in rows]
    if not found or any(one is None for one in found):
        return None
    seconds, tokens = zip(*[one for one in found if one is not None], strict=True)
    if any(not np.array_equal(one, tokens[0]) for one in tokens):
        return None
    return Resampled.of(np.array(seconds), tokens[0], rng=np.random.default_rng(0))


def _summed(rows: pd.DataFrame) -> tuple[Array, Array] | None:
    """Decode seconds and tokens of each group, the mean over rows that differ in their seed."""
    if SECONDS not in rows or rows[SECONDS].isna().any() or rows[SECONDS].map(len).nunique() != 1:
        return None
    seconds, tokens = (np.array([[*one] for one in rows[name]], float) for name in (SECONDS, TOKENS))
    return None if (tokens != tokens[0]).any() else (seconds.mean(axis=0), tokens[0])


def told_of_best(rows: Mapping[str, pd.DataFrame], best: str) -> list[str]:
    """Which of the points, by what they are called, cannot be told from the ``best``."""
    quickest = sorted(rows, key=lambda name: -rows[name][JUDGED].mean())[:MOST_JUDGED]
    rows = {name: rows[name] for name in quickest}
    found = judged([*rows.values()])
    if found is None:
        return ["whether others can be told from it is not known: not all points decoded the same sequences"]
    if (doubt := caveat(found.sequences)) and not len(found.draws):
        return [doubt]
    names, place = [*rows], [*rows].index(best)
    alike = [name for other, name in enumerate(names) if other != place and found.alike(other, place)]
    told = [f"not distinguishable from it: {few(alike)}"] if alike else []
    return [*told, *([doubt] if doubt else [])]


def told_of_leads(picture: Shown) -> list[str]:
    """At which points of x who cannot be told from whoever is best there."""
    assert picture.hue is not None, "a picture with leads has lines to tell apart"
    alike: dict[str, list[str]] = {}
    unknown, doubts = 0, dict[str, None]()
    for number, value in zip(picture.x.numbers or (), picture.x.values, strict=True):
        here = picture.table.competing[picture.table.competing[picture.x.name] == value]
        by_name = _by_name(here, picture.hue, picture.value)
        if len(by_name) < 2:
            continue
        found = judged([*by_name.values()])
        if found is None:
            unknown += 1
            continue
        if doubt := caveat(found.sequences):
            doubts[doubt] = None
        best = int(np.argmin(found.ratios))
        names = [name for place, name in enumerate(by_name) if place != best and found.alike(place, best)]
        if names:
            alike.setdefault(f"{few(names)} from {[*by_name][best]}", []).append(picture.x.told(number))
    told = [f"not distinguishable: {who} at {', '.join(places)}" for who, places in alike.items()]
    if unknown:
        told.append(f"at {unknown} points of x nobody can say: not all decoded the same sequences")
    return [*told, *doubts]


def _by_name(rows: pd.DataFrame, hue: Axis, value: str) -> dict[str, pd.DataFrame]:
    known = rows[rows[value].notna()]
    return {hue_label(hue, one): part for one in hue.values if len(part := known[known[hue.name] == one])}
