"""What a replay counts: the columns of its table, one row for each group of passes and phase."""

from __future__ import annotations

COLUMNS = (
    "assignments",
    "accesses",
    "hit_assignments",
    "hits",
    "compulsory",
    "collisions",
    "evictions",
    "bytes",
    "events",
    "crowded",
    "load",
)
"""Token-expert pairs; distinct experts of an event, summed over events; how many of either hit; misses that were first
uses, and misses on blocks that had left in the same pass; blocks that left; bytes loaded; events; events whose union
exceeds a layer's share of the capacity; weight of the unions, summed over events."""

(
    ASSIGNMENTS,
    ACCESSES,
    HIT_ASSIGNMENTS,
    HITS,
    COMPULSORY,
    COLLISIONS,
    EVICTIONS,
    BYTES,
    EVENTS,
    CROWDED,
    LOAD,
) = range(len(COLUMNS))
