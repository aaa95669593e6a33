"""Result folders to tidy tables: one row a step, one row a decode token, one row a layer, one row a request.

The columns are defined in ``docs/metrics.md``; a frame is never written back into the run that it came from.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import pandas as pd

from sim.results import RunResult
from traces.schema import Phase

LAYER_COMPONENTS = ("dense_s", "gpu_experts_s", "host_s", "stall_s")
"""Times of the ``layers`` table that add up to the time of a layer."""

COMPONENTS: dict[str, str] = {
    "dense_s": "dense",
    "gpu_experts_s": "GPU experts",
    "stall_s": "stall",
    "host_s": "host",
    "head_s": "head",
    "other_s": "other",
}
"""Critical-path components of a step, in the order in which they are shown; they add up to its latency."""

OVERLAPPED: dict[str, str] = {"transfer_s": "link", "cpu_experts_s": "CPU experts", "python_s": "own Python"}
"""Busy times that run beside the critical path, or are a part of the host's; they are part of no sum."""

COUNTS = ("assignments", "union", "hits_union", "hits_assignments", "late_hits", "misses", "cpu_experts", "bytes")
"""Counting columns of the ``layers`` table: the decisions, free of any clock."""


def load_runs(paths: Iterable[Path]) -> list[RunResult]:
    """Reads result folders in the order given; raises :class:`sim.results.ResultError` for one that is not."""
    return [RunResult.load(Path(path)) for path in paths]


def step_frame(run: RunResult) -> pd.DataFrame:
    """One row a forward pass, ascending by step: phase, lanes, tokens, times, components and counts.

    Layer columns are summed over the layers of the step. ``other_s`` is what remains of ``latency_s`` beside the other
    components (embedding, gaps between layers), so that :data:`COMPONENTS` always add up to the latency.
    """
    steps = run.tokens.groupby("step", sort=True, as_index=False).agg(
        phase=("phase", "first"),
        lanes=("sequence", "count"),
        tokens=("tokens", "sum"),
        start_s=("start_s", "min"),
        end_s=("end_s", "max"),
        head_s=("head_s", "max"),
    )
    steps["phase"] = steps["phase"].astype(int)
    steps["latency_s"] = steps["end_s"] - steps["start_s"]
    columns = [*LAYER_COMPONENTS, *OVERLAPPED, *COUNTS]
    sums = run.layers.groupby("step")[columns].sum().reindex(steps["step"], fill_value=0).reset_index(drop=True)
    steps = pd.concat([steps, sums], axis=1)
    steps["other_s"] = steps["latency_s"] - steps[[*LAYER_COMPONENTS, "head_s"]].sum(axis=1)
    return steps


def token_frame(run: RunResult, steps: pd.DataFrame | None = None) -> pd.DataFrame:
    """One row a decode token, (step, sequence), with the latency and the components of its step.

    Tokens of one lock-step batch share a step, and so its times. ``steps`` replaces the run's own step frame, as
    when each step is taken from the fastest of several repeats.
    """
    frame = step_frame(run) if steps is None else steps
    rows = run.tokens.loc[run.tokens["phase"] == Phase.DECODE, ["step", "sequence"]]
    times = frame[["step", "start_s", "end_s", "latency_s", *COMPONENTS, *OVERLAPPED]]
    return rows.merge(times, on="step", how="left", sort=False).reset_index(drop=True)


def layer_frame(run: RunResult, phase: Phase | None = Phase.DECODE) -> pd.DataFrame:
    """One row a layer: counts summed over the steps of ``phase`` (None: all), and ``hit_ratio`` by union."""
    layers = run.layers if phase is None else run.layers[run.layers["phase"] == phase]
    frame = layers.groupby("layer", sort=True, as_index=False)[list(COUNTS)].sum()
    frame["hit_ratio"] = frame["hits_union"] / frame["union"].replace(0, np.nan)
    return frame


def requests_frame(run: RunResult) -> pd.DataFrame:
    """The requests table with ``ttft_s``, ``latency_s`` and ``tpot_s``, the mean time per token after the first.

    ``tpot_s`` is not a number for a request of fewer than two new tokens.
    """
    frame = run.requests.copy()
    frame["ttft_s"] = frame["first_token_s"] - frame["arrival_s"]
    frame["latency_s"] = frame["end_s"] - frame["arrival_s"]
    later = (frame["new_tokens"] - 1).where(frame["new_tokens"] > 1)
    frame["tpot_s"] = (frame["end_s"] - frame["first_token_s"]) / later
    return frame


def fastest(frames: Sequence[pd.DataFrame]) -> pd.DataFrame:
    """The step frames of several repeats made one: each step is the whole row of the repeat that was fastest in it.

    A tie goes to the earlier repeat. Whole rows are kept, so the components still add up to the latency.
    """
    stacked = pd.concat(frames, ignore_index=True)
    best = stacked.groupby("step", sort=True)["latency_s"].idxmin()
    return stacked.loc[best].reset_index(drop=True)
