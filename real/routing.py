"""Watch and steer the routers of a model: taps, routing replay, and what the next layers' routers would choose.

Shapes: T rows of a forward pass (batch * sequence, padding included), E experts a layer, k experts a token, H hidden
width, D look-ahead depth, L MoE layers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from types import TracebackType
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from real.models.families import MoeLayer
from real.models.load import LoadedModel
from traces.errors import InputError
from traces.schema import NOT_ROUTED, Phase, Trace

LEAST_GATE = 2.0**-24
"""The smallest positive number of float16, in which traces keep gates: what a smaller positive gate is kept as."""


@dataclass
class RouterCall:
    """One call of one router: what it read and what it returned."""

    layer: int
    hidden: Tensor  # [T, H], the router's input
    logits: Tensor  # [T, E]
    weights: Tensor  # [T, k], in the order of ids
    ids: Tensor  # [T, k] int64, in no particular order


class RouteListener(Protocol):
    """Something that is told of every router call, and may replace its outcome."""

    def on_route(self, call: RouterCall) -> tuple[Tensor, Tensor] | None:
        """Returns (weights [T, k], ids [T, k]) to be used instead, or None to leave the router's own."""


class RouterTap:
    """Attaches listeners to every router of a model, for the time of a ``with`` block.

    Listeners are called in the order given; each sees the call as the listeners before it left it.
    """

    def __init__(self, layers: Sequence[MoeLayer], *listeners: RouteListener) -> None:
        self._layers = layers
        self._listeners = listeners
        self._handles: list[torch.utils.hooks.RemovableHandle] = []

    def __enter__(self) -> RouterTap:
        for layer in self._layers:
            self._handles.append(layer.router.register_forward_hook(partial(self._on_forward, layer.index)))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        while self._handles:
            self._handles.pop().remove()

    def _on_forward(
        self, index: int, router: nn.Module, args: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]
    ) -> tuple[Tensor, Tensor, Tensor]:
        logits, weights, ids = output
        hidden = args[0]
        call = RouterCall(index, hidden.reshape(-1, hidden.shape[-1]), logits, weights, ids)
        for listener in self._listeners:
            replaced = listener.on_route(call)
            if replaced is not None:
                call.weights, call.ids = replaced[0].to(weights.dtype), replaced[1].to(ids.dtype)
        return logits, call.weights, call.ids


