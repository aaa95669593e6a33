"""ExpertCache: which expert sits in which slot, what is still on its way, and who leaves when room is needed.

Contract: *atomic*. An event (one layer of one forward pass) is classified as a whole against the cache as it stood
before; only then are blocks admitted and evicted. What the ranking does not keep is served from a staging slot.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

from sim.policies.base import EvictionPolicy


class Verdict(NamedTuple):
    """What becomes of an event's blocks: ``admitted`` and ``streamed`` split the absent ones; ``victims`` are residents
    outside the event that leave, ``leaving`` residents of the event that leave after they were used."""

    admitted: list[int]
    streamed: list[int]
    victims: list[int]
    leaving: list[int]


class ExpertCache:
    """Slots on the device, in pools: one pool a layer, or one for all layers.

    Slots are numbered pool after pool; ``staging`` slots, which hold nothing for longer than a layer, come last.
    """

    def __init__(self, layers: int, experts: int, slots: int, *, shared: bool = False, staging: int = 2) -> None:
        """``slots`` is the capacity of each layer's pool, or of the one pool when ``shared``."""
        pools = 1 if shared else layers
        self.layers, self.experts, self.slots, self.shared = layers, experts, slots, shared
        self.pool_of_layer = [0 if shared else layer for layer in range(layers)]
        self.slot_of = [-1] * (layers * experts)
        self.in_flight: dict[int, int] = {}
        self.staging = tuple(range(pools * slots, pools * slots + staging))
        self.total_slots = pools * slots + staging
        self._free = [list(range((pool + 1) * slots - 1, pool * slots - 1, -1)) for pool in range(pools)]
        self._residents: list[dict[int, None]] = [{} for _ in range(pools)]
        self._last_use = [-1] * (layers * experts)

    def free_slots(self, layer: int) -> int:
        """Slots that nothing occupies in the pool of ``layer``."""
        return len(self._free[self.pool_of_layer[layer]])

    def residents(self, layer: int) -> list[int]:
        """Blocks in the pool of ``layer``, those in flight included, in ascending order."""
        return sorted(self._residents[self.pool_of_layer[layer]])

    def touch(self, event: int, blocks: Iterable[int]) -> None:
        """Notes that ``blocks`` were used in ``event``."""
        for block in blocks:
            self._last_use[block] = event

    def insert(self, block: int, layer: int) -> int:
        """Gives ``block`` a free slot of its layer's pool and returns it.

        The slot that was freed last goes first; slots that were never used follow in ascending order.
        """
        pool = self.pool_of_layer[layer]
        slot = self._free[pool].pop()
        self.slot_of[block] = slot
        self._residents[pool][block] = None
        return slot

    def remove(self, block: int) -> int:
        """Takes ``block`` out of the cache and returns the slot that is now free."""
        slot = self.slot_of[block]
        pool = self.pool_of_layer[block // self.experts]
        self.slot_of[block] = -1
        del self._residents[pool][block]
        self._free[pool].append(slot)
        return slot

    def settle(self, layer: int, blocks: Iterable[int], absent: list[int], policy: EvictionPolicy) -> Verdict:
        """Decides who stays when ``blocks`` (of one event; ``absent`` are those without a slot) have been ranked.

        Forced admission puts the event's blocks above all others and orders by the policy within each group; a bypass
        policy ranks them together. Blocks in flight neither leave nor compete. Changes nothing.
        """
        pool = self.pool_of_layer[layer]
        need = len(absent) - len(self._free[pool])
        if need <= 0:
            return Verdict(absent, [], [], [])
        residents, in_flight, mine = self._residents[pool], self.in_flight, set(blocks)
        if not policy.bypass:
            others = [block for block in residents if block not in mine and block not in in_flight]
            if need <= len(others):
                return Verdict(absent, [], self.weakest(others, policy)[:need], [])
        movable = [block for block in residents if block not in in_flight]
        return self._ranked(pool, mine, movable, absent, policy)

    def weakest(self, blocks: Sequence[int], policy: EvictionPolicy) -> list[int]:
        """``blocks`` in the order in which they leave: smallest key, least recently used, lowest block."""
        last_uses = map(self._last_use.__getitem__, blocks)
        return [block for _, _, block in sorted(zip(policy.keys(blocks), last_uses, blocks, strict=True))]

    def _ranked(
        self, pool: int, mine: set[int], movable: list[int], absent: list[int], policy: EvictionPolicy
    ) -> Verdict:
        compete = [block for block in movable if policy.bypass or block in mine] + absent
        room = len(self._free[pool]) + len(movable)
        kept = set(self.weakest(compete, policy)[max(0, len(compete) - room) :])
        gone = [block for block in movable if block not in kept]
        return Verdict(
            admitted=[block for block in absent if block in kept],
            streamed=[block for block in absent if block not in kept],
            victims=[block for block in gone if block not in mine],
            leaving=[block for block in gone if block in mine],
        )
