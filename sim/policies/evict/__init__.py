"""Eviction policies, one a file, and the registry that names them."""

from __future__ import annotations

from sim.policies.base import EvictionPolicy
from sim.policies.evict.arc import Arc
from sim.policies.evict.belady import Belady
from sim.policies.evict.belady_forced import BeladyForced
from sim.policies.evict.belady_imitator import BeladyImitator
from sim.policies.evict.blend import Blend
from sim.policies.evict.eam import Eam
from sim.policies.evict.ewma_reuse import EwmaReuse
from sim.policies.evict.fifo import Fifo
from sim.policies.evict.hobbit import Hobbit
from sim.policies.evict.lfru import Lfru
from sim.policies.evict.lfu import Lfu
from sim.policies.evict.lfu_decay import LfuDecay
from sim.policies.evict.lfu_global import LfuGlobal
from sim.policies.evict.lowest_layer import LowestLayer
from sim.policies.evict.lru import Lru
from sim.policies.evict.mrs import Mrs
from sim.policies.evict.random import Random
from sim.policies.evict.s3fifo import S3Fifo
from sim.policies.evict.sieve import Sieve
from sim.policies.evict.static import Static
from sim.policies.evict.static_front import StaticFront
from sim.policies.evict.static_uniform import StaticUniform
from sim.policies.evict.two_generation import TwoGeneration
from sim.policies.evict.window_score import WindowScore

EVICTION: dict[str, type[EvictionPolicy]] = {
    policy.name: policy
    for policy in (
        Lru,
        Lfu,
        Belady,
        Arc,
        BeladyForced,
        Fifo,
        Lfru,
        LfuDecay,
        LfuGlobal,
        Random,
        S3Fifo,
        Sieve,
        Mrs,
        TwoGeneration,
        EwmaReuse,
        LowestLayer,
        Blend,
        Eam,
        Hobbit,
        WindowScore,
        Static,
        BeladyImitator,
        StaticUniform,
        StaticFront,
    )
}
"""Eviction policies by name."""

__all__ = [
    "EVICTION",
    "Arc",
    "Belady",
    "BeladyForced",
    "BeladyImitator",
    "Blend",
    "Eam",
    "EwmaReuse",
    "Fifo",
    "Hobbit",
    "Lfru",
    "Lfu",
    "LfuDecay",
    "LfuGlobal",
    "LowestLayer",
    "Lru",
    "Mrs",
    "Random",
    "S3Fifo",
    "Sieve",
    "Static",
    "StaticFront",
    "StaticUniform",
    "TwoGeneration",
    "WindowScore",
]
