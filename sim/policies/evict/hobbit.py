"""HOBBIT's weighted sum: recency, frequency, high-precision use, and the distance of the layer ahead."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, ClassVar

import numpy as np

from sim.policies.base import EvictionPolicy, PolicyContext


class Hobbit(EvictionPolicy):
    """Evicts the block with the smallest w_r * R/T + w_f * F/T + w_h * H/T + w_l * (1 - ((i - l) mod L) / L).

    T counts the passes of the request so far; R is the pass of the block's last use (0 for none), F the passes that
    used it, H those that used it in high precision; i is its layer, l the one that runs. R, F and H begin anew with
    each request, as in the paper. All weights are of one precision here, so that every use is a high-precision one:
    H = F. Source: HOBBIT, arXiv 2411.01433, its sequence-level cache; the paper fits the four weights to a calibration
    set.
    """

    name: ClassVar[str] = "hobbit"
    defaults: ClassVar[Mapping[str, Any]] = {
        "recency": 0.25,  # chosen here, as the three that follow
        "frequency": 0.25,
        "high_precision": 0.25,
        "layer": 0.25,
    }

    def __init__(self, context: PolicyContext) -> None:
        super().__init__(context)
        for name in self.defaults:
            if not 0 <= self.options[name] < math.inf:
                raise ValueError(f"{name} must be a finite number of at least 0, got {self.options[name]}")
        self._first = -1  # pass in which the request began, -1 before it
        self._passes = 0
        self._layer = 0
        self._last = np.zeros(context.blocks, np.int64)
        self._uses = np.zeros(context.blocks, np.int64)

    def begin_sequence(self) -> None:
        self._first = -1
        self._last[:] = 0
        self._uses[:] = 0

    def observe(self, event: int, blocks: Sequence[int], counts: Sequence[int]) -> None:
        if not blocks:
            return
        number, self._layer = divmod(event, self.context.layers)
        if self._first < 0:
            self._first = number
        self._passes = number - self._first + 1
        used = [*blocks]
        self._last[used] = self._passes
        self._uses[used] += 1

    def key(self, block: int) -> float:
        return self.keys([block])[0]

    def keys(self, blocks: Iterable[int]) -> Sequence[float]:
        chosen, weight, layers = np.array([*blocks], np.int64), self.options, self.context.layers
        near = 1.0 - ((chosen // self.context.experts - self._layer) % layers) / layers
        used = self._uses[chosen] / self._passes
        worth = weight["recency"] * (self._last[chosen] / self._passes) + weight["frequency"] * used
        worth = worth + weight["high_precision"] * used + weight["layer"] * near
        scores: list[float] = worth.tolist()
        return scores
