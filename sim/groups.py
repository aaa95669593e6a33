"""Groups of sequences that share forward passes: what may be drawn anew, as a whole, to see how sure a figure is."""

from __future__ import annotations

import numpy as np
import pandas as pd
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from sim.results import RunResult
from traces.schema import Array, Phase


def group_rows(rows: pd.DataFrame) -> Array:
    """For each row of tokens tables, with the number of its ``run``, the number of its group: int64 [rows].

    Sequences that share a pass in any of the runs belong together: in lock-step a group is a batch, in continuous
    batching it is all that overlaps. Groups are numbered in the order of their first passes.
    """
    passes = rows.groupby(["run", "step"], sort=False).ngroup().to_numpy()
    sequences = rows.groupby("sequence", sort=False).ngroup().to_numpy()
    return _connected(passes, sequences)


def decode_by_group(run: RunResult) -> tuple[list[float], list[int]]:
    """Decode seconds and decode tokens of each group of one run."""
    rows = run.tokens.assign(run=0)
    if not len(rows):
        return [], []
    rows["group"] = group_rows(rows)
    decode = rows[rows["phase"] == Phase.DECODE]
    steps = decode.drop_duplicates("step")
    count = int(rows["group"].max()) + 1
    seconds = np.bincount(steps["group"], weights=steps["end_s"] - steps["start_s"], minlength=count)
    tokens = np.bincount(decode["group"], weights=decode["tokens"], minlength=count)
    return seconds.tolist(), tokens.astype(int).tolist()


def _connected(passes: Array, sequences: Array) -> Array:
    """For each row, a pass and a sequence in it, the number of the piece that both belong to: int64 [rows]."""
    if not len(passes):
        return passes
    first = int(passes.max()) + 1
    many = first + int(sequences.max()) + 1
    graph = coo_array((np.ones(len(passes)), (passes, first + sequences)), shape=(many, many))
    return np.asarray(np.unique(connected_components(graph, directed=False)[1][passes], return_inverse=True)[1])
