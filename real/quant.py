"""Weights in 8 or 4 bits: symmetric rounding in groups of 64 that follow each other in a matrix.

Each group has a scale in bf16, by which its largest magnitude becomes the largest code.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from sim.spec import ModelSpec
from traces.errors import InputError, unknown_name

GROUP = 64
"""Weights that share a scale."""
SCALE = torch.bfloat16
"""The dtype of scales: in fp16, those of small weights would lose their last digits."""


@dataclass(frozen=True)
class Quant:
    """A way to write weights in ``code_bits`` bits (8, or 4 in pairs)."""

    code_bits: int

    @property
    def most(self) -> int:
        """The largest code; the smallest is its negative."""
        return int(2 ** (self.code_bits - 1) - 1)

    @property
    def bits(self) -> float:
        """Bits a weight, scales included."""
        return self.code_bits + 8 * SCALE.itemsize / GROUP

    @property
    def code_bytes(self) -> int:
        """Bytes of the codes of a group."""
        return GROUP * self.code_bits // 8

    def scales(self, groups: Tensor) -> Tensor:
        """The scales [g] of the groups [g, 64]."""
        return (groups.abs().amax(dim=1).float() / self.most).to(SCALE)

    def codes(self, groups: Tensor, scales: Tensor) -> Tensor:
        """The codes of ``groups`` [g, 64] under ``scales`` [g], as bytes [g, code_bytes]."""
        divisors = scales.float().masked_fill(scales == 0, 1)
        codes = groups.div(divisors[:, None]).round_().clamp_(-self.most, self.most).to(torch.int8)
        if self.code_bits == 8:
            return codes.view(torch.uint8)
        low, high = codes.add_(8).view(torch.uint8).chunk(2, dim=1)
        return low | (high << 4)

    def weights(self, codes: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
        """The weights [g, 64] in ``dtype`` that codes [g, code_bytes] and scales [g] stand for."""
        if self.code_bits == 8:
            return codes.view(torch.int8).to(dtype).mul_(scales[:, None])
        return torch.cat([codes & 15, codes >> 4], dim=1).to(dtype).sub_(8).mul_(scales[:, None])


QUANTS: dict[str, Quant] = {"int8": Quant(8), "int4": Quant(4)}
"""What experts can be kept in, other than the model's dtype."""


def quantised_spec(spec: ModelSpec, quant: str) -> ModelSpec:
    """The dimensions of ``spec`` with experts in ``quant``, scales counted.

    Raises :class:`InputError` for an unknown name, and for experts that are not made of whole groups.
    """
    if quant not in QUANTS:
        raise unknown_name("quant", quant, QUANTS)
    weights = spec.hidden * spec.expert_width
    if weights % (2 * GROUP):  # two, so that every expert begins where a float can
        rule = f"matrices of a multiple of {2 * GROUP} weights"
        raise InputError(f"quant must go with experts that have {rule}, got {weights} in {spec.name}")
    return spec.model_copy(update={"expert_bits": QUANTS[quant].bits})
