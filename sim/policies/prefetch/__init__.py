"""Prefetch policies, one a file, and the registry that names them."""

from __future__ import annotations

from sim.policies.base import PrefetchPolicy
from sim.policies.prefetch.eam import EamPrefetch
from sim.policies.prefetch.impact import Impact
from sim.policies.prefetch.mrs_next import MrsNext
from sim.policies.prefetch.next_router import NextRouter
from sim.policies.prefetch.none import NoPrefetch
from sim.policies.prefetch.oracle import Oracle
from sim.policies.prefetch.popularity import Popularity
from sim.policies.prefetch.residual_router import ResidualRouter
from sim.policies.prefetch.whole_next_layer import WholeNextLayer

PREFETCH: dict[str, type[PrefetchPolicy]] = {
    policy.name: policy
    for policy in (
        NoPrefetch,
        NextRouter,
        ResidualRouter,
        Impact,
        MrsNext,
        EamPrefetch,
        WholeNextLayer,
        Popularity,
        Oracle,
    )
}
"""Prefetch policies by name."""

__all__ = [
    "PREFETCH",
    "EamPrefetch",
    "Impact",
    "MrsNext",
    "NextRouter",
    "NoPrefetch",
    "Oracle",
    "Popularity",
    "ResidualRouter",
    "WholeNextLayer",
]
