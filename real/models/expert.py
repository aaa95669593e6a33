"""What one routed expert is: the tensors that it is packed from, and the arithmetic that it does.

Shapes: n rows, H hidden width, I expert width. A form belongs to a model; the families build theirs from the functions
here (:meth:`real.models.families.Family.form`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, partial
from math import prod

import torch
from torch import Tensor
from torch.nn import functional

Weights = tuple[Tensor, ...]
"""An expert's tensors, in the order of its form."""


@dataclass(frozen=True)
class ExpertForm:
    """The tensors of an expert, in the order in which they stand in its flat buffer, and how it is computed.

    ``run`` takes the tensors and rows [n, H] and returns [n, H]. Matrices stand before biases, so that all are aligned.
    ``run_together``, where there is one, does so for several experts at once (:func:`gated_together`).
    """

    shapes: dict[str, tuple[int, ...]]
    run: Callable[[Weights, Tensor], Tensor]
    run_together: Callable[[Weights, Tensor, Tensor], Tensor] | None = None

    @cached_property
    def elements(self) -> int:
        """Elements of one expert: the length of its flat buffer."""
        return sum(self._lengths)

    def views(self, flat: Tensor) -> Weights:
        """The expert's tensors, as views of a flat buffer [elements]."""
        parts = flat.split(self._lengths)
        return tuple([part.view(shape) for part, shape in zip(parts, self.shapes.values(), strict=True)])

    def pool(self, flats: Tensor) -> Weights:
        """The matrices of many experts, transposed, as views of their flat buffers [slots, elements]."""
        parts = flats.split(self._lengths, dim=1)
        return tuple([part.unflatten(1, shape).mT for part, shape in zip(parts, self.shapes.values(), strict=True)])

    @cached_property
    def _lengths(self) -> list[int]:
        return [prod(shape) for shape in self.shapes.values()]


def gated_form(act: Callable[[Tensor], Tensor], hidden: int, width: int) -> ExpertForm:
    """Gate and up [2I, H] (gate first), and down [H, I], with the activation ``act`` on the gate half."""
    shapes: dict[str, tuple[int, ...]] = {"gate_up_proj": (2 * width, hidden), "down_proj": (hidden, width)}
    return ExpertForm(shapes, partial(gated, act), partial(gated_together, act))


def plain_form(act: Callable[[Tensor], Tensor], hidden: int, width: int) -> ExpertForm:
    """Two matrices, in [I, H] and out [H, I], with the activation ``act`` between them: Switch Transformers."""
    return ExpertForm({"wi": (width, hidden), "wo": (hidden, width)}, partial(plain, act))


def clamped_form(hidden: int, width: int, alpha: float, limit: float) -> ExpertForm:
    """GPT-OSS: gate and up [H, 2I], a column of each in turn, and down [I, H], both transposed and with biases."""
    shapes = {
        "gate_up_proj": (hidden, 2 * width),
        "down_proj": (width, hidden),
        "gate_up_proj_bias": (2 * width,),
        "down_proj_bias": (hidden,),
    }
    return ExpertForm(shapes, partial(clamped, alpha, limit))


def gated(act: Callable[[Tensor], Tensor], weights: Weights, hidden: Tensor) -> Tensor:
    """A gated expert (:func:`gated_form`) on rows [n, H]."""
    gate_up, down = weights
    gate, up = functional.linear(hidden, gate_up).chunk(2, dim=-1)
    return functional.linear(act(gate) * up, down)


def gated_together(act: Callable[[Tensor], Tensor], weights: Weights, rows: Tensor, ends: Tensor) -> Tensor:
    """Gated experts (:func:`gated_form`) on rows [n, H] that stand expert by expert: two products for all of them.

    ``weights`` are [E, H, 2I] and [E, I, H]; the rows of expert e are those from ``ends[e - 1]`` to ``ends[e]`` (int32
    [E]), which may be none.
    """
    gate_up, down = weights
    gate, up = functional.grouped_mm(rows, gate_up, offs=ends).chunk(2, dim=-1)
    return functional.grouped_mm(act(gate) * up, down, offs=ends)


def plain(act: Callable[[Tensor], Tensor], weights: Weights, hidden: Tensor) -> Tensor:
    """A plain expert (:func:`plain_form`) on rows [n, H]."""
    into, out = weights
    return functional.linear(act(functional.linear(hidden, into)), out)


def clamped(alpha: float, limit: float, weights: Weights, hidden: Tensor) -> Tensor:
    """An expert of GPT-OSS (:func:`clamped_form`) on rows [n, H]: both halves clamped, up shifted by one.

    Source: OpenAI, "gpt-oss-120b & gpt-oss-20b Model Card" (arXiv:2508.10925), section 2.2.
    """
    gate_up, down, gate_up_bias, down_bias = weights
    both = torch.addmm(gate_up_bias, hidden, gate_up).unflatten(-1, (-1, 2))  # [n, I, 2]
    gate, up = both[..., 0].clamp(max=limit), both[..., 1].clamp(-limit, limit)
    return torch.addmm(down_bias, (up + 1) * gate * (gate * alpha).sigmoid(), down)
