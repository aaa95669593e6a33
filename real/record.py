"""Record a model's routing: run prompts, watch the routers, and put what they chose into a trace.

Shapes: T rows of a forward pass, of which N are real tokens; E experts a layer, k experts a token, D look-ahead depth.
"""

from __future__ import annotations

import platform
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import transformers
from torch import Tensor

from real.generate import Sampler, generate, left_pad
from real.models.load import DTYPES, LoadedModel, quiet
from real.routing import LEAST_GATE, MeanInputs, RouterCall, RouterTap, lookahead, router_scores
from traces import prompts as prompt_files
from traces.errors import InputError
from traces.prompts import Prompt
from traces.router_means import packed, unpacked
from traces.schema import NOT_ROUTED, Phase, Trace, TraceHeader

Progress = Callable[[int, int], None]
"""Told (prompts done, forward passes done) after every forward pass."""


class Collector:
    """Gathers the rows of a trace: give it to ``generate`` as hooks and to a :class:`RouterTap` as listener.

    Every prefill step begins new sequences, one a lane, numbered on in the order in which they come. Steps number the
    forward passes that the collector saw. Within a step rows are ordered by lane, then by position; within a row the
    experts by descending weight (equal weights: the lower expert first). A weight of exactly 0 is recorded as
    ``NOT_ROUTED``; a positive one below what float16 holds as the least that it does.
    """

    def __init__(
        self, loaded: LoadedModel, *, lookahead_depth: int = 3, scores: bool = True, router_means: str = ""
    ) -> None:
        """Raises :class:`InputError` for a negative depth; depth 0 records no look-ahead. ``router_means``, as a
        trace's header has them, correct it."""
        if lookahead_depth < 0:
            raise InputError(f"lookahead must be at least 0, got {lookahead_depth}")
        self._loaded = loaded
        self._routers = [layer.router for layer in loaded.layers]
        self._depth = lookahead_depth
        self._means = means_tensor(router_means, loaded)
        self._residual = {"lookahead_router": "residual", "router_means": router_means} if router_means else {}
        self._with_scores = scores
        self._rows: dict[str, list[npt.NDArray[Any]]] = {}
        self._layers: list[dict[str, list[npt.NDArray[Any]]]] = [{} for _ in loaded.layers]
        self._keep: Tensor | None = None  # flat indices of the real tokens, None when all are
        self._lanes = np.empty(0, np.int32)
        self.steps = 0
        self.sequences = 0

    def begin_step(self, step_index: int, phase: Phase, mask: Tensor, positions: Tensor, token_ids: Tensor) -> None:
        """Takes down whose tokens the coming pass computes; shapes as in :class:`real.generate.StepHooks`."""
        real = mask.cpu().numpy()
        if phase == Phase.PREFILL:
            self._lanes = np.arange(self.sequences, self.sequences + len(real), dtype=np.int32)
            self.sequences += len(real)
        self._keep = None if real.all() else torch.from_numpy(np.flatnonzero(real)).to(mask.device)
        count = int(real.sum())
        self._add(self._rows, "token_ids", token_ids.cpu().numpy()[real])
        self._add(self._rows, "sequence", np.broadcast_to(self._lanes[:, None], real.shape)[real])
        self._add(self._rows, "position", positions.cpu().numpy()[real])
        self._add(self._rows, "step", np.full(count, self.steps))
        self._add(self._rows, "phase", np.full(count, int(phase)))
        self.steps += 1

    def on_route(self, call: RouterCall) -> None:
        """Takes down one layer's choice; never changes it."""
        keep, rows = self._keep, self._layers[call.layer]
        hidden, logits, weights, ids = (
            tensor if keep is None else tensor[keep] for tensor in (call.hidden, call.logits, call.weights, call.ids)
        )
        ordered_ids, gates = _by_weight(ids.cpu().numpy(), weights.float().cpu().numpy())
        self._add(rows, "expert_ids", ordered_ids)
        self._add(rows, "gates", gates.astype(np.float16))
        if self._with_scores:
            self._add(rows, "scores", router_scores(logits))
        if self._depth:
            ahead = lookahead(hidden, call.layer, self._depth, self._routers, ids.shape[-1], self._means)
            self._add(rows, "lookahead", ahead.cpu().numpy().astype(np.uint16))

    def end_step(self, next_tokens: list[int]) -> None:
        """Fills in the layers that the pass did not call, an encoder's, with tokens that are not routed there."""
        absent = {"scores": 1 / self._loaded.spec.experts, "gates": 0.0}
        for name, parts in self._layers[-1].items():
            for rows in self._layers[:-1]:
                if len(rows[name]) < len(parts):
                    self._add(rows, name, np.full_like(parts[-1], absent.get(name, NOT_ROUTED)))

    def finish(self, **header: Any) -> Trace:
        """The trace of all steps so far; ``header`` gives or replaces fields of :class:`TraceHeader`.

        Raises :class:`InputError` when no forward pass, or not every layer, was recorded, and
        :class:`traces.schema.TraceError` when the arrays or ``header`` break a rule of the schema.
        """
        spec = self._loaded.spec
        fields: dict[str, Any] = {
            "model": spec.name,
            "revision": self._loaded.revision,
            "layers": len(self._layers),
            "experts": spec.experts,
            "top_k": spec.top_k,
            "expert_bytes": (spec.expert_bytes,) * len(self._layers),
            "dtype": str(DTYPES[spec.dtype]).removeprefix("torch."),
            "software": software(),
            **self._residual,
        }
        if not self.steps or not all(self._layers):
            raise InputError("recording must have at least one forward pass through every layer, got none")
        arrays = {name: np.concatenate(parts) for name, parts in self._rows.items()}
        for name in self._layers[0]:
            arrays[name] = np.stack([np.concatenate(rows[name]) for rows in self._layers], axis=1)
        return Trace.of(TraceHeader(**{**fields, **header}), **arrays)

    @staticmethod
    def _add(rows: dict[str, list[npt.NDArray[Any]]], name: str, values: npt.NDArray[Any]) -> None:
        rows.setdefault(name, []).append(values)


