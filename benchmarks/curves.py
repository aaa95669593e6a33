"""One pass for all capacities: seconds for Zipf(1.0) accesses over shuffled blocks in one pool.

    python -m benchmarks.curves [--accesses 5000000] [--blocks 4096] [--repeats 5]

Medians, after compilation; the search for next uses is part of belady's time.
"""

from __future__ import annotations

import statistics
import time
from typing import Annotated

import numpy as np
import typer

from sim.replay import Feed
from sim.replay.curves import ONE_PASS, curve
from traces.schema import Phase, Trace, TraceHeader


def zipf_trace(accesses: int, blocks: int, seed: int = 0) -> Trace:
    """One block a token, of independent Zipf(1.0) popularity; block numbers say nothing about it."""
    rng = np.random.default_rng(seed)
    reach = np.cumsum(1 / np.arange(1, blocks + 1))
    ranks = np.searchsorted(reach / reach[-1], rng.random(accesses, dtype=np.float32), side="right")
    ids = rng.permutation(blocks).astype(np.uint16)[np.minimum(ranks, blocks - 1)]
    header = TraceHeader(model="zipf", layers=1, experts=blocks, top_k=1, expert_bytes=(1,), synthetic=True)
    none, order = np.zeros(accesses, np.int32), np.arange(accesses, dtype=np.int32)
    phase = np.full(accesses, Phase.DECODE, np.uint8)
    return Trace(header, ids[:, None, None], token_ids=none, sequence=none, position=order, step=order, phase=phase)


def main(
    accesses: Annotated[int, typer.Option(min=1)] = 5_000_000,
    blocks: Annotated[int, typer.Option(min=1, max=65534)] = 4096,
    repeats: Annotated[int, typer.Option(min=1)] = 5,
) -> None:
    """Measures both curves, and prints a line each."""
    small = Feed.of(zipf_trace(10, blocks))
    for policy in ONE_PASS:
        curve(small, policy, scope="global")
    feed = Feed.of(zipf_trace(accesses, blocks))
    for policy in ONE_PASS:
        seconds = []
        for _ in range(repeats):
            started = time.perf_counter()
            found = curve(feed, policy, scope="global")
            seconds.append(time.perf_counter() - started)
        tenth = found.hit_ratios()[max(blocks // 10, 1) - 1]
        print(
            f"{policy}: {statistics.median(seconds):.2f} s for {accesses} accesses and {blocks} capacities "
            f"(hit ratio {tenth:.4f} at a tenth)"
        )


if __name__ == "__main__":
    typer.run(main)
