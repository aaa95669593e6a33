"""The experts of one layer of one forward pass: which rows each one gets, and the sum of what they give.

Shapes: T rows of the pass (padding included), k experts a token, n rows of one expert, H hidden width. Contributions
are kept apart until all are there, so that no order of work changes a bit of the sum.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional

from sim.plan import Operation
from traces.schema import NOT_ROUTED
from traces.workload import Routing

Compute = Callable[[Operation, Tensor], Tensor]
"""Computes an operation's expert on rows [n, H]."""


class Kernel(ABC):
    """What a layer's operations compute with; ``routing`` is the layer's."""

    routing: Routing

    def __init__(self, compute: Compute, hidden: Tensor, weights: Tensor) -> None:
        """``hidden`` [T, H] is the layer's input, ``weights`` [T, k] are those of the chosen experts."""
        self._compute, self._hidden, self._weights = compute, hidden, weights
        self._from_cpu: list[tuple[int, Tensor]] = []

    def run(self, operation: Operation) -> None:
        """Computes one expert on the device."""
        expert = operation.expert
        self._put(expert, self._compute(operation, self._rows(expert)))

    def on_cpu(self, operation: Operation) -> Callable[[], None]:
        """Fetches one expert's rows to the host, and returns the work that computes them there."""
        rows = self._rows(operation.expert).cpu()

        def run() -> None:
            self._from_cpu.append((operation.expert, self._compute(operation, rows)))

        return run

    def result(self) -> Tensor:
        """The sum [T, H] over every token's experts, when all have been computed (or are ordered before this)."""
        for expert, output in self._from_cpu:
            self._put(expert, output.to(self._hidden.device))
        return self._sum()

    @abstractmethod
    def _rows(self, expert: int) -> Tensor:
        """The rows [n, H] that ``expert`` gets."""

    @abstractmethod
    def _put(self, expert: int, output: Tensor) -> None:
        """Takes in what ``expert`` gives for its rows [n, H]."""

    @abstractmethod
    def _sum(self) -> Tensor:
        """The weighted sum [T, H]."""


class OneToken(Kernel):
    """A pass of a single row, which is most of decoding: without rows to sort, the host has a tenth of the work."""

    def __init__(self, compute: Compute, hidden: Tensor, ids: Tensor, weights: Tensor) -> None:
        super().__init__(compute, hidden, weights)
        chosen = zip(ids.tolist()[0], weights.tolist()[0], strict=True)
        self._place = {expert: place for place, (expert, weight) in enumerate(chosen) if weight}
        absent = set(range(ids.shape[1])).difference(self._place.values())
        self._outputs = {place: torch.zeros_like(hidden) for place in absent}
        routed = len(self._place)
        self.routing = Routing(tuple(sorted(self._place)), (1,) * routed, routed)

    def _rows(self, expert: int) -> Tensor:
        return self._hidden

    def _put(self, expert: int, output: Tensor) -> None:
        self._outputs[self._place[expert]] = output

    def _sum(self) -> Tensor:
        outputs = torch.cat([self._outputs[place] for place in range(self._weights.shape[1])])  # [k, H]
        return (self._weights @ outputs.to(self._weights.dtype)).to(self._hidden.dtype)


class ManyTokens(Kernel):
    """A pass of any number of rows; those where ``real`` [T] is false are not routed.

    Rows are gathered for all experts at once, and put back at once, so that an expert's own time is the same here as
    in :class:`OneToken`.
    """

    def __init__(self, compute: Compute, hidden: Tensor, ids: Tensor, weights: Tensor, real: Tensor | None) -> None:
        super().__init__(compute, hidden, weights)
        routed = weights != 0 if real is None else (weights != 0) & real[:, None]
        flat = torch.where(routed, ids, NOT_ROUTED).flatten()
        counted = Counter(flat.tolist())
        counted.pop(NOT_ROUTED, None)
        counts = dict(sorted(counted.items()))
        self.routing = Routing(tuple(counts), tuple(counts.values()), sum(counts.values()))
        self._order = flat.argsort(stable=True)[: self.routing.assignments]  # NOT_ROUTED is above all ids
        rows = hidden[self._order // ids.shape[1]]  # by expert, then by token
        self._rows_of = dict(zip(counts, rows.split(list(counts.values())), strict=True)) if counts else {}
        self._outputs: dict[int, Tensor] = {}

    def _rows(self, expert: int) -> Tensor:
        return self._rows_of[expert]

    def _put(self, expert: int, output: Tensor) -> None:
        self._outputs[expert] = output

    def _sum(self) -> Tensor:
        outputs = self._hidden.new_zeros(self._weights.numel(), self._hidden.shape[1])  # [T * k, H]
        if self._rows_of:
            outputs[self._order] = torch.cat([self._outputs[expert] for expert in self._rows_of])
        outputs = outputs.view(*self._weights.shape, -1).to(self._weights.dtype)
        return (self._weights[:, None] @ outputs).squeeze(1).to(self._hidden.dtype)


def gated(act: Callable[[Tensor], Tensor], gate_up: Tensor, down: Tensor, hidden: Tensor) -> Tensor:
    """A gated expert (gate and up [2I, H], down [H, I]) on rows [n, H]."""
    gate, up = functional.linear(hidden, gate_up).chunk(2, dim=-1)
    return functional.linear(act(gate) * up, down)


def kernel_for(compute: Compute, hidden: Tensor, ids: Tensor, weights: Tensor, real: Tensor | None = None) -> Kernel:
    """The kernel of one layer: ``ids`` and ``weights`` [T, k] are the router's choice for ``hidden`` [T, H].

    Rows where ``real`` [T] is false, and places of weight 0, are not routed.
    """
    if real is None and len(ids) == 1:
        return OneToken(compute, hidden, ids, weights)
    return ManyTokens(compute, hidden, ids, weights, real)