def record(
    loaded: LoadedModel,
    prompts: Sequence[Prompt],
    *,
    batch: int = 1,
    max_prompt_tokens: int = 128,
    max_new_tokens: int = 128,
    lookahead_depth: int = 3,
    scores: bool = True,
    router_means: str = "",
    sampler: Sampler | None = None,
    made_by: str = "",
    licence: str = "",
    progress: Progress | None = None,
) -> Trace:
    """Decodes every prompt, ``batch`` at a time in lock-step, and returns the trace of all forward passes.

    Sequences are numbered as the prompts are. A prompt is cut after ``max_prompt_tokens``. Look-ahead is corrected by
    ``router_means``, what :func:`router_means_of` found on other prompts. Raises :class:`InputError` for a model
    without tokenizer, for no prompts, for a count below 1, or for more tokens than the model has positions.
    """
    for name, value in (("batch", batch), ("max_prompt_tokens", max_prompt_tokens), ("max_new_tokens", max_new_tokens)):
        if value < 1:
            raise InputError(f"{name} must be at least 1, got {value}")
    encoded = [tokens[:max_prompt_tokens] for tokens in encode(loaded, prompts)]
    check_positions(loaded, encoded, max_new_tokens)
    collector = Collector(loaded, lookahead_depth=lookahead_depth, scores=scores, router_means=router_means)
    hooks = _Reporting(collector, progress)
    with RouterTap(loaded.layers, collector):
        for start in range(0, len(encoded), batch):
            ids, mask = left_pad([loaded.as_run(one) for one in encoded[start : start + batch]])
            generate(
                loaded.model,
                ids,
                mask,
                max_new_tokens=max_new_tokens,
                eos_ids=loaded.eos_ids,
                sampler=sampler,
                hooks=hooks,
            )
            hooks.done(len(ids))
    return collector.finish(
        domains=tuple(prompt.domain for prompt in prompts),
        prompts_digest=prompt_files.digest(prompts),
        made_by=made_by,
        licence=licence,
    )


