"""What a compiled twin of an eviction policy consists of, and how the kernel calls it.

The kernel calls the functions below. numba resolves each call by the type of its first argument, the twin's state (a
NamedTuple of arrays), to the plain Python function that the twin was registered with, and compiles it in place. Shapes:
B blocks, P pools, L layers, E experts a layer.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

from numba.extending import overload

from sim.policies.base import EvictionPolicy

Array = Any  # numpy.ndarray to a reader, a numba type to the compiler

NOT_NEGATIVE = 2**62 - 1
"""Mask for an index that cannot be negative: the compiler then leaves out what counts from an array's end."""

UNSEEN = -2
"""Stands in ``Cache.left`` for a block that was never used."""

ABSENT, RESIDENT, RANKED = 0, 1, 2
"""States of a block; a bypass policy ranks those that may come in together with the residents."""


class Cache(NamedTuple):
    """What is resident, and the kernel's own book."""

    resident: Array  # uint8 [B], one of the states above
    recency: Array  # int64 [B], decision of the last use
    mark: Array  # int64 [B], decision that a block belongs to, so that it can be passed over
    members: Array  # int64 [B], blocks of a pool from ``pool * B / P`` on, in any order
    place: Array  # int64 [B], where a block stands in ``members``
    size: Array  # int64 [P], how many of ``members`` a pool has
    used: Array  # int64 [P], weight of what is resident in a pool
    left: Array  # int32 [B], pass of the last departure; -1 before it, UNSEEN before the first use
    upcoming: Array  # int64 [B], decision of the next use, as of the last one
    union: Array  # int64 [E], blocks of the event at hand
    counts: Array  # int64 [E], tokens of each expert of the event at hand; 0 between events
    clock: Array  # int64 [2]: uses so far, and entries of the log


def begin_sequence(policy: Any) -> None:
    """A new request begins."""


def observe_scores(policy: Any, stream: Any, first: int, last: int, layer: int) -> None:
    """The router's scores of one event, before its first decision: those of ``stream.rows[first:last]``."""


def observe(policy: Any, cache: Cache, block: int, tokens: int, event: int) -> None:
    """``block`` is used by the decision at hand; called for every block of it, ascending, before any of the rest."""


def key(policy: Any, cache: Cache, block: int, event: int) -> float:
    """Worth of keeping ``block``."""
    return 0.0


def victim(policy: Any, cache: Cache, pool: int, event: int, decision: int, guarded: bool) -> int:
    """The resident of ``pool`` that leaves next, -1 for none; those marked with ``decision`` are passed over when
    ``guarded``."""
    width = cache.members.size // cache.size.size
    best, best_key = -1, 0.0
    for place in range(pool * width, pool * width + cache.size[pool]):
        block = cache.members[place]
        if guarded and cache.mark[block] == decision:
            continue
        worth = key(policy, cache, block, event)
        if best >= 0 and worth == best_key:
            sooner = cache.recency[block] - cache.recency[best]
            better = sooner < 0 or (sooner == 0 and block < best)
        else:
            better = best < 0 or worth < best_key
        if better:
            best, best_key = block, worth
    return best


def own_victim(policy: Any, cache: Cache, pool: int, found: int, event: int, misses_first: bool) -> int:
    """Of the event's own blocks that are still marked, of which not all fit, the one that is kept last. They stand in
    ``cache.union[:found]``, ascending; with ``misses_first``, those that are not resident are kept before the rest."""
    best, best_key, best_held = -1, 0.0, False
    for index in range(found):
        block = cache.union[index]
        if cache.mark[block] != event:
            continue
        worth = key(policy, cache, block, event)
        held = misses_first and cache.resident[block] == RESIDENT
        if best < 0 or (held and not best_held) or (held == best_held and worth < best_key):
            best, best_key, best_held = block, worth, held
    return best


def enter(policy: Any, cache: Cache, pool: int, block: int, decision: int) -> None:
    """``block`` comes into the pool, or is to be ranked with it. Adds it to the structure that ``victim`` reads."""
    width = cache.members.size // cache.size.size
    place = pool * width + cache.size[pool]
    cache.size[pool] += 1
    cache.members[place] = block
    cache.place[block] = place
    cache.recency[block] = decision


def touch(policy: Any, cache: Cache, pool: int, block: int, decision: int) -> None:
    """``block``, which is in the pool, was used."""
    cache.recency[block] = decision


def leave(policy: Any, cache: Cache, pool: int, block: int, decision: int) -> None:
    """``block`` goes out of the pool, or is not kept."""
    width = cache.members.size // cache.size.size
    cache.size[pool] -= 1
    last = cache.members[pool * width + cache.size[pool]]
    cache.members[cache.place[block]] = last
    cache.place[last] = cache.place[block]


def admit(policy: Any, block: int, event: int) -> None:
    """``block`` is kept, and was not there before."""


def forget(policy: Any, block: int) -> None:
    """``block`` has left the cache, or was used without being kept."""


@dataclass(frozen=True)
class Twin:
    """One policy, compiled: its state, and those of the operations above in which it differs from the rest.

    ``build`` makes the state from the policy object, so that constants and what was learned stand in one place only.
    """

    state: type[Any]
    build: Callable[[Any], Any]
    begin_sequence: Callable[..., None] = begin_sequence
    observe_scores: Callable[..., None] = observe_scores
    observe: Callable[..., None] = observe
    key: Callable[..., float] = key
    victim: Callable[..., int] = victim
    own_victim: Callable[..., int] = own_victim
    enter: Callable[..., None] = enter
    touch: Callable[..., None] = touch
    leave: Callable[..., None] = leave
    admit: Callable[..., None] = admit
    forget: Callable[..., None] = forget


TWINS: dict[type[EvictionPolicy], Twin] = {}
"""Twins by the policy that they are equal to; filled by :func:`register`."""

_BY_STATE: dict[type[Any], Twin] = {}


def register(policy: type[EvictionPolicy], twin: Twin) -> None:
    """Makes ``twin`` the compiled form of ``policy``."""
    TWINS[policy] = twin
    _BY_STATE[twin.state] = twin


def _resolve(operation: Callable[..., Any]) -> None:
    """Lets numba compile a call of ``operation`` into what the twin of its first argument's type has for it."""
    name = operation.__name__

    def implementation(policy: Any, *_: Any) -> Callable[..., Any]:
        function: Callable[..., Any] = getattr(_BY_STATE[policy.instance_class], name)
        return function

    overload(operation, strict=False, jit_options={"_nrt": False})(implementation)


for _operation in (
    begin_sequence,
    observe_scores,
    observe,
    key,
    victim,
    own_victim,
    enter,
    touch,
    leave,
    admit,
    forget,
):
    _resolve(_operation)
