"""What order is worth to a cache: LRU on a trace against LRU on the same tokens in a shuffled order."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from sim.replay import Feed
from sim.replay.curves import Curve, curve
from sim.replay.settings import Contract
from traces.locality import SHARES
from traces.schedule import by_sequence
from traces.schema import Array, Phase, Trace


def order_gain(
    trace: Trace,
    *,
    rng: np.random.Generator,
    contract: Contract = "atomic",
    progress: Callable[[int], None] = lambda passes: None,
) -> list[dict[str, Any]]:
    """Hit ratios by assignment of LRU, per layer, at :data:`SHARES` of the experts: as recorded, and shuffled.

    Both replay one token a pass, all sequences after each other as one, with an empty cache at the start: they differ
    in nothing but the order, so that popularity hits alike in both, and the difference is what order gives. ``rng``
    draws the permutation.
    """
    rows = by_sequence(trace).rows
    recorded = _lru(trace, rows, contract, progress)
    shuffled = _lru(trace, rng.permutation(rows), contract, progress)
    experts = trace.header.experts
    return [_entry(recorded, shuffled, max(1, int(share * experts)), experts) for share in SHARES]


def _lru(trace: Trace, rows: Array, contract: Contract, progress: Callable[[int], None]) -> Curve:
    return curve(Feed.of(_in_order(trace, rows)), "lru", contract=contract, progress=progress)


def _in_order(trace: Trace, rows: Array) -> Trace:
    """The tokens of ``trace`` in the order of ``rows``, as the decoding of one sequence."""
    index = np.arange(len(rows), dtype=np.int32)
    return Trace(
        header=trace.header.model_copy(update={"domains": ()}),
        expert_ids=trace.expert_ids[rows],
        token_ids=np.zeros_like(index),
        sequence=np.zeros_like(index),
        position=index,
        step=index,
        phase=np.full(len(rows), Phase.DECODE, np.uint8),
    )


def _entry(recorded: Curve, shuffled: Curve, slots: int, experts: int) -> dict[str, Any]:
    ours, theirs = (float(found.hit_ratios()[slots - 1]) for found in (recorded, shuffled))
    return {
        "capacity_slots": slots,
        "capacity_share": slots / experts,
        "hit_ratio": ours,
        "hit_ratio_shuffled": theirs,
        "order_gain": ours - theirs,
    }
