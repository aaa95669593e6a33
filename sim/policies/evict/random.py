"""Any block, with equal chances."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from sim.policies.base import EvictionPolicy, PolicyContext

_BITS = 2**64 - 1


def mixed(seed: int, number: int, block: int) -> int:
    """A pseudo-random number of 53 bits, by the finalizer of SplitMix64 (Steele, Lea and Flood 2014).

    ``sim/compiled/stream.py`` compiles these very lines, for unsigned numbers of 64 bits.
    """
    z = (seed + number * 0x9E3779B97F4A7C15 + block * 0xD1B54A32D192ED03) & _BITS
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 & _BITS
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB & _BITS
    return (z ^ (z >> 31)) >> 11


class Random(EvictionPolicy):
    """Evicts the block with the smallest of numbers that are drawn anew, from the seed, for every decision and block.

    A decision is known by its event, and by how many of the event's experts it has been told so far.
    """

    name: ClassVar[str] = "random"

    def __init__(self, context: PolicyContext) -> None:
        super().__init__(context)
        self._event, self._told = -1, 0

    def observe(self, event: int, blocks: Sequence[int], counts: Sequence[int]) -> None:
        self._told = len(blocks) + (self._told if event == self._event else 0)
        self._event = event

    def key(self, block: int) -> float:
        return mixed(self.context.seed, self._event * (self.context.experts + 1) + self._told, block)
