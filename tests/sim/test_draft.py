"""What a draft's operations wait for, where prefetches are taken back."""

from __future__ import annotations

from sim.cache import ExpertCache
from sim.draft import Draft
from sim.host_memory import HostMemory
from sim.plan import COPY, EVICT, READ, Operation
from sim.policies import EVICTION, PolicyContext

LAYERS, EXPERTS, SLOTS = 2, 4, 2
WANTED = 1 * EXPERTS + 3  # which host memory does not hold
HELD, OTHER = 1 * EXPERTS, 1 * EXPERTS + 1


def draft() -> Draft:
    cache = ExpertCache(LAYERS, EXPERTS, SLOTS)
    policy = EVICTION["lru"](PolicyContext(LAYERS, EXPERTS, 2, capacity=SLOTS, weights=(1,) * LAYERS))
    return Draft(cache, policy, 100, write_back=True, memory=HostMemory(6))


def taken_back(draft: Draft, victim: int) -> tuple[Operation, ...]:
    operations = draft.prefetch(1, WANTED, victim)
    draft.withdraw(operations[-1])
    return operations


def copied(draft: Draft, block: int) -> Operation:
    (operation,) = draft.preload([block])
    assert operation.op == COPY
    return operation


def test_the_next_copy_into_the_slot_of_a_withdrawn_one_does_not_wait_for_its_read() -> None:
    one = draft()
    operations = taken_back(one, victim=-1)
    assert [operation.op for operation in operations] == [READ, COPY]
    assert copied(one, OTHER).after == ()


def test_the_next_copy_into_the_slot_of_a_withdrawn_one_waits_for_the_write_back_from_it() -> None:
    one = draft()
    held = [copied(one, block) for block in (HELD, OTHER)]
    operations = taken_back(one, victim=OTHER)
    (save,) = (operation for operation in operations if operation.op == EVICT)
    assert save.slot == held[1].slot
    again = copied(one, OTHER)
    assert again.slot == save.slot
    assert save.id in again.after
