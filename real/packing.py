"""How an expert stands in its flat buffer: as it is, or quantised; filled with its weights, or with random ones."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial
from math import prod

import torch
from torch import Tensor

from real.models.expert import ExpertForm, Weights
from real.quant import GROUP, QUANTS, SCALE, Quant

_BLOCK_BYTES = 64 * 2**20
_LARGEST = 0.02
"""Random weights are from minus this to this."""


@dataclass(frozen=True)
class Packing:
    """Flat buffers of ``form`` in ``dtype``, which is that of the model."""

    form: ExpertForm
    dtype: torch.dtype

    def pack(self, tensors: Iterable[Tensor], flat: Tensor) -> None:
        """Writes an expert's tensors, in the order of its form and in any dtype, into its flat buffer."""
        for into, tensor in zip(self.form.views(flat), tensors, strict=True):
            into.copy_(tensor)

    def block(self, experts: int, seed: int) -> Tensor:
        """A random block that :meth:`pack_random` takes windows of, for that many experts in all."""
        length = min(_BLOCK_BYTES // self.dtype.itemsize, experts * self.form.elements)
        return uniform_block(length, self.dtype, _LARGEST, seed)

    def pack_random(self, block: Tensor, start: int, flat: Tensor) -> None:
        """Writes an expert of the weights that stand in ``block`` from ``start`` on: every ``start`` gives another one.

        Experts share numbers, which is no matter: they serve to measure time, and no text comes from them.
        """
        fill_from(block, start, flat)


@dataclass(frozen=True)
class QuantisedPacking(Packing):
    """Flat buffers of bytes: the codes of all matrices, the biases in the model's dtype, then the scales.

    ``form`` runs on such buffers: every run restores the weights, and does with them what ``plain`` does.
    """

    plain: ExpertForm
    quant: Quant
    model_dtype: torch.dtype

    def pack(self, tensors: Iterable[Tensor], flat: Tensor) -> None:
        *views, scales = self.form.views(flat)
        by_matrix = iter(scales.view(SCALE).split(_groups(self.plain)))
        for into, tensor in zip(views, tensors, strict=True):
            if tensor.ndim == 1:
                into.view(self.model_dtype).copy_(tensor)
                continue
            own, groups = next(by_matrix), tensor.reshape(-1, GROUP)
            own.copy_(self.quant.scales(groups))
            into.copy_(self.quant.codes(groups, own))

    def block(self, experts: int, seed: int) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        length = min(_BLOCK_BYTES, experts * self.form.elements)
        return torch.randint(0, 256, (length,), dtype=self.dtype, generator=generator)

    def pack_random(self, block: Tensor, start: int, flat: Tensor) -> None:
        super().pack_random(block, start, flat)
        *matrices, scales = self.form.views(flat)
        scales.view(SCALE).fill_(_LARGEST / self.quant.most)
        for bias in matrices[len(_groups(self.plain)) :]:
            bias.zero_()


def packing_of(form: ExpertForm, dtype: torch.dtype, quant: str | None) -> Packing:
    """How experts of ``form`` are packed in a model of ``dtype``; ``quant`` is a key of :data:`real.quant.QUANTS`."""
    if quant is None:
        return Packing(form, dtype)
    how = QUANTS[quant]
    matrices = [name for name, shape in form.shapes.items() if len(shape) > 1]
    biases = {name: (prod(shape) * dtype.itemsize,) for name, shape in form.shapes.items() if len(shape) == 1}
    groups = _groups(form)
    codes = {name: (count, how.code_bytes) for name, count in zip(matrices, groups, strict=True)}
    shapes = {**codes, **biases, "scales": (sum(groups) * SCALE.itemsize,)}
    packed = ExpertForm(shapes, partial(_run_quantised, form, how, dtype))
    return QuantisedPacking(packed, torch.uint8, form, how, dtype)


def _run_quantised(plain: ExpertForm, quant: Quant, dtype: torch.dtype, packed: Weights, hidden: Tensor) -> Tensor:
    """Runs ``plain`` on rows [n, H] with the weights that ``packed`` stands for."""
    *views, scales = packed
    by_matrix = iter(scales.view(SCALE).split(_groups(plain)))
    weights = [
        view.view(dtype) if len(shape) == 1 else quant.weights(view, next(by_matrix), dtype).view(shape)
        for view, shape in zip(views, plain.shapes.values(), strict=True)
    ]
    return plain.run(tuple(weights), hidden)


def _groups(form: ExpertForm) -> list[int]:
    """Groups of every matrix of a form."""
    return [prod(shape) // GROUP for shape in form.shapes.values() if len(shape) > 1]


def uniform_block(length: int, dtype: torch.dtype, largest: float, seed: int) -> Tensor:
    """Seeded numbers between minus ``largest`` and this, for :func:`fill_from`."""
    return torch.empty(length, dtype=dtype).uniform_(-largest, largest, generator=torch.Generator().manual_seed(seed))


def fill_from(block: Tensor, start: int, flat: Tensor) -> None:
    """Fills ``flat`` with what stands in ``block`` from ``start`` on, which begins anew at its end: a mere copy."""
    done = 0
    while done < len(flat):
        part = block[start : start + len(flat) - done]
        flat[done : done + len(part)] = part
        done, start = done + len(part), 0
