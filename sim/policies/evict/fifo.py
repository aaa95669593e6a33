"""First in, first out."""

from __future__ import annotations

from typing import ClassVar

from sim.policies.base import EvictionPolicy, PolicyContext


class Fifo(EvictionPolicy):
    """Evicts the block that came in first; those of one decision come in lowest first. An event's experts that are not
    in yet come after all that are."""

    name: ClassVar[str] = "fifo"

    def __init__(self, context: PolicyContext) -> None:
        super().__init__(context)
        self._arrival: dict[int, int] = {}
        self._arrivals = 0

    def key(self, block: int) -> float:
        return self._arrival.get(block, self._arrivals)

    def admit(self, block: int) -> None:
        self._arrival[block] = self._arrivals
        self._arrivals += 1

    def forget(self, block: int) -> None:
        self._arrival.pop(block, None)
