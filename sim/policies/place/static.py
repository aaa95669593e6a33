"""Compute what is not resident on the CPU, and move nothing."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from sim.policies.base import Assignment, LayerView, PlacementPolicy, PolicyContext
from sim.policies.place.split import split


class StaticPlacement(PlacementPolicy):
    """Runs the resident set on the GPU and every other expert on the CPU; no expert is fetched, at no time.

    The resident set is what was loaded before the first step, so that it goes with an eviction policy that preloads:
    from an empty cache everything runs on the CPU. Source: the fixed split of KTransformers (SOSP 2025).

    With the option ``defer``, its expert deferral: the ``defer`` experts of a token with the lowest gates, where the
    CPU computes them, join the output of the next layer, which changes what the model computes; the last layer defers
    none. Chosen here: an expert with several tokens is deferred where all of them would defer it (the released code
    computes it once for either kind).
    """

    name: ClassVar[str] = "static"
    defaults: ClassVar[Mapping[str, Any]] = {"defer": 0}

    def __init__(self, context: PolicyContext) -> None:
        super().__init__(context)
        if not 0 <= self.options["defer"] <= context.top_k:
            raise ValueError(f"defer must be from 0 to {context.top_k}, got {self.options['defer']}")

    @classmethod
    def defers(cls, options: Mapping[str, Any]) -> int:
        deferred: int = {**cls.defaults, **options}["defer"]
        return deferred

    def place(self, view: LayerView) -> Assignment:
        return split(view, [expert for expert, _ in view.misses])
