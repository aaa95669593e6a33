"""What a trace needs to know of a model in a catalogue. The catalogue itself is the simulator's: the root brings it."""

from __future__ import annotations

from typing import NamedTuple


class KnownModel(NamedTuple):
    """The routed experts of a model, and the dtype of what is outside of them."""

    layers: int  # with experts
    experts: int
    top_k: int
    expert_bytes: int
    expert_bits: float  # a weight
    dtype: str
