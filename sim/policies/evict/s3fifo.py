"""S3-FIFO: a small queue that filters, a main one, and a ghost of what the small one let go."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from typing import Any, ClassVar

from sim.policies.base import PolicyContext, check_constants
from sim.policies.evict.queues import Pool, QueuePolicy

MOST_USES = 3
"""Uses are counted in two bits."""


class _Pool(Pool):
    def __init__(self, context: PolicyContext, small: float, ghost: float, promotion: int) -> None:
        super().__init__(context)
        self.small, self.main, self.ghost = self.queue(), self.queue(), self.queue()
        everything = context.experts * sum(context.weights or (1,) * context.layers)  # a ghost never holds more
        self.small_room, self.ghost_room = int(small * self.capacity), int(min(ghost * self.capacity, everything))
        self.promotion = promotion
        self.uses: dict[int, int] = {}  # of what is in ``small`` and ``main``, since it came there
        self.returning: set[int] = set()  # used, missing, and found in the ghost
        self.has_evicted = False

    def __contains__(self, block: object) -> bool:
        return block in self.uses

    def use(self, block: int) -> None:
        if block in self.uses:
            self.uses[block] = min(self.uses[block] + 1, MOST_USES)
        elif block in self.ghost.blocks:
            self.ghost.remove(block)
            self.returning.add(block)

    def evict(self, allowed: Collection[int]) -> int:
        self.has_evicted = True
        turns = [self._from_small, self._from_main]
        if self.main.weight > self.capacity - self.small_room:
            turns.insert(0, self._from_main)
        victim = next(block for turn in turns if (block := turn(allowed)) is not None)
        del self.uses[victim]
        return victim

    def _from_small(self, allowed: Collection[int]) -> int | None:
        """Promotes what was used often enough, up to the first that may leave, which enters the ghost."""
        promoted, victim = [], None
        for block in self.small.blocks:
            if self.uses[block] >= self.promotion:
                promoted.append(block)
            elif block in allowed:
                victim = block
                break
        for block in promoted:
            self.small.remove(block)
            self.main.push(block)
            self.uses[block] = 0
        if victim is not None:
            self.small.remove(victim)
            self.ghost.push(victim)
            self.ghost.shrink(self.ghost_room)
        return victim

    def _from_main(self, allowed: Collection[int]) -> int | None:
        """Gives what was used another round, for one use less, up to the first that may leave."""
        again = [-1]
        while again:
            again, victim = [], None
            for block in self.main.blocks:
                if self.uses[block]:
                    again.append(block)
                elif block in allowed:
                    victim = block
                    break
            for block in again:
                self.main.remove(block)
                self.main.push(block)
                self.uses[block] -= 1
            if victim is not None:
                self.main.remove(victim)
                return victim
        return None

    def admit(self, block: int) -> None:
        known = block in self.returning or block in self.ghost.blocks
        if known:
            self.pass_by(block)
        filling = not self.has_evicted and self.small.weight >= self.small_room
        (self.main if known or filling else self.small).push(block)
        self.uses[block] = 0

    def pass_by(self, block: int) -> None:
        self.returning.discard(block)
        if block in self.ghost.blocks:
            self.ghost.remove(block)


class S3Fifo(QueuePolicy):
    """Evicts from the small queue what was hardly used since it came, and from the main one what was not used.

    Source: Yang, Zhang, Qiu, Yue and Rashmi, *FIFO queues are all you need for cache eviction*, SOSP 2023, algorithm
    1. Left open there, and done as its authors' library does: before the first eviction, new blocks go straight to the
    main queue once the small one is full; the main queue gives way when it exceeds its share, else the small one; a
    block that returns leaves the ghost at once, and begins in the main queue with no use. A block that may not leave
    keeps its place, and the search goes on behind it; a queue without any that may leave gives way to the other.
    """

    name: ClassVar[str] = "s3fifo"
    defaults: ClassVar[Mapping[str, Any]] = {
        "small": 0.1,  # paper: share of the capacity
        "ghost": 0.9,  # paper: as much as the main queue
        "promotion": 2,  # paper: uses
    }

    def __init__(self, context: PolicyContext) -> None:
        check_constants(context.options, self.defaults)
        options = {**self.defaults, **context.options}
        if not 0 <= options["small"] <= 1:
            raise ValueError(f"small must be from 0 to 1, got {options['small']}")
        if not 0 <= options["ghost"] < math.inf:
            raise ValueError(f"ghost must be a finite number of at least 0, got {options['ghost']}")
        if not 1 <= options["promotion"] <= MOST_USES:
            raise ValueError(f"promotion must be from 1 to {MOST_USES}, got {options['promotion']}")
        super().__init__(context)

    def new_pool(self, context: PolicyContext) -> Pool:
        return _Pool(context, **self.options)
