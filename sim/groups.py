"""Groups of sequences that share forward passes: what may be drawn anew, as a whole, to see how sure a figure is."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd

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


def decode_by_group(runs: Sequence[RunResult]) -> tuple[Array, Array]:
    """Decode seconds float64 [runs, G] and decode tokens int64 [G] of the groups that the runs have in common."""
    rows = pd.concat([run.tokens.assign(run=place) for place, run in enumerate(runs)], ignore_index=True)
    rows["group"] = group_rows(rows)
    decode = rows[rows["phase"] == Phase.DECODE]
    steps = decode.drop_duplicates(["run", "step"])
    count = int(rows["group"].max()) + 1 if len(rows) else 0
    seconds, tokens = np.zeros((len(runs), count)), np.zeros(count, np.int64)
    np.add.at(seconds, (steps["run"], steps["group"]), steps["end_s"] - steps["start_s"])
    first = decode[decode["run"] == 0]
    np.add.at(tokens, first["group"], first["tokens"])
    return seconds, tokens


def _connected(passes: Array, sequences: Array) -> Array:
    """For each row, a pass and a sequence in it, the number of the piece that both belong to: int64 [rows]."""
    first = int(passes.max(initial=-1)) + 1
    if first == len(passes):  # no pass is shared: spares what runs alone the time that importing scipy takes
        return np.asarray(sequences)
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    many = first + int(sequences.max()) + 1
    graph = coo_array((np.ones(len(passes)), (passes, first + sequences)), shape=(many, many))
    return np.asarray(np.unique(connected_components(graph, directed=False)[1][passes], return_inverse=True)[1])
