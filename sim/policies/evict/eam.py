"""MoE-Infinity's replacement score: popularity, the request's own activations, and the nearness of the layer."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, ClassVar

import numpy as np

from sim.policies.base import EvictionPolicy, PolicyContext

FLOOR = 1e-6
"""Added to each factor (paper's code), so that a zero of one does not hide the others."""


class Eam(EvictionPolicy):
    """Evicts the block with the smallest frequency share * activation share * nearness of its layer.

    Block (i, e) while layer l runs: visits(i, e) / sum of all visits; M[i, e] / sum of row i, over the L rows, where M
    counts the tokens of the request so far and an empty row is uniform; near(i) = 1 - ((i - l) mod L) / L, over its
    sum over all blocks, E * (L + 1) / 2. To each of the three 1e-6 is added. A visit is an event that used the block;
    visits are kept over the whole run. Source: MoE-Infinity, arXiv 2401.14361, and its released code.

    With the option ``as_released``, that code's nearness, which favours what has just run and what is far away:
    near(i) = 1 for the layers up to l, i / (L + 1) for those after it, over its sum. It halves the layers into an
    encoder's and a decoder's; here all are a decoder's.
    """

    name: ClassVar[str] = "eam"
    defaults: ClassVar[Mapping[str, Any]] = {"as_released": False}

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
        worth = self._visits[chosen] / max(self._total, 1) + FLOOR
        worth = worth * (share / layers + FLOOR) * (self._near(layer) + FLOOR)
        scores: list[float] = worth.tolist()
        return scores

    def _near(self, layer: Any) -> Any:
        """The share of each of these layers' blocks in the nearness of all."""
        layers, experts, now = self.context.layers, self.context.experts, self._layer
        if self.options["as_released"]:
            later = (layers * (layers - 1) - now * (now + 1)) / 2 / (layers + 1)
            return np.where(layer > now, layer / (layers + 1), 1.0) / (experts * (now + 1 + later))
        return (1.0 - ((layer - now) % layers) / layers) / (experts * (layers + 1) / 2)
