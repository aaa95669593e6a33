"""Replay without a clock: which uses of an expert hit, what is loaded, who leaves, under either contract."""

from sim.replay.feed import Feed
from sim.replay.result import Replay
from sim.replay.run import replay
from sim.replay.settings import Capacity, Settings

__all__ = ["Capacity", "Feed", "Replay", "Settings", "replay"]
