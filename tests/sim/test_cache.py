"""ExpertCache: slots, room, and who stays when an event does not fit."""

from __future__ import annotations

import pytest

from sim.cache import ExpertCache
from sim.policies import EVICTION, EvictionPolicy, PolicyContext


class Keys(EvictionPolicy):
    """A policy whose keys are given."""

    name = "keys"

    def __init__(self, *keys: float, bypass: bool = False) -> None:
        super().__init__(PolicyContext(1, len(keys), 1))
        self.values = keys
        self.bypass = bypass  # type: ignore[misc]

    def key(self, block: int) -> float:
        return self.values[block]


def filled(*blocks: int, slots: int = 3, experts: int = 6) -> ExpertCache:
    cache = ExpertCache(1, experts, slots)
    for block in blocks:
        cache.insert(block)
    return cache


def settled(
    cache: ExpertCache, blocks: list[int], absent: list[int], policy: EvictionPolicy
) -> tuple[list[int], list[int], list[int], list[int]]:
    """The verdict on an event in layer 0: admitted, streamed, victims, leaving."""
    admitted, streamed, victims, leaving = cache.settle(0, set(blocks), absent, policy)
    return [*admitted], [*streamed], [*victims], [*leaving]


def test_slots_are_numbered_pool_after_pool_with_staging_last() -> None:
    cache = ExpertCache(3, 4, 2, staging=2)
    assert [cache.insert(block) for layer in range(3) for block in (layer * 4, layer * 4 + 3)] == [*range(6)]
    assert cache.staging == (6, 7)
    assert cache.total_slots == 8
    shared = ExpertCache(3, 4, 2, shared=True, staging=1)
    assert [shared.insert(block) for block in (0, 11)] == [0, 1]
    assert (shared.staging, shared.total_slots) == ((2,), 3)


def test_a_freed_slot_is_taken_before_one_that_was_never_used() -> None:
    cache = filled(0, 1)
    assert cache.remove(0) == 0
    assert cache.slot_of[0] == -1
    assert cache.residents(0) == [1]
    assert cache.free_slots(0) == 2
    assert cache.insert(5) == 0
    assert cache.insert(4) == 2
    assert cache.free_slots(0) == 0
    assert cache.residents(0) == [1, 4, 5]


def test_pools_do_not_share_room() -> None:
    cache = ExpertCache(2, 4, 1)
    cache.insert(0)
    assert (cache.free_slots(0), cache.free_slots(1)) == (0, 1)
    assert (cache.residents(0), cache.residents(1)) == ([0], [])


def test_everything_is_admitted_while_there_is_room() -> None:
    verdict = settled(filled(0), [0, 1, 2], [1, 2], Keys(0, 0, 0, 0, 0, 0))
    assert verdict == ([1, 2], [], [], [])


def test_the_smallest_keys_leave_first() -> None:
    assert settled(filled(0, 1, 2), [3, 4], [3, 4], Keys(5, 1, 3, 0, 0, 0)) == ([3, 4], [], [1, 2], [])


def test_equal_keys_leave_by_last_use_and_then_by_number() -> None:
    cache = filled(2, 1, 0)
    cache.look_up(7, [0])
    cache.look_up(3, [1, 2])
    equal = Keys(4, 4, 4, 4, 4, 4)
    assert cache.weakest([0, 1, 2], equal) == [1, 2, 0]
    assert settled(cache, [3], [3], equal)[2] == [1]
    assert settled(cache, [3, 4], [3, 4], equal)[2] == [1, 2]


def test_residents_of_the_event_are_safe_while_others_can_leave() -> None:
    assert settled(filled(0, 1, 2), [0, 3], [3], Keys(-9, 2, 1, 0, 0, 0)) == ([3], [], [2], [])


def test_an_event_larger_than_the_cache_is_ranked_within_itself() -> None:
    verdict = settled(filled(0, 1, 5), [0, 1, 2, 3], [2, 3], Keys(3, 0, 2, 1, 0, 99))
    assert verdict == ([2, 3], [], [5], [1])
    verdict = settled(filled(0, 1, 5), [0, 1, 2, 3], [2, 3], Keys(3, 2, 0, 1, 0, 99))
    assert verdict == ([3], [2], [5], [])


def test_a_bypass_policy_ranks_the_event_with_the_residents() -> None:
    assert settled(filled(0, 1, 2), [3], [3], Keys(5, 6, 7, 1, 0, 0, bypass=True)) == ([], [3], [], [])
    assert settled(filled(0, 1, 2), [0, 3], [3], Keys(1, 6, 7, 5, 0, 0, bypass=True)) == ([3], [], [], [0])
    assert settled(filled(0, 1, 2), [0, 3], [3], Keys(2, 1, 7, 5, 0, 0, bypass=True)) == ([3], [], [1], [])


@pytest.mark.parametrize("bypass", [False, True])
def test_blocks_in_flight_neither_leave_nor_compete(bypass: bool) -> None:
    cache = filled(0, 1, 2)
    cache.in_flight[0] = 17
    keys = Keys(0, 5, 6, 9, 8, 7, bypass=bypass)
    assert settled(cache, [3], [3], keys) == ([3], [], [1], [])
    cache.in_flight.update({1: 18, 2: 19})
    assert settled(cache, [3], [3], keys) == ([], [3], [], [])


def test_settling_changes_nothing() -> None:
    cache = filled(0, 1, 2)
    before = ([*cache.slot_of], cache.residents(0), cache.free_slots(0))
    cache.settle(0, [3, 4, 5, 0], [3, 4, 5], EVICTION["lru"](PolicyContext(1, 6, 2)))
    assert ([*cache.slot_of], cache.residents(0), cache.free_slots(0)) == before
