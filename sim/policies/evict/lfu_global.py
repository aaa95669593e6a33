"""Least frequently used, counted over the whole run."""

from __future__ import annotations

from typing import ClassVar

from sim.policies.evict.lfu import Lfu


class LfuGlobal(Lfu):
    """Evicts the block used in the fewest events so far; its count is kept when it leaves."""

    name: ClassVar[str] = "lfu-global"

    def forget(self, block: int) -> None:
        pass