def router_means_of(
    loaded: LoadedModel,
    prompts: Sequence[Prompt],
    *,
    max_prompt_tokens: int = 128,
    max_new_tokens: int = 128,
) -> str:
    """The mean input of every router while ``prompts`` are continued greedily, as a trace's header holds it.

    They should be others than those that are recorded with it. Raises as :func:`record`.
    """
    encoded = [tokens[:max_prompt_tokens] for tokens in encode(loaded, prompts)]
    check_positions(loaded, encoded, max_new_tokens)
    found = MeanInputs(len(loaded.layers))
    with RouterTap(loaded.layers, found):
        for tokens in encoded:
            ids, mask = left_pad([loaded.as_run(tokens)])
            generate(loaded.model, ids, mask, max_new_tokens=max_new_tokens, eos_ids=loaded.eos_ids, hooks=found)
    return packed(found.means())


def means_tensor(router_means: str, loaded: LoadedModel) -> Tensor | None:
    """The mean router inputs [L, H] on the model's device, for :func:`real.routing.lookahead`; None for none.

    Raises :class:`InputError` when they are of another model's width.
    """
    if not router_means:
        return None
    means = torch.from_numpy(unpacked(router_means, len(loaded.layers)))
    if means.shape[1] != loaded.spec.hidden:
        raise InputError(f"router_means must have the model's hidden width {loaded.spec.hidden}, got {means.shape[1]}")
    like = next(loaded.model.parameters())
    return means.to(device=like.device, dtype=like.dtype)


def encode(loaded: LoadedModel, prompts: Sequence[Prompt]) -> list[list[int]]:
    """Token ids of every prompt.

    Raises :class:`InputError` for a model without tokenizer, for no prompts, and for a token that the model has not.
    """
    if loaded.tokenizer is None:
        raise InputError(f"model must have a tokenizer to read prompts, got {loaded.spec.name!r} without one")
    if not prompts:
        raise InputError("prompts must be at least one, got none")
    with quiet():  # it warns of texts longer than the model's positions, also of those that are cut afterwards
        encoded = [list(loaded.tokenizer(prompt.text)["input_ids"]) for prompt in prompts]
    largest = max((max(tokens, default=0) for tokens in encoded), default=0)
    if largest >= loaded.spec.vocab:
        rule = f"have tokens below {loaded.spec.vocab}, the embeddings of model {loaded.spec.name}"
        raise InputError(f"prompts must {rule}, got {largest} (is the tokenizer that of another model?)")
    return encoded


def check_positions(loaded: LoadedModel, encoded: Sequence[Sequence[int]], max_new_tokens: int) -> None:
    """Raises :class:`InputError` when the longest prompt and its new tokens exceed the positions of the model."""
    most = getattr(loaded.config, "max_position_embeddings", None)
    longest = max(map(len, encoded), default=0)
    if most is not None and longest + max_new_tokens > most:
        raise InputError(
            f"prompt and max-new-tokens must together be at most the model's {most} positions, got {longest} and "
            f"{max_new_tokens}"
        )


def software() -> dict[str, str]:
    """Versions of what computes the routing."""
    return {
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "transformers": transformers.__version__,
        "numpy": np.__version__,
    }


class _Reporting:
    """A collector's hooks that also report progress."""

    def __init__(self, collector: Collector, progress: Progress | None) -> None:
        self._collector = collector
        self._progress = progress
        self._prompts = 0
        self.begin_step = collector.begin_step

    def end_step(self, next_tokens: list[int]) -> None:
        self._collector.end_step(next_tokens)
        self.done(0)

    def done(self, prompts: int) -> None:
        self._prompts += prompts
        if self._progress is not None:
            self._progress(self._prompts, self._collector.steps)


def _by_weight(
    ids: npt.NDArray[np.int64], weights: npt.NDArray[np.float32]
) -> tuple[npt.NDArray[np.uint16], npt.NDArray[np.float32]]:
    """Ids and weights [N, k] by descending weight, equal weights by ascending id; weight 0 becomes NOT_ROUTED, and
    positive ones stay so in float16."""
    order = np.lexsort((ids, -weights), axis=-1)
    gates = np.take_along_axis(weights, order, axis=-1)
    gates = np.where(gates > 0, np.maximum(gates, np.float32(LEAST_GATE)), gates)
    chosen = np.where(gates == 0, NOT_ROUTED, np.take_along_axis(ids, order, axis=-1))
    return chosen.astype(np.uint16), gates
