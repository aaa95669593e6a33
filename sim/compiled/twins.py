"""All compiled twins, registered by being imported."""

from __future__ import annotations

from sim.compiled import (
    arc,
    belady,
    belady_imitator,
    blend,
    eam,
    ewma_reuse,
    fifo,
    hobbit,
    lfru,
    lfu,
    lfu_decay,
    lfu_global,
    lowest_layer,
    lru,
    mrs,
    random,
    s3fifo,
    sieve,
    static,
    two_generation,
    window_score,
)
from sim.compiled.twin import TWINS

__all__ = [
    "TWINS",
    "arc",
    "belady",
    "belady_imitator",
    "blend",
    "eam",
    "ewma_reuse",
    "fifo",
    "hobbit",
    "lfru",
    "lfu",
    "lfu_decay",
    "lfu_global",
    "lowest_layer",
    "lru",
    "mrs",
    "random",
    "s3fifo",
    "sieve",
    "static",
    "two_generation",
    "window_score",
]
