"""Slots split over layers by what misses cost: exact, and better where layers differ."""

from __future__ import annotations

from itertools import product

import numpy as np

from sim.replay import Capacity, Feed, Settings
from sim.replay.calibration import TraceCalibration
from sim.replay.run import replay
from sim.slots import misses_by_layer, split_by_misses
from traces.schema import Trace
from traces.synthetic import Sizes, generate


def uneven() -> Trace:
    """Three layers: the first always asks for the same two experts, the others for what Zipf draws."""
    trace = generate("zipf", 0, Sizes(sequences=2, prompt_tokens=4, new_tokens=60, layers=3, experts=6, top_k=2))
    ids = np.array(trace.expert_ids)
    ids[:, 0] = (0, 1)
    return Trace.of(trace.header, **{**dict(trace.arrays()), "expert_ids": ids})


def test_no_other_split_misses_less() -> None:
    calibration = TraceCalibration(Feed.of(uneven()))
    misses = misses_by_layer(calibration)
    for total in range(3, 19):
        split = split_by_misses(calibration, total)
        assert sum(split) == total
        cost = sum(misses[layer, slots - 1] for layer, slots in enumerate(split))
        others = [split for split in product(range(1, 7), repeat=3) if sum(split) == total]
        assert cost == min(sum(misses[layer, slots - 1] for layer, slots in enumerate(other)) for other in others)


def test_a_layer_that_needs_little_gets_little() -> None:
    split = split_by_misses(TraceCalibration(Feed.of(uneven())), 9)
    assert split[0] == 2


def test_misses_are_those_of_a_replay() -> None:
    trace = uneven()
    misses = misses_by_layer(TraceCalibration(Feed.of(trace)))
    found = replay(Feed.of(trace), Settings("lru", Capacity.slots("3", trace.header, "layer")))
    assert misses[:, 2].sum() == found.row("all")["misses_union"]
