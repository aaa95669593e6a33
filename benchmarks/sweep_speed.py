"""How much sooner a sweep ends in two processes than in one: `python benchmarks/sweep_speed.py`.

Both run the same grid in this order, with nothing else to do for the machine, and into empty folders: what is timed is
all of it, from the grid to the table, with the start of the processes. The goal is a ratio of at least 1.7 on two cores
for 24 points of about a second or two.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
from pathlib import Path
from tempfile import TemporaryDirectory
from time import perf_counter

import pandas as pd

from sim.sweep.backends import backend_of
from sim.sweep.grid import Grid
from sim.sweep.run import run_sweep

GOAL = 1.7
BASE = {"trace": "mixed", "calibration": "code", "cache": "25%"}
SYSTEMS = ["hybrimoe-code", "moe-infinity-code", "freetoken", "mixtral-offloading"]


def grid_of(points: int) -> Grid:
    """Four systems over as many links as it takes."""
    links = {"from": 4, "to": 64, "steps": points // len(SYSTEMS), "scale": "log"}
    return Grid.of({"base": BASE, "axes": {"hardware.link_gb_per_s": links, "system": SYSTEMS}})


def timed(grid: Grid, jobs: int, out: Path) -> tuple[float, pd.DataFrame]:
    """Seconds of the whole sweep, and its table."""
    begun_s = perf_counter()
    table = run_sweep(grid, out, backend_of("processes", jobs=jobs))
    took_s = perf_counter() - begun_s
    if set(table.status) != {"ok"}:
        raise SystemExit(f"not every point ran: {', '.join(sorted(set(table.reason)))}")
    return took_s, table


def main() -> None:
    """Prints one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--points", type=int, default=24, help="points of the grid, a multiple of four")
    parser.add_argument("--jobs", type=int, default=2, help="processes that are compared with one")
    options = parser.parse_args()
    grid = grid_of(options.points)
    with TemporaryDirectory() as folder:
        one_s, table = timed(grid, 1, Path(folder) / "one")
        many_s, again = timed(grid, options.jobs, Path(folder) / "many")
    pd.testing.assert_frame_equal(table.drop(columns="seconds"), again.drop(columns="seconds"), check_exact=True)
    record = {
        "points": len(table),
        "point_mean_s": float(table.seconds.mean()),
        "point_mean_s_in_processes": float(again.seconds.mean()),
        "jobs": options.jobs,
        "cores": len(os.sched_getaffinity(0)),
        "one_s": one_s,
        "many_s": many_s,
        "ratio": one_s / many_s,
        "goal": GOAL,
        "python": platform.python_version(),
    }
    print(json.dumps(record))


if __name__ == "__main__":
    main()
