"""Fetch every missing expert over the link."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from sim.policies.base import LayerView, PlacementPolicy


class Fetch(PlacementPolicy):
    """Runs every expert on the GPU: a missing one is copied first, and the GPU waits for it."""

    name: ClassVar[str] = "fetch"
    uses_cpu: ClassVar[bool] = False

    def on_cpu(self, view: LayerView) -> Sequence[int]:
        return ()
