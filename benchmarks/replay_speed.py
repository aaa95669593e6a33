"""How fast a trace is replayed, beside libCacheSim's native reader in the same run.

Both replay the same accesses, one use of one block each: Zipf(1.0) over blocks whose numbers are shuffled, so that
their order helps nobody. Ours is the function that the command line calls, with every counter on; the search for next
uses is part of the time of ``belady``. libCacheSim reads its own binary format (oracleGeneral, which brings the next
uses along). One thread each; runs alternate; medians of processor seconds, so that a busy machine disturbs less.

Where definitions differ: libCacheSim's Belady keeps every miss, which is ``belady-forced`` here; ``belady`` passes by
what is needed last, and misses less.

    pip install -e ".[bench]"        # libCacheSim's wheel is GPL; nothing but this benchmark uses it
    python -m benchmarks.replay_speed [--repeats 5] [--json] [--out FILE.json]
"""

from __future__ import annotations

import json
import statistics
import tempfile
import time
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer

from analysis.files import check_file
from benchmarks.evidence import keep
from sim.replay import Capacity, Feed, Settings
from sim.replay.run import replay
from traces.schema import Array, Trace, TraceHeader

BLOCKS, SLOTS = 4096, 409
THEIRS = {
    "lru": "LRU",
    "fifo": "FIFO",
    "lfu": "LFU",
    "sieve": "Sieve",
    "s3fifo": "S3FIFO",
    "arc": "ARC",
    "belady-forced": "Belady",
    "belady": "Belady",
}
"""Their class by our name."""

ORACLE_GENERAL = np.dtype([("time", "<u4"), ("id", "<u8"), ("size", "<u4"), ("next", "<i8")])
"""One access in their binary format; ``next`` is the number of the next access to the same object, -1 for none."""


def zipf(accesses: int, rng: np.random.Generator) -> Array:
    """Blocks uint16 [accesses], the n-th most popular with a weight of 1 / n, under shuffled numbers."""
    weights = np.cumsum(1 / np.arange(1, BLOCKS + 1))
    ranks = np.searchsorted(weights / weights[-1], rng.random(accesses), side="right")
    return rng.permutation(BLOCKS).astype(np.uint16)[ranks]


def trace_of(blocks: Array) -> Trace:
    """A trace of one layer in which every decode token has one expert."""
    header = TraceHeader(
        model="zipf", layers=1, experts=BLOCKS, top_k=1, expert_bytes=(1,), synthetic=True, made_by="replay_speed"
    )
    order, none = np.arange(len(blocks), dtype=np.int32), np.zeros(len(blocks), np.int32)
    return Trace(header, blocks[:, None, None], none, none, order, order, np.ones(len(blocks), np.uint8))


def write_oracle(blocks: Array, path: Path) -> None:
    """Writes the accesses as libCacheSim reads them."""
    records = np.zeros(len(blocks), ORACLE_GENERAL)
    records["id"], records["size"], records["next"] = blocks, 1, -1
    order = np.argsort(blocks, kind="stable")
    same = blocks[order][1:] == blocks[order][:-1]
    records["next"][order[:-1][same]] = order[1:][same]
    records.tofile(path)


def process_s(work: Callable[[], Any]) -> tuple[float, Any]:
    """Processor seconds of ``work``, and what it returns."""
    start_s = time.process_time()
    outcome = work()
    return time.process_time() - start_s, outcome


def compare(policy: str, feed: Feed, path: Path, repeats: int, libcachesim: Any) -> dict[str, Any]:
    """Both on one policy, by turns: millions of accesses a second, their ratio, and the misses of either."""
    settings = Settings(policy, Capacity.slots(str(SLOTS), feed.trace.header, "layer"))
    replay(feed, settings)  # what has to be compiled is compiled here

    def theirs() -> int:
        reader = libcachesim.TraceReader(str(path), libcachesim.TraceType.ORACLE_GENERAL_TRACE)
        miss_ratio, _ = getattr(libcachesim, THEIRS[policy])(SLOTS).process_trace(reader)
        return round(miss_ratio * len(feed.trace))

    runs = [(process_s(lambda: replay(feed, settings).row()), process_s(theirs)) for _ in range(repeats)]
    ours_s, theirs_s = (statistics.median(run[side][0] for run in runs) for side in (0, 1))
    (_, row), (_, their_misses) = runs[-1]
    return {
        "policy": policy,
        "ratio": theirs_s / ours_s,
        "ours_m_accesses_per_s": len(feed.trace) / ours_s / 1e6,
        "theirs_m_accesses_per_s": len(feed.trace) / theirs_s / 1e6,
        "misses": row["misses_union"],
        "their_misses": their_misses,
    }


def main(
    accesses: Annotated[int, typer.Option(help="Accesses of the trace.")] = 5_000_000,
    repeats: Annotated[int, typer.Option(help="Runs of each; medians are printed.")] = 5,
    policies: Annotated[str, typer.Option(help="Policies, separated by commas.")] = ",".join(THEIRS),
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object a line.")] = False,
    out: Annotated[Path | None, typer.Option(help="Also keep the figures in this .json file.")] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace the file that --out names.")] = False,
) -> None:
    """Prints POLICY RATIO for each policy, with the speed of either and whether they miss equally often."""
    unknown = [name for name in policies.split(",") if name not in THEIRS]
    if unknown:
        raise typer.BadParameter(f"must be among {', '.join(THEIRS)}, got {unknown[0]}", param_hint="policies")
    if out is not None:
        check_file(out, force=force)
    libcachesim = their_package()
    rows = []
    blocks = zipf(accesses, np.random.default_rng(0))
    feed = Feed.of(trace_of(blocks))
    feed.trace.digest  # noqa: B018  # kept by the trace; not part of a replay
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "accesses.oracleGeneral"
        write_oracle(blocks, path)
        for policy in policies.split(","):
            rows.append(compare(policy, feed, path, repeats, libcachesim))
            typer.echo(json.dumps(rows[-1]) if as_json else line_of(rows[-1]))
    if out is not None:
        keep(out, ("numba", "libcachesim"), force=force, accesses=accesses, repeats=repeats, policies=rows)


def their_package() -> Any:
    """The module ``libcachesim``; leaves with one line and exit code 2 where it is not installed."""
    try:
        return import_module("libcachesim")
    except ModuleNotFoundError:
        typer.echo("error: libcachesim must be installed (pip install '.[bench]'), got none", err=True)
        raise typer.Exit(2) from None


def line_of(row: dict[str, Any]) -> str:
    """What a person reads of a comparison."""
    ours, theirs, misses, their_misses = list(row.values())[2:]
    verdict = "the same misses" if misses == their_misses else f"{misses} misses, theirs {their_misses}"
    return f"{row['policy']:14} {row['ratio']:6.2f}   {ours:6.1f} M/s against {theirs:5.1f} M/s, {verdict}"


if __name__ == "__main__":
    typer.run(main)
