"""How a cache's slots are split over the layers: by what misses cost, as measured on a calibration trace."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from sim.replay.calibration import TraceCalibration
from sim.replay.curves import curve
from sim.replay.feed import Feed
from traces.edit import slice_trace
from traces.schema import Array


def split_by_misses(calibration: TraceCalibration, total: int) -> tuple[int, ...]:
    """Slots of each layer, ``total`` in all and at least one each, that miss least on ``calibration`` under LRU.

    Exact, by dynamic programming over the layers; equal splits go to the one with fewer slots in later layers. A miss
    costs the same in every layer, as experts of equal bytes do. Source: AdapMoE (arXiv 2408.10284), section 4.3, whose
    cost model is the probability of a miss; departure: misses are counted by replaying, not from a model of them.
    """
    misses = misses_by_layer(calibration)
    layers, most = misses.shape
    best = np.full(total + 1, np.inf)  # by slots given away: the fewest misses of the layers so far
    best[0] = 0.0
    chosen = np.zeros((layers, total + 1), np.int64)
    for layer in range(layers):
        totals = np.full((most, total + 1), np.inf)
        for slots in range(1, min(most, total) + 1):
            totals[slots - 1, slots:] = best[: total + 1 - slots] + misses[layer, slots - 1]
        chosen[layer] = totals.argmin(axis=0) + 1
        best = totals.min(axis=0)
    split = []
    for layer in reversed(range(layers)):
        split.append(int(chosen[layer, total]))
        total -= split[-1]
    return tuple(reversed(split))


def misses_by_layer(calibration: TraceCalibration) -> Array:
    """Distinct experts that miss in each layer with 1, 2, ... E slots of LRU: int64 [L, E]."""
    feed = calibration.feed
    return np.stack([_misses(feed, layer) for layer in range(feed.trace.header.layers)])


def _misses(feed: Feed, layer: int) -> Array:
    found = curve(replace(feed, trace=slice_trace(feed.trace, layers=str(layer))))
    misses: Array = found.accesses.sum() - found.hits_union.sum(axis=0)
    return misses
