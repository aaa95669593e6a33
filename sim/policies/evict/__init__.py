"""Eviction policies, one a file, and the registry that names them."""

from __future__ import annotations

from sim.policies.base import EvictionPolicy
from sim.policies.evict.belady import Belady
from sim.policies.evict.lfu import Lfu
from sim.policies.evict.lru import Lru

EVICTION: dict[str, type[EvictionPolicy]] = {policy.name: policy for policy in (Lru, Lfu, Belady)}
"""Eviction policies by name."""

__all__ = ["EVICTION", "Belady", "Lfu", "Lru"]
