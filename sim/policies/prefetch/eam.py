"""Prefetch what the most similar request of the past used: MoE-Infinity's activation-aware prefetching."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any, ClassVar

import numpy as np

from sim.policies.base import PolicyContext, PrefetchPolicy, PrefetchView, check_whole
from sim.policies.prefetch.checks import check_count

FLOOR = 1e-8
"""Added to each share (paper), so that experts that were never used are still in order of their layers."""

ORDERS = 256
"""Predictions that are remembered: a request's nearest matrix rarely changes, but from layer to layer."""


class EamPrefetch(PrefetchPolicy):
    """Copies what comes first in P[i, e] = (T[i, e] + 1e-8) * (1 - (i - l) / (L + 1)), for layers i after the present
    one, l; T is the activation matrix, of those in a library, that is nearest to the request's own.

    An activation matrix M [L, E] counts the tokens that were routed to each expert. The matrices of ended requests make
    up the library, after those of a calibration trace where there is one. Nearest is the one with the highest mean
    cosine between its rows and those of M, over the rows that M has already (equal ones: the first in the library). T
    has its rows divided by their sums. Source: MoE-Infinity, arXiv 2401.14361.

    With the option ``as_released``, its released code's comparison, which masks the rows that have run in this pass and
    not those still to come: only rows after l count, as earlier passes of the request left them. In its first pass
    there are none, all matrices are equally near, and the first of the library is taken.

    Chosen here: a library of ``library`` matrices in which the newest takes the place of the oldest, where the paper
    clusters; an empty row of T counts as uniform; no prediction without a row or a library; at an event ``most``
    experts that are not there (0: twice those of a token), together with those there that rank before them; and that
    one batch is one request. ``ahead`` limits the layers that are looked at (0: all that are left, as in the paper).
    """

    name: ClassVar[str] = "eam"
    defaults: ClassVar[Mapping[str, Any]] = {"library": 1000, "most": 0, "ahead": 0, "as_released": False}

    def __init__(self, context: PolicyContext) -> None:
        super().__init__(context)
        check_whole(self.options, library=16_384)
        check_count("most", self.options["most"], least=0)
        check_count("ahead", self.options["ahead"], least=0)
        layers, experts = context.layers, context.experts
        self._size: int = self.options["library"]
        self._shares = np.zeros((layers, experts, self._size), np.float32)  # the library: T of each
        self._norms = np.ones((layers, self._size))  # of its rows
        self._entered = 0  # requests that came into the library, those that were replaced included
        self._tokens = np.zeros((layers, experts))  # M
        self._dots = np.zeros((layers, self._size))  # of M's rows with those of each T
        self._cosines = np.zeros((layers, self._size))
        self._sums = np.zeros(self._size)  # of the cosines, over the rows of M
        self._order = lru_cache(maxsize=ORDERS)(self._ranked)
        for tokens in context.calibration.requests() if context.calibration else ():
            self._enter(tokens)

    def begin_sequence(self) -> None:
        """The request that has ended enters the library."""
        if self._tokens.any():
            self._enter(self._tokens)
        for of_request in (self._tokens, self._dots, self._cosines, self._sums):
            of_request[:] = 0

    def observe(self, event: int, blocks: Sequence[int], counts: Sequence[int]) -> None:
        layer = event % self.context.layers
        used = [block - layer * self.context.experts for block in blocks]
        self._tokens[layer, used] += counts
        if used and self._known:
            self._compare(layer, used, counts)

    def candidates(self, view: PrefetchView) -> Sequence[int]:
        if not self._known or not self._tokens.any():
            return ()
        left, wanted = self.options["most"] or 2 * self.context.top_k, []
        nearness = self._cosines[view.layer + 1 :].sum(axis=0) if self.options["as_released"] else self._sums
        for block in self._order(int(np.argmax(nearness[: self._known])), view.layer):
            wanted.append(block)
            left -= not view.is_there(block)
            if not left:
                break
        return wanted

    def _compare(self, layer: int, used: Sequence[int], counts: Sequence[int]) -> None:
        """Brings the cosines of a row up to date; element by element, so that equal matrices stay equally near."""
        known = self._known
        shares, dots, cosines, row = self._shares[layer], self._dots[layer], self._cosines[layer], self._tokens[layer]
        for expert, count in zip(used, counts, strict=True):
            dots[:known] += count * shares[expert, :known]
        self._sums[:known] -= cosines[:known]
        cosines[:known] = dots[:known] / (self._norms[layer, :known] * np.sqrt(row @ row))
        self._sums[:known] += cosines[:known]

    @property
    def _known(self) -> int:
        """Matrices in the library."""
        return min(self._entered, self._size)

    def _enter(self, tokens: Any) -> None:
        place = self._entered % self._size  # the oldest makes room
        sums = tokens.sum(axis=1, keepdims=True)
        shares = np.where(sums > 0, tokens / np.maximum(sums, 1), 1.0 / self.context.experts)
        self._shares[:, :, place] = shares
        self._norms[:, place] = np.sqrt((shares**2).sum(axis=1))
        self._entered += 1
        self._order.cache_clear()

    def _ranked(self, place: int, layer: int) -> list[int]:
        """All blocks after ``layer`` by P, as the matrix at that place of the library has it; equal ones: the lowest
        first."""
        layers, experts, ahead = self.context.layers, self.context.experts, self.options["ahead"]
        last = min(layers, layer + 1 + ahead) if ahead else layers
        distance = np.arange(1, last - layer)[:, None]
        shares = self._shares[layer + 1 : last, :, place].astype(float)
        worth = (shares + FLOOR) * (1.0 - distance / (layers + 1))
        ranking = np.argsort(-worth, axis=None, kind="stable") + (layer + 1) * experts
        blocks: list[int] = ranking.tolist()
        return blocks
