"""Share the missing experts between link and CPU in proportion to their bandwidths."""

from __future__ import annotations

from collections.abc import Mapping
from math import floor
from typing import Any, ClassVar

from sim.policies.base import Assignment, LayerView, PlacementPolicy
from sim.policies.place.split import split

TIE = 1e-9
"""Times whose ratio is nearer to 1 than this are equal."""


class FreeTokenSplit(PlacementPolicy):
    """Fetches q of m missing experts, those with the most tokens, and computes the others on the CPU.

    With link and cpu in experts a second (one copy; one CPU expert of one token), the share to fetch is f =
    link / (link + cpu) when both were measured while both run (option ``bandwidths`` = "together"), and f =
    min(1, link / cpu) when each was measured alone ("apart"); "unknown" is "apart" with q at most 1. q is whichever of
    floor(m f) and floor(m f) + 1 makes the larger of q (1 - f) and (m - q) f smaller, the lower one at a tie, and never
    above m. Times that differ by a billionth of themselves are a tie, as rounding makes no difference.

    Source: FreeToken's split rule. Departures: the rates are the view's, of undisturbed work, on either clock and in
    every mode, so that "together" is the formula on rates that were not measured together. Without a profile FreeToken
    fetches one expert at most, as it knows no bandwidth; here the catalogue's numbers stand for a profile, and
    "unknown" has to be asked for.
    """

    name: ClassVar[str] = "freetoken-split"
    defaults: ClassVar[Mapping[str, Any]] = {"bandwidths": "apart"}

    def __init__(self, context: Any) -> None:
        super().__init__(context)
        known = ("together", "apart", "unknown")
        if self.options["bandwidths"] not in known:
            raise ValueError(f"bandwidths must be one of {', '.join(known)}, got {self.options['bandwidths']!r}")

    def place(self, view: LayerView) -> Assignment:
        return split(view, [expert for expert, _ in view.misses[self._fetched(view) :]])

    def _fetched(self, view: LayerView) -> int:
        """q, for the misses in ``view``."""
        count, cpu_s, how = len(view.misses), view.cpu_expert_s(1, False), self.options["bandwidths"]
        link_s = view.copy_s if how == "together" else max(0.0, view.copy_s - cpu_s)  # (1 - f) : f is link_s : cpu_s
        low = floor(count * (cpu_s / (cpu_s + link_s)))
        low_s, next_s = (max(fetched * link_s, (count - fetched) * cpu_s) for fetched in (low, low + 1))
        best = low + 1 if next_s < low_s * (1 - TIE) else low
        return min(best, count if how != "unknown" else 1)
