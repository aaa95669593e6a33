"""From measured runs to the numbers of a profile: pure arithmetic on result tables.

Every step is judged by its best repeat, as measured points are, and a profile's numbers are medians over such steps.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pandas as pd
from scipy.optimize import nnls

from sim.results import RunResult
from sim.spec import HostSpec
from sim.spec.profile import DensePoint, Point
from traces.schema import Phase

RESOURCES = ("gpu", "link", "cpu")
ALONE, ENOUGH = 0.05, 8
"""A piece ran alone up to this share of overlap; fewer pieces tell nothing."""
MOST_GAP_S = 50e-6
TURNS, CLOSE = 30, 1e-6
"""Turns of a robust fit, and the share of the median value below which deviations all count the same."""

Floats = npt.NDArray[np.float64]
Repeats = Sequence[RunResult]


def step_latencies(repeats: Repeats) -> pd.DataFrame:
    """Seconds of every step (rows) in every repeat (columns) of the same work."""
    frames = [run.tokens.groupby("step")[["start_s", "end_s"]].first() for run in repeats]
    return pd.concat([frame.end_s - frame.start_s for frame in frames], axis=1, ignore_index=True)


def best_rows(repeats: Repeats, tables: Sequence[pd.DataFrame]) -> pd.DataFrame:
    """From one table a repeat, the rows of each step out of the repeat in which that step was fastest."""
    best = step_latencies(repeats).idxmin(axis=1)
    return pd.concat([table[table.step.map(best) == repeat] for repeat, table in enumerate(tables)])


def token_s(repeats: Repeats) -> float:
    """Mean seconds of a decode step in its best repeat; nan when there is none."""
    first = repeats[0].tokens
    decode = first[first.phase == int(Phase.DECODE)].step.unique()
    return float(step_latencies(repeats).min(axis=1).loc[decode].mean())


def pieces(run: RunResult) -> pd.DataFrame:
    """Copies and experts of a run: seconds, tokens, and the seconds during which each other resource was busy.

    What a lane takes to go from one piece of a layer to the next, which is less than :data:`MOST_GAP_S`, is counted
    with the next piece; a longer gap was spent waiting.
    """
    events = run.events[run.events.resource.isin(RESOURCES)]
    tokens = run.operations[run.operations.op != "copy"].set_index(["step", "layer", "expert"]).tokens
    covers = {name: _cover(events[events.resource == name]) for name in RESOURCES}
    rows = events[events.kind.isin(("expert", "copy"))].sort_values("start_s").copy()
    before_s = rows.start_s - rows.groupby(["resource", "step", "layer"]).end_s.shift()
    rows["start_s"] -= before_s.where(before_s.between(0.0, MOST_GAP_S), 0.0)  # nan where nothing came before
    rows["seconds"] = rows.end_s - rows.start_s
    for name, (times, busy_s) in covers.items():
        inside = np.interp(rows.end_s, times, busy_s) - np.interp(rows.start_s, times, busy_s)
        rows[f"beside_{name}"] = np.where(rows.resource == name, 0.0, inside)
    tokens = tokens[~tokens.index.duplicated()]
    rows["tokens"] = tokens.reindex(pd.MultiIndex.from_frame(rows[["step", "layer", "expert"]])).to_numpy()
    rows["first"] = ~rows.duplicated(["resource", "step", "layer"])
    return rows


@dataclass(frozen=True)
class Fit:
    """Seconds of an undisturbed piece of work, and those of all pieces."""

    base_s: float
    seconds: Floats

    def point(self, size: int) -> Point:
        """The undisturbed seconds as a point of a profile, with the spread of all pieces beside it."""
        return Point(
            size=size,
            value_s=self.base_s,
            median_s=float(np.median(self.seconds)),
            p90_s=float(np.quantile(self.seconds, 0.9)),
            repeats=len(self.seconds),
        )


def fit(rows: pd.DataFrame, otherwise: Point) -> Fit:
    """Undisturbed seconds, from pieces that ran alone; of few such ones, the tenth percentile of all.

    Without rows it is the point ``otherwise``.
    """
    if rows.empty:
        return Fit(otherwise.value_s, np.array([otherwise.median_s]))
    seconds = rows.seconds.to_numpy(float)
    shared = sum(rows[f"beside_{name}"].to_numpy(float) for name in RESOURCES) / seconds
    alone = seconds[shared <= ALONE]
    return Fit(float(np.median(alone)) if len(alone) >= ENOUGH else float(np.quantile(seconds, 0.1)), seconds)


def _factors(terms: Floats, values: Floats) -> list[float]:
    """Factors, none below 0, with which ``terms`` [N, F] add up to ``values`` [N] with the least absolute deviations,
    which do not follow outliers; 0 for a term that fewer than :data:`ENOUGH` of the rows have.

    Least squares over and over, each row weighing as much less as the turn before left it farther off.
    """
    factors, known = np.zeros(terms.shape[1]), (terms > 0).sum(axis=0) >= ENOUGH
    if not known.any():
        return factors.tolist()
    scale = max(float(np.median(np.abs(values))), 1e-12)
    weights = np.ones(len(values))
    for _ in range(TURNS):
        factors[known] = nnls(terms[:, known] * weights[:, None], values * weights)[0]
        weights = 1.0 / np.sqrt(np.maximum(np.abs(values - terms @ factors), CLOSE * scale))
    return [float(factor) for factor in factors]


def shifted(points: Sequence[Point], base: Fit) -> tuple[Point, ...]:
    """Measured sizes, moved so that the first one takes what it took within runs; seconds never fall with the size."""
    moved: list[Point] = []
    for point in points:
        shift_s = max(base.base_s - points[0].value_s, (moved[-1].value_s if moved else 0.0) - point.value_s)
        seconds = {name: max(0.0, getattr(point, name) + shift_s) for name in ("value_s", "median_s", "p90_s")}
        moved.append(point.model_copy(update=seconds))
    return tuple(moved)


def dense(workloads: Sequence[Repeats]) -> tuple[DensePoint, ...]:
    """For every number of tokens in a step, the mean seconds of a layer's dense part as a line over the context."""
    steps = pd.concat([_dense_steps(repeats) for repeats in workloads])
    return tuple(_dense_point(int(str(tokens)), group) for tokens, group in steps.groupby("tokens"))


