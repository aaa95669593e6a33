"""Farthest next use, without bypass."""

from __future__ import annotations

from typing import ClassVar

from sim.policies.evict.belady import Belady


class BeladyForced(Belady):
    """Evicts the block whose next use is farthest, and keeps every miss: where not all of an event's experts fit, those
    that had to be loaded stay before those that hit.

    Source: arXiv 2608.07911. Its distance from ``belady`` is what admission is worth, beside the choice of victims.
    """

    name: ClassVar[str] = "belady-forced"
    bypass: ClassVar[bool] = False
    misses_first: ClassVar[bool] = True
