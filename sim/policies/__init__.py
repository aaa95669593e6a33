"""Policies: which expert leaves, which is prefetched, which runs on the CPU. They decide, and do nothing else."""

from sim.policies.base import (
    Assignment,
    EvictionPolicy,
    LayerView,
    PlacementPolicy,
    PolicyContext,
    PrefetchPolicy,
    PrefetchView,
)
from sim.policies.evict import EVICTION
from sim.policies.place import PLACEMENT
from sim.policies.prefetch import PREFETCH

__all__ = [
    "EVICTION",
    "PLACEMENT",
    "PREFETCH",
    "Assignment",
    "EvictionPolicy",
    "LayerView",
    "PlacementPolicy",
    "PolicyContext",
    "PrefetchPolicy",
    "PrefetchView",
]
