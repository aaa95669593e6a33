"""MoE-Infinity's replacement score: popularity, the request's own activations, and the nearness of the layer."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import ClassVar

import numpy as np

from sim.policies.base import EvictionPolicy, PolicyContext

FLOOR = 1e-6
"""Added to each factor (paper's code), so that a zero of one does not hide the others."""


class Eam(EvictionPolicy):
    """Evicts the block with the smallest frequency share * activation share * nearness of its layer.

    Block (i, e) while layer l runs: visits(i, e) / sum of all visits; M[i, e] / sum of row i, over the L rows, where M
    counts the tokens of the request so far and an empty row is uniform; near(i) = 1 - ((i - l) mod L) / L, over its
    sum E * (L + 1) / 2. To each of the three 1e-6 is added. A visit is an event that used the block; visits are kept
    over the whole run. Source: MoE-Infinity, arXiv 2401.14361, and its released code, which gives layers that have
    already run the nearness 1: not repeated here.
    """

    name: ClassVar[str] = "eam"

    def __init__(self, context: PolicyContext) -> None:
        super().__init__(context)
        self._visits = np.zeros(context.blocks, np.int64)
        self._tokens = np.zeros(context.blocks, np.int64)  # the request's matrix
        self._total = 0
        self._rows = np.zeros(context.layers, np.int64)  # sums of the request's rows
        self._layer = 0

    def begin_sequence(self) -> None:
        self._tokens[:] = 0
        self._rows[:] = 0

    def observe(self, event: int, blocks: Sequence[int], counts: Sequence[int]) -> None:
        used = np.array(blocks, np.int64)
        self._layer = event % self.context.layers
        self._visits[used] += 1
        self._total += len(used)
        self._tokens[used] += np.array(counts, np.int64)
        self._rows[self._layer] += sum(counts)

    def key(self, block: int) -> float:
        return self.keys([block])[0]

    def keys(self, blocks: Iterable[int]) -> Sequence[float]:
        chosen = np.array([*blocks], np.int64)
        layers, experts = self.context.layers, self.context.experts
        layer = chosen // experts
        row = self._rows[layer]
        share = np.where(row > 0, self._tokens[chosen] / np.maximum(row, 1), 1.0 / experts)
        near = 1.0 - ((layer - self._layer) % layers) / layers
        worth = self._visits[chosen] / max(self._total, 1) + FLOOR
        worth = worth * (share / layers + FLOOR) * (near / (experts * (layers + 1) / 2) + FLOOR)
        scores: list[float] = worth.tolist()
        return scores
