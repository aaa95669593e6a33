"""Placement policies, one a file, and the registry that names them."""

from __future__ import annotations

from sim.policies.base import PlacementPolicy
from sim.policies.place.cpu_on_miss import CpuOnMiss
from sim.policies.place.fetch import Fetch

PLACEMENT: dict[str, type[PlacementPolicy]] = {policy.name: policy for policy in (Fetch, CpuOnMiss)}
"""Placement policies by name."""

__all__ = ["PLACEMENT", "CpuOnMiss", "Fetch"]
