"""ExpertCache: which expert sits in which slot, what is still on its way, and who leaves when room is needed.

Contract: *atomic*. An event (one layer of one forward pass) is classified as a whole against the cache as it stood
before; only then are blocks admitted and evicted. What the ranking does not keep is served from a staging slot.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Container, Iterable, Sequence
from functools import partial
from itertools import accumulate, pairwise
from typing import NamedTuple

from sim.policies.base import EvictionPolicy


class Verdict(NamedTuple):
    """What becomes of an event's blocks: ``admitted`` and ``streamed`` split the absent ones; ``victims`` are residents
    outside the event that leave, ``leaving`` residents of the event that leave after they were used."""

    admitted: Sequence[int]
    streamed: Sequence[int]
    victims: Sequence[int]
    leaving: Sequence[int]


_verdict_of: Callable[[tuple[Sequence[int], ...]], Verdict] = partial(tuple.__new__, Verdict)


Pool = tuple[list[int], dict[int, None]]
"""Free slots, the next one to be taken last; and the blocks that sit in the others."""


class ExpertCache:
    """Slots on the device, in pools: one pool a layer, or one for all layers.

    Slots are numbered pool after pool; ``staging`` slots, which hold nothing for longer than a layer, come last.
    """

    def __init__(
        self, layers: int, experts: int, slots: int | Sequence[int], *, shared: bool = False, staging: int = 2
    ) -> None:
        """``slots`` is the capacity of each layer's pool, by layer where they differ, or of the one pool when
        ``shared``."""
        sizes = [*slots] if isinstance(slots, Sequence) else [slots] * (1 if shared else layers)
        self.layers, self.experts, self.shared = layers, experts, shared
        self.slot_of = [-1] * (layers * experts)
        self.in_flight: dict[int, int] = {}
        bounds = [0, *accumulate(sizes)]
        self.staging = tuple(range(bounds[-1], bounds[-1] + staging))
        self.total_slots = bounds[-1] + staging
        free = [list(range(end - 1, start - 1, -1)) for start, end in pairwise(bounds)]
        all_pools: list[Pool] = [(numbers, {}) for numbers in free]
        self._pools = all_pools * layers if shared else all_pools  # by layer
        self._home = [self._pools[block // experts] for block in range(layers * experts)]
        self._recency = [*range(-layers * experts, 0)]  # by block: (event of the last use) * blocks + block

    def free_slots(self, layer: int) -> int:
        """Slots that nothing occupies in the pool of ``layer``."""
        return len(self._pools[layer][0])

    def residents(self, layer: int) -> list[int]:
        """Blocks in the pool of ``layer``, those in flight included, in ascending order."""
        return sorted(self._pools[layer][1])

    def look_up(self, event: int, blocks: Iterable[int]) -> tuple[list[int], list[int], list[int]]:
        """Notes that ``blocks`` are used in ``event``, and splits them, in their order, into those that are resident,
        those that are on their way, and those that are missing."""
        slot_of, in_flight, recency, base = self.slot_of, self.in_flight, self._recency, event * len(self.slot_of)
        hits: list[int] = []
        late: list[int] = []
        missing: list[int] = []
        for block in blocks:
            recency[block] = base + block
            if slot_of[block] < 0:
                missing.append(block)
            elif block in in_flight:
                late.append(block)
            else:
                hits.append(block)
        return hits, late, missing

    def insert(self, block: int) -> int:
        """Gives ``block`` a free slot of its pool and returns it.

        The slot that was freed last goes first; slots that were never used follow in ascending order.
        """
        free, residents = self._home[block]
        self.slot_of[block] = slot = free.pop()
        residents[block] = None
        return slot

    def remove(self, block: int) -> int:
        """Takes ``block`` out of the cache and returns the slot that is now free."""
        free, residents = self._home[block]
        slot = self.slot_of[block]
        self.slot_of[block] = -1
        del residents[block]
        free.append(slot)
        return slot

    def settle(self, layer: int, blocks: Collection[int], absent: list[int], policy: EvictionPolicy) -> Verdict:
        """Decides who stays when ``blocks`` (of one event; ``absent`` are those without a slot) have been ranked.

        Forced admission puts the event's blocks above all others and orders by the policy within each group; a bypass
        policy ranks them together. Blocks in flight neither leave nor compete. Changes nothing. The event has been
        looked up before; membership in ``blocks`` is asked for every resident: give a dict or a set.
        """
        pool = free, residents = self._pools[layer]
        need = len(absent) - len(free)
        if need <= 0:
            return _verdict_of((absent, (), (), ()))
        in_flight = self.in_flight
        own = len(blocks) - len(absent)  # at most: blocks for the CPU are counted, though they are not here
        if policy.by_recency and not in_flight and need + own <= len(residents):
            # what the event has just used comes last in this order, so that it need not be taken out
            return _verdict_of((absent, (), sorted(residents, key=self._recency.__getitem__)[:need], ()))
        if not policy.bypass:
            others = [block for block in residents if block not in blocks and block not in in_flight]
            if need <= len(others):
                return _verdict_of((absent, (), self.weakest(others, policy)[:need], ()))
        movable = [block for block in residents if block not in in_flight]
        return self._ranked(pool, blocks, movable, absent, policy)

    def weakest(self, blocks: Collection[int], policy: EvictionPolicy) -> list[int]:
        """``blocks`` in the order in which they leave: smallest key, least recently used, lowest block."""
        return policy.order(blocks, self._recency)

    def _ranked(
        self, pool: Pool, mine: Container[int], movable: list[int], absent: list[int], policy: EvictionPolicy
    ) -> Verdict:
        own = [block for block in movable if policy.bypass or block in mine]
        ranking = self.weakest(own, policy) + self.weakest(absent, policy) if policy.misses_first else None
        compete = ranking or self.weakest([*own, *absent], policy)
        room = len(pool[0]) + len(movable)
        kept = set(compete[max(0, len(compete) - room) :])
        gone = [block for block in movable if block not in kept]
        return Verdict(
            admitted=[block for block in absent if block in kept],
            streamed=[block for block in absent if block not in kept],
            victims=[block for block in gone if block not in mine],
            leaving=[block for block in gone if block in mine],
        )