def head(workloads: Sequence[Repeats]) -> tuple[Point, ...]:
    """Seconds outside the layers, by the number of lanes."""
    rows = pd.concat(
        [best_rows(repeats, [run.tokens for run in repeats]) for repeats in workloads], keys=range(len(workloads))
    )
    steps = rows.reset_index(level=0, names="workload").groupby(["workload", "step"]).agg(
        lanes=("head_s", "size"), seconds=("head_s", "first")
    )  # fmt: skip
    points: list[Point] = []
    for lanes, group in steps.groupby("lanes").seconds:
        middle_s = float(group.median())
        value_s = max(middle_s, points[-1].value_s if points else 0.0)
        p90_s = float(group.quantile(0.9))
        points.append(Point(size=int(str(lanes)), value_s=value_s, median_s=middle_s, p90_s=p90_s, repeats=len(group)))
    return tuple(points)


def host(workloads: Sequence[Repeats], joins_layers: bool) -> HostSpec:
    """What the controller costs, as a line over the operations of decode layers, and waking up at a layer's end; both
    with what is added where the CPU computes."""
    rows = pd.concat([best_rows(repeats, [_host_rows(run) for run in repeats]) for repeats in workloads])
    counts, on_cpu = rows.operations.to_numpy(float), rows.on_cpu.to_numpy(float)
    before = _factors(np.column_stack([np.ones(len(rows)), counts, on_cpu]), rows.before_s.to_numpy(float))
    after_s = max(0.0, float(rows.after_s[~rows.on_cpu].median()))
    later_s = float(rows.after_s[rows.on_cpu].median()) if rows.on_cpu.sum() >= ENOUGH else after_s
    return HostSpec(
        source="measured in calibration runs",
        layer_s=0.0,
        readback_s=0.0,
        controller_s=before[0],
        operation_s=before[1],
        cpu_s=before[2],
        join_s=after_s,
        cpu_join_s=max(0.0, later_s - after_s),
        joins_layers=joins_layers,
    )


def _cover(events: pd.DataFrame) -> tuple[Floats, Floats]:
    """Seconds that a resource has been busy, as a piecewise linear function of time: its corners."""
    ordered = events.sort_values("start_s")
    starts, ends = ordered.start_s.to_numpy(float), ordered.end_s.to_numpy(float)
    busy_s = np.concatenate([[0.0], np.cumsum(ends - starts)])
    times = np.column_stack([starts, ends]).ravel()
    return np.append(times, np.inf), np.append(np.column_stack([busy_s[:-1], busy_s[1:]]).ravel(), busy_s[-1])


def _dense_steps(repeats: Repeats) -> pd.DataFrame:
    layers = best_rows(repeats, [run.layers for run in repeats]).groupby("step").dense_s.mean()
    rows = repeats[0].tokens
    context = rows.groupby("sequence").tokens.cumsum().groupby(rows.step).max()
    return pd.DataFrame({"tokens": rows.groupby("step").tokens.sum(), "context": context, "seconds": layers})


def _dense_point(tokens: int, steps: pd.DataFrame) -> DensePoint:
    contexts, seconds = steps.context.to_numpy(float), steps.seconds.to_numpy(float)
    slope = max(0.0, float(np.polyfit(contexts, seconds, 1)[0])) if steps.context.nunique() > 2 else 0.0
    return DensePoint(
        tokens=tokens,
        base_s=max(0.0, float(np.median(seconds - slope * contexts))),
        per_context_s=slope,
        least_context=int(contexts.min()),
        most_context=int(contexts.max()),
        p90_s=float(np.quantile(seconds, 0.9)),
        repeats=len(steps),
    )


def _host_rows(run: RunResult) -> pd.DataFrame:
    """Decode layers of a run: their operations, and the host's seconds before their work begins and after it ends."""
    keys = ["step", "layer"]
    layers = run.layers[run.layers.phase == int(Phase.DECODE)].set_index(keys)
    plans = run.events[run.events.kind == "plan"].set_index(keys)
    before_s = (plans.end_s - plans.start_s).reindex(layers.index)
    counts = run.operations.groupby(keys).size().reindex(layers.index, fill_value=0)
    after_s, on_cpu = layers.host_s - before_s, layers.cpu_experts > 0
    rows = pd.DataFrame({"operations": counts, "before_s": before_s, "after_s": after_s, "on_cpu": on_cpu})
    return rows.reset_index()
