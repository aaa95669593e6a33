"""Prefetch all experts of the layer that comes next."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from sim.policies.base import PolicyContext, PrefetchPolicy, PrefetchView


class WholeNextLayer(PrefetchPolicy):
    """Copies every expert of the next layer, the lowest first; after the last layer comes the first one.

    Needs no prediction, and room for two layers. Source: the ring of layers that SE-MoE (Shen et al., arXiv 2205.10034)
    streams through the GPU, and ExpertFlow's first baseline.
    """

    name: ClassVar[str] = "whole-next-layer"

    def __init__(self, context: PolicyContext) -> None:
        super().__init__(context)
        bounds = [layer * context.experts for layer in range(context.layers + 1)]
        self._layers = [range(first, first + context.experts) for first in bounds[:-1]]

    def candidates(self, view: PrefetchView) -> Sequence[int]:
        return self._layers[(view.layer + 1) % self.context.layers]
