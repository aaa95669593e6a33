"""Fetch every missing expert over the link."""

from __future__ import annotations

from typing import ClassVar

from sim.policies.base import Assignment, LayerView, PlacementPolicy
from sim.policies.place.split import split


class Fetch(PlacementPolicy):
    """Runs every expert on the GPU: a missing one is copied first, and the GPU waits for it."""

    name: ClassVar[str] = "fetch"
    uses_cpu: ClassVar[bool] = False

    def place(self, view: LayerView) -> Assignment:
        return split(view, ())
