"""Replay without a clock: which uses of an expert hit, what is loaded, who leaves, under either contract."""

from sim.replay.feed import Feed
from sim.replay.settings import Capacity, Settings

__all__ = ["Capacity", "Feed", "Settings"]