class Replay:
    """Routing replay: forces the choices of a recorded or synthetic trace on a model's routers.

    Before each forward pass :meth:`begin_step` is told which row of the trace each row of the pass is. The weights are
    the trace's gates, or, when it has none or ``own_gates`` is set, those that the family's rule gives the forced
    experts under this model's logits. Places without a choice (``NOT_ROUTED``, and rows that are not in the trace)
    get expert 0 with weight 0, which kernels take as "not routed". Whether a trace routes is told by its ids alone: a
    chosen expert whose gate is 0, or became 0 in float16, gets the weight :data:`LEAST_GATE`.
    """

    def __init__(
        self, trace: Trace, loaded: LoadedModel, *, own_gates: bool = False, device: torch.device | str = "cpu"
    ) -> None:
        """Raises :class:`InputError` when the trace has other layers, experts or top-k than the model, or routes what
        an encoder-decoder does not (see :func:`routable`)."""
        for name, dimension in (("layers", "moe_layers"), ("experts", "experts"), ("top_k", "top_k")):
            got, wanted = getattr(trace.header, name), getattr(loaded.spec, dimension)
            if got != wanted:
                raise InputError(f"trace {name} must be {wanted}, as in model {loaded.spec.name}, got {got}")
        if routable(trace, loaded.encoder_layers) is not trace:
            rule = f"what is read in the first {loaded.encoder_layers} layers alone, and what is written in the rest"
            raise InputError(f"trace must route {rule}, as {loaded.spec.name} does, got other choices")
        self._trace = trace
        self._gates_of: Callable[[Tensor, Tensor], Tensor] = partial(loaded.family.gates, loaded.config)
        self._recorded_gates = None if own_gates else trace.gates
        self._device = torch.device(device)
        self._rows_of = _rows_by_sequence(trace)
        self._ids = torch.empty(0)
        self._absent = torch.empty(0)
        self._gates: Tensor | None = None

    def rows(self, sequences: Sequence[int], mask: Tensor, positions: Tensor) -> npt.NDArray[np.int64]:
        """The trace's row of every row of a pass [B, S], flat [B * S]; -1 where ``mask`` is false.

        ``sequences`` are the trace's sequence ids of the B lanes. Raises :class:`InputError` for a sequence or a
        position that the trace does not have.
        """
        real, places = mask.cpu().numpy(), positions.cpu().numpy()
        rows = np.full(real.shape, -1, np.int64)
        for lane, sequence in enumerate(sequences):
            rows[lane, real[lane]] = self._rows_at(sequence, places[lane, real[lane]])
        return rows.reshape(-1)

    def begin_step(self, rows: npt.NDArray[np.int64]) -> None:
        """Says which trace row each of the T rows of the coming forward pass is; -1 for none."""
        ids = self._trace.expert_ids[rows].astype(np.int64)  # [T, L, k]
        routed = (ids != NOT_ROUTED) & (rows >= 0)[:, None, None]
        self._ids = torch.from_numpy(np.where(routed, ids, 0)).to(self._device)
        self._absent = torch.from_numpy(~routed).to(self._device)
        if self._recorded_gates is not None:
            self._gates = torch.from_numpy(self._recorded_gates[rows].astype(np.float32)).to(self._device)

    def on_route(self, call: RouterCall) -> tuple[Tensor, Tensor]:
        """The trace's choice for this layer; raises ValueError when the pass has other rows than were announced."""
        if len(self._ids) != len(call.ids):
            raise ValueError(f"replay was told of {len(self._ids)} rows, but the pass has {len(call.ids)}")
        ids, absent = self._ids[:, call.layer], self._absent[:, call.layer]
        weights = self._gates_of(call.logits, ids) if self._gates is None else self._gates[:, call.layer]
        return weights.clamp_min(LEAST_GATE).masked_fill(absent, 0), ids

    def _rows_at(self, sequence: int, positions: npt.NDArray[Any]) -> npt.NDArray[np.int64]:
        if sequence not in self._rows_of:
            raise InputError(f"sequence must be in the trace, got {sequence}")
        rows = self._rows_of[sequence]
        offsets = positions - int(self._trace.position[rows[0]])
        wrong = (offsets < 0) | (offsets >= len(rows))
        if wrong.any():
            raise InputError(
                f"position must be in the trace's sequence {sequence} of {len(rows)} tokens, "
                f"got {int(positions[wrong][0])}"
            )
        return rows[offsets]


def routable(trace: Trace, encoder_layers: int) -> Trace:
    """The trace without the choices that a model cannot make whose first ``encoder_layers`` layers are an encoder's.

    A prompt's tokens but the last are read, and routed in the encoder alone; the last begins what is written, and with
    what follows is routed in the decoder alone. Returns the trace itself where there is nothing to leave out.
    """
    if not encoder_layers:
        return trace
    read, layers = np.asarray(trace.phase) == Phase.PREFILL, np.arange(trace.header.layers)
    for rows in _rows_by_sequence(trace).values():
        read[rows[read[rows]][-1:]] = False
    absent = (read[:, None] != (layers < encoder_layers))[..., None]  # [T, L, 1]
    left = {"expert_ids": np.where(absent, np.uint16(NOT_ROUTED), trace.expert_ids)}
    if trace.gates is not None:
        left["gates"] = np.where(absent, np.float16(0), trace.gates)
    if trace.lookahead is not None:
        ahead = layers[:, None] + np.arange(1, trace.lookahead_depth + 1)  # [L, D]
        beyond = (layers < encoder_layers)[:, None] != (ahead < encoder_layers)
        hidden = absent[..., None] | beyond[..., None]  # [T, L, D, 1]
        left["lookahead"] = np.where(hidden, np.uint16(NOT_ROUTED), trace.lookahead)
    same = all(np.array_equal(getattr(trace, name), array) for name, array in left.items())
    return trace if same else replace(trace, **left)  # type: ignore[arg-type]


