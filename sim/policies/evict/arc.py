"""ARC: one list for blocks used once, one for the others, a ghost of each, and a share that the ghosts adapt."""

from __future__ import annotations

from collections.abc import Collection
from typing import ClassVar

from sim.policies.base import PolicyContext
from sim.policies.evict.queues import Pool, QueuePolicy


class _Pool(Pool):
    def __init__(self, context: PolicyContext) -> None:
        super().__init__(context)
        self.once, self.often = self.queue(), self.queue()  # T1 and T2
        self.once_ghost, self.often_ghost = self.queue(), self.queue()  # B1 and B2
        self.target = 0.0  # p: what T1 should weigh
        self.favours_often = False  # the last miss was found in B2
        self._weight_of = self._context.weights or (1,) * self._context.layers

    def __contains__(self, block: object) -> bool:
        return block in self.once.blocks or block in self.often.blocks

    def use(self, block: int) -> None:
        if block in self:
            (self.once if block in self.once.blocks else self.often).remove(block)
            self.often.push(block)
            return
        self.favours_often = block in self.often_ghost.blocks
        weight = self._weight_of[block // self._context.experts]
        if block in self.once_ghost.blocks:
            ratio = self.often_ghost.weight / self.once_ghost.weight
            self.target = min(self.capacity, self.target + weight * max(1.0, ratio))
        elif self.favours_often:
            ratio = self.once_ghost.weight / self.often_ghost.weight
            self.target = max(0.0, self.target - weight * max(1.0, ratio))

    def evict(self, allowed: Collection[int]) -> int:
        lists = [(self.once, self.once_ghost), (self.often, self.often_ghost)]
        weight = self.once.weight
        if not (weight > self.target or (self.favours_often and weight == self.target)):
            lists.reverse()
        queue, ghost, victim = next(
            (queue, ghost, block) for queue, ghost in lists for block in queue.blocks if block in allowed
        )
        queue.remove(victim)
        ghost.push(victim)
        return victim

    def admit(self, block: int) -> None:
        known = [ghost for ghost in (self.once_ghost, self.often_ghost) if block in ghost.blocks]
        for ghost in known:
            ghost.remove(block)
        (self.often if known else self.once).push(block)
        self.favours_often = False
        self.once_ghost.shrink(self.capacity - self.once.weight)
        rest = self.once.weight + self.once_ghost.weight + self.often.weight
        self.often_ghost.shrink(2 * self.capacity - rest)


class Arc(QueuePolicy):
    """Evicts the least recently used of the blocks used once, or of the others, by an adapted share.

    Source: Megiddo and Modha, *ARC: A Self-Tuning, Low Overhead Replacement Cache*, FAST 2003, figure 4, with p as a
    real number. The ghosts are cut after a block has come in, not before, to the same effect. Blocks that weigh more
    than one slot count by their weight. A block that may not leave keeps its place; a list without any that may leave
    gives way to the other. Of several misses at once, the last decides whether a tie of T1 with p goes to T1.
    """

    name: ClassVar[str] = "arc"

    def new_pool(self, context: PolicyContext) -> Pool:
        return _Pool(context)
