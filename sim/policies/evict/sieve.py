"""SIEVE: a queue, a bit for each block, and a hand that moves from the oldest to the youngest."""

from __future__ import annotations

from collections.abc import Collection
from typing import ClassVar

from sim.policies.base import PolicyContext
from sim.policies.evict.queues import Pool, QueuePolicy


class _Pool(Pool):
    def __init__(self, context: PolicyContext) -> None:
        super().__init__(context)
        self.blocks: list[int] = []  # oldest first
        self.visited: set[int] = set()
        self.hand = 0  # place in ``blocks`` at which the search begins

    def __contains__(self, block: object) -> bool:
        return block in self.blocks

    def use(self, block: int) -> None:
        if block in self:
            self.visited.add(block)

    def evict(self, allowed: Collection[int]) -> int:
        while (block := self.blocks[self.hand]) in self.visited or block not in allowed:
            self.visited.discard(block)
            self._turn(self.hand + 1)
        del self.blocks[self.hand]
        self._turn(self.hand)
        return block

    def _turn(self, place: int) -> None:
        self.hand = place if place < len(self.blocks) else 0

    def admit(self, block: int) -> None:
        self.blocks.append(block)


class Sieve(QueuePolicy):
    """Evicts the first block, from the hand on, that was not used since the hand last passed it.

    Source: Zhang, Yang, Yue, Vigfusson and Rashmi, *SIEVE is Simpler than LRU*, NSDI 2024, algorithm 1. A block that
    may not leave is passed over like one that was used: its bit is cleared.
    """

    name: ClassVar[str] = "sieve"

    def new_pool(self, context: PolicyContext) -> Pool:
        return _Pool(context)
