"""The table of misses of every policy on the recorded traces that ship: ``golden_misses.json``.

``python -m tests.sim.golden_misses`` writes it anew; the difference that it makes is then to be explained.
"""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

from sim.policies import EVICTION
from sim.replay import Capacity, Feed, Settings
from sim.replay.run import replay
from traces import store
from traces.shipped import find_trace

FILE = Path(__file__).with_suffix(".json")
BATCHES = {"mixed": 1, "code": 1, "batch4": 4}
CAPACITIES = ("25%", "50%")
POLICIES = sorted(name for name, kind in EVICTION.items() if "calibration" not in kind.needs)

Table = dict[str, dict[str, int]]


@cache
def feed(trace: str) -> Feed:
    """The recording of that name, over the lanes that it was recorded with."""
    return Feed.of(store.load(find_trace(trace)), BATCHES[trace])


def table(policy: str) -> Table:
    """Misses (distinct experts of an event, summed): ``table[trace]["contract scope capacity"]``."""
    return {trace: {" ".join(way): misses(policy, trace, *way) for way in ways()} for trace in BATCHES}


def ways() -> list[tuple[Any, ...]]:
    """Contract, scope and capacity of every column."""
    return [
        (contract, scope, capacity)
        for contract in ("atomic", "serial")
        for scope in ("layer", "global")
        for capacity in CAPACITIES
    ]


def misses(policy: str, trace: str, contract: Any, scope: Any, capacity: str) -> int:
    """One number of the table."""
    one = feed(trace)
    amount = Capacity.slots(capacity, one.trace.header, scope)
    row = replay(one, Settings(policy, amount, scope=scope, contract=contract)).row()
    return int(row["misses_union"])


def main() -> None:
    """Writes the table."""
    draft = FILE.with_suffix(".partial")
    draft.write_text(json.dumps({name: table(name) for name in POLICIES}, indent=1) + "\n", encoding="utf-8")
    draft.replace(FILE)


if __name__ == "__main__":
    main()
