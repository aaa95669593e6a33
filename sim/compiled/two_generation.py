"""The compiled twin of ``two-generation``: that of ``lru``, for a replay prefetches nothing, and then both are one."""

from __future__ import annotations

from sim.compiled import lru
from sim.compiled.twin import TWINS, register
from sim.policies.evict.lru import Lru
from sim.policies.evict.two_generation import TwoGeneration

__all__ = ["lru"]

register(TwoGeneration, TWINS[Lru])
