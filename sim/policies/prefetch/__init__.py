"""Prefetch policies, one a file, and the registry that names them."""

from __future__ import annotations

from sim.policies.base import PrefetchPolicy
from sim.policies.prefetch.next_router import NextRouter
from sim.policies.prefetch.none import NoPrefetch

PREFETCH: dict[str, type[PrefetchPolicy]] = {policy.name: policy for policy in (NoPrefetch, NextRouter)}
"""Prefetch policies by name."""

__all__ = ["PREFETCH", "NextRouter", "NoPrefetch"]
