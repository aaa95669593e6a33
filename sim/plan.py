"""What a controller hands to a clock: operations on experts and slots, in the order in which they are submitted."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

COPY, EVICT, GPU, CPU, READ = "copy", "evict", "gpu", "cpu", "read"
"""The kinds of operation: host to device, out of a slot, the two computations, disk to host.

An eviction with bytes is a write-back: the slot's expert is copied to the host before the slot is used again.
"""


class Operation(NamedTuple):
    """One thing to do. ``after`` names earlier operations (by ``id``) that have to end before this one begins.

    What is ``deferred``, CPU experts alone, holds up the end of the next layer instead of that of its own.
    """

    id: int
    op: str
    layer: int
    expert: int
    slot: int
    tokens: int
    bytes: int
    after: tuple[int, ...] = ()
    prefetch: bool = False
    deferred: bool = False


class LayerPlan(NamedTuple):
    """One layer of one forward pass: its operations, and what the cache answered when the layer began.

    ``hits_union`` counts distinct experts that were resident, ``late_hits`` those whose prefetch was still under way,
    ``misses`` the rest; ``hits_assignments`` counts tokens sent to resident experts; ``bytes`` is what the layer's
    own copies move.
    """

    layer: int
    operations: list[Operation]
    assignments: int
    union: int
    hits_union: int
    hits_assignments: int
    late_hits: int
    misses: int
    cpu_experts: int
    bytes: int


operation_of: Callable[[tuple[Any, ...]], Operation] = partial(tuple.__new__, Operation)
"""An operation from the tuple of all its fields, in a third of the class's time: a run makes them by the million."""
