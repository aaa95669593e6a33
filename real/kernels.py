"""The experts of one layer of one forward pass: which rows each one gets, and the sum of what they give.

Shapes: T rows of the pass (padding included), k experts a token, n rows of one expert, H hidden width. Contributions
are kept apart until all are there, so that no order of work changes a bit of the sum.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Sequence
from time import perf_counter
from typing import Any

import torch
from torch import Tensor

from sim.plan import Operation
from traces.schema import NOT_ROUTED
from traces.workload import Routing

Compute = Callable[[Operation, Tensor], Tensor]
"""Computes an operation's expert on rows [n, H]."""
ComputeTogether = Callable[[Sequence[Operation], Tensor], Tensor]
"""Computes the experts of several operations on rows [N, H], which stand in the order of these."""
Wait = Callable[[], None]
"""Waits until the GPU has done what was submitted."""


def synchronize() -> None:
    """Waits for the GPU's current stream."""
    torch.cuda.current_stream().synchronize()


class Kernel(ABC):
    """What a layer's operations compute with; ``routing`` is the layer's."""

    routing: Routing
    read_s = 0.0
    """Seconds of reading the router's choice, without waiting for it."""

    def __init__(self, compute: Compute, hidden: Tensor, weights: Tensor) -> None:
        """``hidden`` [T, H] is the layer's input, ``weights`` [T, k] are those of the chosen experts."""
        self._compute, self._hidden, self._weights = compute, hidden, weights
        self._from_cpu: list[tuple[int, Tensor]] = []

    def run(self, operation: Operation) -> None:
        """Computes one expert on the device."""
        expert = operation.expert
        self._put(expert, self._compute(operation, self._rows(expert)))

    def run_together(self, operations: Sequence[Operation], compute: ComputeTogether) -> None:
        """Computes several experts on the device at once."""
        rows = [self._rows(operation.expert) for operation in operations]
        outputs = compute(operations, torch.cat(rows)).split([len(own) for own in rows])
        for operation, output in zip(operations, outputs, strict=True):
            self._put(operation.expert, output)

    def on_cpu(self, operation: Operation) -> Callable[[], None]:
        """Sends one expert's rows to the host, and returns the work that computes them there."""
        rows, expert = self._rows_on_cpu(operation.expert), operation.expert

        def run() -> None:
            output = self._compute(operation, rows())
            self._from_cpu.append((expert, output.pin_memory() if self._hidden.is_cuda else output))

        return run

    def result(self) -> Tensor:
        """The sum [T, H] over every token's experts, when all have been computed (or are ordered before this)."""
        for expert, output in self._from_cpu:
            self._put(expert, output.to(self._hidden.device, non_blocking=True))
        return self._sum()

    @abstractmethod
    def _rows(self, expert: int) -> Tensor:
        """The rows [n, H] that ``expert`` gets."""

    def _rows_on_cpu(self, expert: int) -> Callable[[], Tensor]:
        """The same on the host."""
        return on_host(self._rows(expert))

    def _read(self, wait: Wait, *tensors: Tensor) -> list[Any]:
        """The values of ``tensors``, by one ``wait`` for the device."""
        began_s = perf_counter()
        if tensors[0].is_cuda:
            tensors = tuple(tensor.to("cpu", non_blocking=True) for tensor in tensors)
            waits_s = perf_counter()
            wait()
            began_s += perf_counter() - waits_s
        values = [tensor.tolist() for tensor in tensors]
        self.read_s = perf_counter() - began_s
        return values

    @abstractmethod
    def _put(self, expert: int, output: Tensor) -> None:
        """Takes in what ``expert`` gives for its rows [n, H]."""

    @abstractmethod
    def _sum(self) -> Tensor:
        """The weighted sum [T, H]."""


class OneToken(Kernel):
    """A pass of a single row, which is most of decoding: without rows to sort, the host has a tenth of the work."""

    def __init__(
        self, compute: Compute, hidden: Tensor, ids: Tensor, weights: Tensor, wait: Wait = synchronize
    ) -> None:
        super().__init__(compute, hidden, weights)
        (experts,), (gates,) = self._read(wait, ids, weights)
        self._place = {expert: place for place, expert in enumerate(experts) if gates[place]}
        routed = len(self._place)
        absent = [place for place, gate in enumerate(gates) if not gate] if routed < len(gates) else []
        self._outputs = {place: torch.zeros_like(hidden) for place in absent}
        self._on_host: Callable[[], Tensor] | None = None
        self.routing = Routing(tuple(sorted(self._place)), (1,) * routed, routed)

    def _rows(self, expert: int) -> Tensor:
        return self._hidden

    def _rows_on_cpu(self, expert: int) -> Callable[[], Tensor]:
        if self._on_host is None:
            self._on_host = on_host(self._hidden)  # the same row for all experts
        return self._on_host

    def _put(self, expert: int, output: Tensor) -> None:
        self._outputs[self._place[expert]] = output

    def _sum(self) -> Tensor:
        outputs = torch.cat([self._outputs[place] for place in range(self._weights.shape[1])])  # [k, H]
        return _in(self._hidden.dtype, self._weights @ _in(self._weights.dtype, outputs))


class ManyTokens(Kernel):
    """A pass of any number of rows; those where ``real`` [T] is false are not routed.

    Rows are gathered for all experts at once, and put back at once, so that an expert's own time is the same here as
    in :class:`OneToken`.
    """

    def __init__(
        self,
        compute: Compute,
        hidden: Tensor,
        ids: Tensor,
        weights: Tensor,
        real: Tensor | None,
        wait: Wait = synchronize,
    ) -> None:
        super().__init__(compute, hidden, weights)
        routed = weights != 0 if real is None else (weights != 0) & real[:, None]
        flat = torch.where(routed, ids, NOT_ROUTED).flatten()
        counted = Counter(self._read(wait, flat)[0])
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
        outputs = _in(self._weights.dtype, outputs.view(*self._weights.shape, -1))
        return _in(self._hidden.dtype, (self._weights[:, None] @ outputs).squeeze(1))


def _in(dtype: torch.dtype, tensor: Tensor) -> Tensor:
    """``tensor`` in another dtype: what is in it already is not even asked, which takes as long as a small kernel."""
    return tensor if tensor.dtype == dtype else tensor.to(dtype)


def on_host(rows: Tensor) -> Callable[[], Tensor]:
    """Sends ``rows`` to the host without waiting for them; what is returned gives them, waiting if it has to."""
    if not rows.is_cuda:
        return lambda: rows
    copied = rows.to("cpu", non_blocking=True)  # to pinned memory
    event = torch.cuda.Event()
    event.record()

    def arrived() -> Tensor:
        event.synchronize()
        return copied

    return arrived


def kernel_for(
    compute: Compute,
    hidden: Tensor,
    ids: Tensor,
    weights: Tensor,
    real: Tensor | None = None,
    wait: Wait = synchronize,
) -> Kernel:
    """The kernel of one layer: ``ids`` and ``weights`` [T, k] are the router's choice for ``hidden`` [T, H].

    Rows where ``real`` [T] is false, and places of weight 0, are not routed. On a GPU the host reads the choice after
    ``wait``.
    """
    if real is None and len(ids) == 1:
        return OneToken(compute, hidden, ids, weights, wait)
    return ManyTokens(compute, hidden, ids, weights, real, wait)
