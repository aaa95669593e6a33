"""Placement policies, one a file, and the registry that names them."""

from __future__ import annotations

from sim.policies.base import PlacementPolicy
from sim.policies.place.cpu_on_miss import CpuOnMiss
from sim.policies.place.dali_greedy import DaliGreedy
from sim.policies.place.fetch import Fetch
from sim.policies.place.fiddler import Fiddler
from sim.policies.place.fiddler_code import FiddlerCode
from sim.policies.place.freetoken_split import FreeTokenSplit
from sim.policies.place.hybrimoe import HybriMoe
from sim.policies.place.hybrimoe_code import HybriMoeCode
from sim.policies.place.optimal import Optimal
from sim.policies.place.static import StaticPlacement

PLACEMENT: dict[str, type[PlacementPolicy]] = {
    policy.name: policy
    for policy in (
        Fetch,
        CpuOnMiss,
        StaticPlacement,
        Fiddler,
        FiddlerCode,
        HybriMoe,
        HybriMoeCode,
        DaliGreedy,
        FreeTokenSplit,
        Optimal,
    )
}
"""Placement policies by name."""

__all__ = [
    "PLACEMENT",
    "CpuOnMiss",
    "DaliGreedy",
    "Fetch",
    "Fiddler",
    "FiddlerCode",
    "FreeTokenSplit",
    "HybriMoe",
    "HybriMoeCode",
    "Optimal",
    "StaticPlacement",
]
