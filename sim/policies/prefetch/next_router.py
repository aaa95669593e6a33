"""Prefetch what the next layer's router says of this layer's hidden state."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from sim.policies.base import PrefetchPolicy


class NextRouter(PrefetchPolicy):
    """Copies the experts that the next layer's router would choose for the hidden state at hand.

    Source: Eliseev and Mazur, *Fast inference of Mixture-of-Experts language models with offloading* (arXiv
    2312.17238), section 3.2, where it is called speculative expert loading; depth 1.
    """

    name: ClassVar[str] = "next-router"
    needs: ClassVar[frozenset[str]] = frozenset({"lookahead"})
    depth: ClassVar[int] = 1

    def candidates(self, layer: int, predictions: Sequence[Sequence[int]]) -> Sequence[tuple[int, int]]:
        ahead = predictions[: self.depth]
        return [(layer + 1 + distance, expert) for distance, experts in enumerate(ahead) for expert in experts]
