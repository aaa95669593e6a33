"""What the policies share that are a procedure on queues, and not a number for each block."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Iterator, Sequence
from copy import copy
from dataclasses import replace
from typing import TypeVar

from sim.policies.base import EvictionPolicy, PolicyContext

P = TypeVar("P", bound="Pool")


class Queue:
    """Blocks, oldest first, and what they weigh together."""

    def __init__(self, weights: Sequence[int], experts: int) -> None:
        self.blocks: dict[int, None] = {}
        self.weight = 0
        self._weights, self._experts = weights, experts

    def push(self, block: int) -> None:
        """``block`` becomes the youngest."""
        self.blocks[block] = None
        self.weight += self._weights[block // self._experts]

    def remove(self, block: int) -> None:
        """``block`` is taken out, wherever it stands."""
        del self.blocks[block]
        self.weight -= self._weights[block // self._experts]

    def shrink(self, weight: int) -> None:
        """Drops the oldest until no more than ``weight`` is left."""
        while self.blocks and self.weight > weight:
            self.remove(next(iter(self.blocks)))

    def copy(self) -> Queue:
        """The same blocks in a queue of their own."""
        twin = copy(self)
        twin.blocks = self.blocks.copy()
        return twin


class Pool(ABC):
    """The procedure at work on one pool."""

    def __init__(self, context: PolicyContext) -> None:
        self.capacity, self._context = context.capacity, context

    def queue(self) -> Queue:
        """A new queue; without weights in the context, every block weighs 1."""
        return Queue(self._context.weights or (1,) * self._context.layers, self._context.experts)

    @abstractmethod
    def __contains__(self, block: object) -> bool: ...

    @abstractmethod
    def use(self, block: int) -> None:
        """``block`` is used, whether it is here or not."""

    @abstractmethod
    def evict(self, allowed: Collection[int]) -> int:
        """Runs the procedure until it takes a block of ``allowed``, of which one at least is here; returns it."""

    @abstractmethod
    def admit(self, block: int) -> None:
        """``block`` comes in."""

    def pass_by(self, block: int) -> None:  # noqa: B027  # most procedures need not know
        """``block``, which is not here, was used without being kept."""

    def copy(self: P) -> P:
        """A pool that can be worked on without changing this one."""
        twin = copy(self)
        for name, value in vars(self).items():
            if isinstance(value, (Queue, list, set, dict)):
                setattr(twin, name, value.copy())
        return twin


class QueuePolicy(EvictionPolicy):
    """Evicts what a procedure on queues takes next.

    The procedures are published for one block at a time, and so they run under the serial contract. Where several
    blocks are used at once, all uses are told first, in the order of the blocks; then the procedure takes one victim
    after the other, and passes over what may not leave; then the new blocks come in, lowest first. When not all of an
    event's blocks fit, those that are not in the queues leave first, lowest first, and are not entered anywhere.
    """

    @abstractmethod
    def new_pool(self, context: PolicyContext) -> Pool:
        """An empty pool that holds the capacity of ``context``."""

    def __init__(self, context: PolicyContext) -> None:
        super().__init__(context)
        rooms = [context.capacity] if context.shared else map(context.capacity_of, range(context.layers))
        self._pools = [self.new_pool(replace(context, capacity=room)) for room in rooms]

    def _pool(self, block: int) -> Pool:
        return self._pools[0 if self.context.shared else block // self.context.experts]

    def observe(self, event: int, blocks: Sequence[int], counts: Sequence[int]) -> None:
        for block in blocks:
            self._pool(block).use(block)

    def key(self, block: int) -> float:
        """The place of ``block`` in the order in which the whole model would leave; -1 when it is in no queue."""
        pool = self._pool(block)
        if block not in pool:
            return -1
        residents = [other for other in range(self.context.blocks) if other in pool]
        return self.order(residents, ()).index(block)

    def order(self, blocks: Collection[int], recency: Sequence[int]) -> list[int]:
        """``blocks``, all of one pool, in the order in which the procedure takes them; those that are in no queue come
        first, lowest first. Works on a copy of the queues."""
        absent = sorted(block for block in blocks if block not in self._pool(block))
        rest = set(blocks).difference(absent)
        return [*absent, *self._drained(rest)]

    def _drained(self, rest: set[int]) -> Iterator[int]:
        if not rest:
            return
        pool = self._pool(next(iter(rest))).copy()
        while rest:
            victim = pool.evict(rest)
            rest.remove(victim)
            yield victim

    def admit(self, block: int) -> None:
        self._pool(block).admit(block)

    def forget(self, block: int) -> None:
        pool = self._pool(block)
        if block in pool:
            pool.evict((block,))
        else:
            pool.pass_by(block)
