"""A fixed set, the most used blocks of a calibration trace; and what all fixed sets have in common."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import ClassVar

from sim.policies.base import EvictionPolicy, PolicyContext


class FixedSet(EvictionPolicy):
    """Loads each pool's first blocks in an order of its own before the first event, and never evicts.

    A pool gets the longest prefix of that order that fits. Room that is left over (the next block may be too large for
    it, or the cache be larger than the model) is open to whatever misses and fits, and what has come in stays. The
    initial load is counted apart.
    """

    bypass: ClassVar[bool] = True

    def __init__(self, context: PolicyContext) -> None:
        super().__init__(context)
        self._kept = [False] * context.blocks

    @abstractmethod
    def order_of(self, pool: range) -> list[int]:
        """The blocks of a pool, those that are to be loaded first."""

    def preload(self) -> Sequence[int]:
        """The fixed set, ascending; it is resident from here on."""
        context = self.context
        width = context.blocks if context.shared else context.experts
        chosen = [
            block for first in range(0, context.blocks, width) for block in self._fill(range(first, first + width))
        ]
        for block in chosen:
            self._kept[block] = True
        return sorted(chosen)

    def _fill(self, pool: range) -> list[int]:
        context, chosen = self.context, list[int]()
        room = context.capacity if context.shared else context.capacity_of(pool[0] // context.experts)
        for block in self.order_of(pool):
            room -= self.context.weights[block // self.context.experts]
            if room < 0:
                break
            chosen.append(block)
        return chosen

    def key(self, block: int) -> float:
        return self._kept[block]

    def admit(self, block: int) -> None:
        self._kept[block] = True

    def forget(self, block: int) -> None:
        self._kept[block] = False


class Static(FixedSet):
    """Loads each pool's most used blocks of a calibration trace before the first event, and never evicts.

    Used means: in the most events; equal ones go by the lowest block. Room that is left over is open to whatever misses
    and fits. The calibration trace must not be the one that is judged: a set fitted to it would be a bound, not a
    policy. Source: the popularity placement of Fiddler, arXiv 2402.07033.
    """

    name: ClassVar[str] = "static"
    needs: ClassVar[frozenset[str]] = frozenset({"calibration"})

    def __init__(self, context: PolicyContext) -> None:
        super().__init__(context)
        if context.calibration is None:
            raise ValueError("static must be given a calibration trace, got none")
        self._uses = context.calibration.uses()

    def order_of(self, pool: range) -> list[int]:
        return sorted(pool, key=lambda block: (-self._uses[block], block))
