"""How much memory the replay of a long trace takes above the file that it maps.

The trace is made chunk by chunk and mapped; each policy replays it in a process of its own, which reports its peak of
resident memory, what it had before, and the mapped bytes.

    python -m benchmarks.replay_memory [--tokens 2100000] [--out FILE.json]
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer

from analysis.files import check_file
from benchmarks.evidence import keep
from sim.replay import Capacity, Feed, Settings
from sim.replay.run import replay
from traces.schema import Trace, TraceHeader

LAYERS, EXPERTS, TOP_K = 12, 128, 4
CHUNK_TOKENS = 100_000


def write_ids(path: Path, tokens: int) -> None:
    """Writes expert ids uint16 [tokens, LAYERS, TOP_K]: four different experts each, low and high numbers alike."""
    rng = np.random.default_rng(0)
    with path.open("wb") as file:
        for start in range(0, tokens, CHUNK_TOKENS):
            count = min(CHUNK_TOKENS, tokens - start)
            first = (EXPERTS * rng.random((count, LAYERS, 1)) ** 3).astype(np.uint16)
            strides = np.cumsum(rng.integers(1, EXPERTS // TOP_K, (count, LAYERS, TOP_K)), axis=-1)
            ((first + strides) % EXPERTS).astype(np.uint16).tofile(file)


def mapped(path: Path, tokens: int) -> Trace:
    """The trace over the mapped file; its small arrays are in memory."""
    header = TraceHeader(
        model="long", layers=LAYERS, experts=EXPERTS, top_k=TOP_K, expert_bytes=(1,) * LAYERS, synthetic=True
    )
    ids = np.memmap(path, np.uint16, "r", shape=(tokens, LAYERS, TOP_K)).view(np.ndarray)
    order, none = np.arange(tokens, dtype=np.int32), np.zeros(tokens, np.int32)
    return Trace(header, ids, none, none, order, order, np.ones(tokens, np.uint8))


def measure(path: Path, tokens: int, policy: str) -> dict[str, object]:
    """Replays in this process; bytes at the peak, without those of the mapped file, all of which has been read."""
    trace = mapped(path, tokens)
    settings = Settings(policy, Capacity.slots("25%", trace.header, "layer"))
    result = replay(Feed.of(trace), settings)
    peak_bytes = most_resident_bytes()
    row = result.row()
    return {
        "policy": policy,
        "assignments": row["assignments"],
        "hit_ratio": row["hit_ratio_union"],
        "seconds": result.seconds,
        "peak_bytes": peak_bytes,
        "mapped_bytes": trace.expert_ids.nbytes,
        "above_mapped_bytes": peak_bytes - trace.expert_ids.nbytes,
    }


def most_resident_bytes() -> int:
    """The peak of this process alone, as Linux tells it: what ``getrusage`` tells begins with that of its parent."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:"))


def main(
    tokens: Annotated[int, typer.Option(help="Tokens; each has 48 accesses.")] = 2_100_000,
    policies: Annotated[str, typer.Option(help="Policies, separated by commas.")] = "lru,belady",
    out: Annotated[Path | None, typer.Option(help="Also keep the figures in this .json file.")] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace the file that --out names.")] = False,
    only: Annotated[str, typer.Option(hidden=True)] = "",
) -> None:
    """Prints one line a policy: how long, and how much memory."""
    if only:
        typer.echo(json.dumps(measure(Path(only), tokens, policies)))
        return
    if out is not None:
        check_file(out, force=force)
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "ids"
        write_ids(path, tokens)
        for policy in policies.split(","):
            rows.append(apart(path, tokens, policy))
            typer.echo(line_of(rows[-1]))
    if out is not None:
        keep(out, ("numba",), force=force, tokens=tokens, policies=rows)


def apart(path: Path, tokens: int, policy: str) -> dict[str, Any]:
    """What :func:`measure` finds in a process of its own."""
    command = [sys.executable, "-m", "benchmarks.replay_memory", "--tokens", str(tokens)]
    words = [*command, "--policies", policy, "--only", str(path)]
    row: dict[str, Any] = json.loads(subprocess.run(words, check=True, stdout=subprocess.PIPE).stdout)
    return row


def line_of(row: dict[str, Any]) -> str:
    """What a person reads of a policy."""
    accesses = f"{row['assignments'] / 1e6:.1f} M accesses in {row['seconds']:.1f} s"
    return f"{row['policy']:8} {accesses}, {row['above_mapped_bytes'] / 2**20:.0f} MiB above the mapped file"


if __name__ == "__main__":
    typer.run(main)
