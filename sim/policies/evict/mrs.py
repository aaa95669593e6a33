"""Minus recent score: a smoothed router score of every expert, chosen or not."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, ClassVar

import numpy as np

from sim.policies.base import EvictionPolicy, PolicyContext

BATCHES: dict[str, Callable[[Any], Any]] = {
    "mean": lambda rows: np.add.accumulate(rows, axis=0)[-1] / len(rows),  # summed row by row, as the compiled twin
    "first": lambda rows: rows[0],
    "max": lambda rows: rows.max(axis=0),
}
"""How the scores of several tokens [n, E] become one row [E]."""


class Mrs(EvictionPolicy):
    """Evicts the block with the smallest S, where S <- alpha * TopP(s) + (1 - alpha) * S over all experts of a layer.

    s is the router's softmax; TopP keeps the ``p`` largest scores (equal ones: the lowest expert first) and zeroes the
    rest; S is 0 at first. Source: HybriMoE, arXiv 2504.05897, its score-aware cache. Departure: the rows of a batch
    are averaged before TopP (option ``batch``: ``mean``), where the released code reads the first token alone
    (``first``). A trace without full scores gives the gates of the chosen experts instead.
    """

    name: ClassVar[str] = "mrs"
    needs: ClassVar[frozenset[str]] = frozenset({"scores"})
    defaults: ClassVar[Mapping[str, Any]] = {
        "alpha": 0.5,  # released code; open in the paper
        "p": 0,  # paper: twice the experts of a token, which 0 stands for
        "batch": "mean",  # chosen here
    }

    def __init__(self, context: PolicyContext) -> None:
        super().__init__(context)
        if self.options["batch"] not in BATCHES:
            raise ValueError(f"batch must be one of {', '.join(BATCHES)}, got {self.options['batch']!r}")
        if not 0 < self.options["alpha"] <= 1:
            raise ValueError(f"alpha must be above 0 and at most 1, got {self.options['alpha']}")
        if self.options["p"] < 0:
            raise ValueError(f"p must be at least 1 (or 0 for 2 * top_k), got {self.options['p']}")
        self.kept = min(self.options["p"] or 2 * context.top_k, context.experts)
        self._scores = np.zeros(context.blocks)
        self._by_layer = [*self._scores.reshape(context.layers, context.experts)]  # views of it

    def observe_scores(self, layer: int, scores: Any) -> None:
        row = scores[0] if len(scores) == 1 else BATCHES[self.options["batch"]](scores)
        top = (-row).argsort(kind="stable")[: self.kept]
        alpha, mine = self.options["alpha"], self._by_layer[layer]
        mine *= 1.0 - alpha
        mine[top] += alpha * row[top]

    def key(self, block: int) -> float:
        return float(self._scores[block])

    def keys(self, blocks: Iterable[int]) -> Sequence[float]:
        scores: list[float] = self._scores[[*blocks]].tolist()
        return scores
