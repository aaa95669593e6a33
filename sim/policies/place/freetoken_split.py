"""Share the missing experts between link and CPU in proportion to their bandwidths."""

from __future__ import annotations

from collections.abc import Mapping
from math import floor
from typing import Any, ClassVar

from sim.policies.base import Assignment, LayerView, PlacementPolicy
from sim.policies.place.split import split


class FreeTokenSplit(PlacementPolicy):
    """Fetches q of m missing experts, those with the most tokens, and computes the others on the CPU.

    With link and cpu in experts a second (one copy; one CPU expert of one token), the share to fetch is f =
    link / (link + cpu) when both were measured while both run (option ``bandwidths`` = "together"), and f =
    min(1, link / cpu) when each was measured alone ("apart", which is what predicted costs are); "unknown" is "apart"
    with q at most 1. q is whichever of floor(m f) and floor(m f) + 1 makes the larger of q (1 - f) and (m - q) f
    smaller, the lower one at a tie, and never above m.
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
        share = cpu_s / (cpu_s + view.copy_s) if how == "together" else min(1.0, cpu_s / view.copy_s)
        low = floor(count * share)
        best = min((low, low + 1), key=lambda fetched: max(fetched * (1 - share), (count - fetched) * share))
        return min(best, count if how != "unknown" else 1)