def router_scores(logits: Tensor) -> npt.NDArray[np.float16]:
    """The softmax of a router's logits [T, E], as traces keep it: float16 [T, E]."""
    return logits.float().softmax(dim=-1).half().cpu().numpy()


def lookahead(
    hidden: Tensor,
    layer: int,
    depth: int,
    routers: Sequence[nn.Module],
    top_k: int,
    means: Tensor | None = None,
) -> Tensor:
    """The experts that the next ``depth`` layers' routers would choose for layer ``layer``'s router input [T, H].

    With ``means`` [L, H], the mean input of every router, a later router reads the input plus what the mean changes by
    until its layer. Returns ids [T, D, k] int64, by descending weight; ``NOT_ROUTED`` for layers beyond the last one.
    An encoder's layers look at the encoder's alone, and a decoder's at the decoder's, for the rows that they have.
    No hook runs. Source: Eliseev and Mazur, "Fast Inference of Mixture-of-Experts Language Models with Offloading"
    (2023), section 3.2 (speculative loading), for depth 1; with ``means`` the residual-based prefetching of DALI
    (arXiv 2602.03495), which corrects by the mean residual between two layers' gate inputs.
    """
    ids = torch.full((len(hidden), depth, top_k), NOT_ROUTED, dtype=torch.int64, device=hidden.device)
    stack = getattr(routers[layer], "stack", None)  # of encoder-decoders
    for ahead, router in enumerate(routers[layer + 1 : layer + 1 + depth]):
        if getattr(router, "stack", None) != stack:
            break
        read = hidden if means is None else hidden + (means[layer + 1 + ahead] - means[layer])
        _, weights, chosen = router.forward(read)
        ids[:, ahead] = chosen.gather(1, weights.argsort(dim=-1, descending=True, stable=True))
    if stack is not None:  # a row of the other stack is zeros
        ids.masked_fill_(~hidden.any(dim=-1)[:, None, None], NOT_ROUTED)
    return ids


class MeanInputs:
    """The mean input of every router over the real tokens of all passes: hooks of a generation, and a route listener.

    Differences between two layers' means are the mean residuals that DALI calibrates.
    """

    def __init__(self, layers: int) -> None:
        self._sums: list[Tensor | None] = [None] * layers
        self._counts = [0] * layers
        self._keep: Tensor | None = None

    def begin_step(self, step_index: int, phase: Phase, mask: Tensor, positions: Tensor, token_ids: Tensor) -> None:
        """A pass over the tokens of ``mask`` [B, S] begins."""
        self._keep = mask.flatten()

    def on_route(self, call: RouterCall) -> None:
        """Takes down one router's input; never changes the choice."""
        read = call.hidden[self._keep].double()
        total = read.sum(dim=0)
        self._counts[call.layer] += int(read.any(dim=-1).sum())  # rows of another stack are zeros
        before = self._sums[call.layer]
        self._sums[call.layer] = total if before is None else before + total

    def end_step(self, next_tokens: list[int]) -> None:
        """Nothing to take down."""

    def means(self) -> npt.NDArray[np.float64]:
        """Means float64 [L, H]; raises :class:`InputError` when not every layer was run."""
        sums = [one.cpu() for one in self._sums if one is not None]
        if len(sums) < len(self._sums):
            raise InputError("residual-prompts must have at least one token, got none")
        means: npt.NDArray[np.float64] = torch.stack(sums).numpy() / np.array(self._counts)[:, None]
        return means


def _rows_by_sequence(trace: Trace) -> dict[int, npt.NDArray[np.int64]]:
    """Rows of every sequence, in the order of their positions (rows of a sequence are stored in that order)."""
    order = np.argsort(trace.sequence, kind="stable")
    sequences, starts = np.unique(trace.sequence[order], return_index=True)
    return dict(zip(sequences.tolist(), np.split(order, starts[1:]), strict=True))
