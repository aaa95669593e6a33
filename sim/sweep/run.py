"""A sweep from its grid to its table: what is known is used, what is not is run, and every outcome is kept at once."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from sim.scenario import Scenario
from sim.sweep.backends import Backend
from sim.sweep.check import check_some_run, check_values
from sim.sweep.fields import scenarios_of
from sim.sweep.grid import Grid
from sim.sweep.keys import key_of
from sim.sweep.point import Outcome, Task
from sim.sweep.store import check_out, opened


@dataclass(frozen=True)
class Sweep:
    """A grid whose values have all been checked: the scenario and the key of every point, in the order of the grid."""

    grid: Grid
    scenarios: list[Scenario]
    keys: list[str]

    @classmethod
    def of(cls, grid: Grid) -> Sweep:
        """Raises :class:`traces.errors.InputError` for a value that is wrong in any point."""
        scenarios = scenarios_of(grid.points(), grid.folder)
        check_values(scenarios)
        return cls(grid, scenarios, [key_of(scenario) for scenario in scenarios])

    def tasks(self, known: Mapping[str, Outcome]) -> list[Task]:
        """The runs that are left to do, each once."""
        todo = {key: scenario for key, scenario in zip(self.keys, self.scenarios, strict=True) if key not in known}
        return [Task(key, scenario) for key, scenario in todo.items()]

    def table(self, known: Mapping[str, Outcome]) -> pd.DataFrame:
        """A row for each point that has an outcome: its axes, status, figures; ``seconds`` is what the run took."""
        points = self.grid.points()
        done = [(point, known[key]) for point, key in zip(points, self.keys, strict=True) if key in known]
        columns: dict[str, Any] = {
            axis: _column([point[axis] for point, _ in done], values) for axis, values in self.grid.axes.items()
        }
        for name in ("status", "reason"):
            columns[name] = pd.Series([getattr(one, name) for _, one in done], dtype=str)
        for name in dict.fromkeys(name for _, one in done for name in one.figures):
            columns[name] = pd.Series([one.figures.get(name) for _, one in done], dtype="float64")
        for name in ("decode_s_by_group", "decode_tokens_by_group"):
            columns[name] = pd.Series([getattr(one, name) for _, one in done], dtype=object)
        columns["role"] = pd.Series([one.role for _, one in done], dtype=str)
        columns["synthetic"] = pd.Series([one.synthetic for _, one in done], dtype=bool)
        columns["notes"] = pd.Series([one.notes for _, one in done], dtype=str)
        columns["seconds"] = pd.Series([one.seconds for _, one in done], dtype="float64")
        columns["key"] = pd.Series([one.key for _, one in done], dtype=str)
        return pd.DataFrame(columns)


def _column(values: list[Any], axis: tuple[Any, ...]) -> Any:
    """The values of an axis as one type: numbers where all are, else words. ``axis`` decides, not the rows so far."""
    kinds = {type(value) for value in axis}
    if kinds <= {int, float}:
        return pd.Series(values, dtype="int64" if kinds == {int} else "float64")
    return pd.Series(values, dtype=bool) if kinds == {bool} else pd.Series([str(value) for value in values], dtype=str)


def run_sweep(
    grid: Grid,
    out: Path,
    backend: AbstractContextManager[Backend],
    *,
    resume: bool = False,
    begun: Callable[[int, int], None] = lambda known, todo: None,
    ended: Callable[[Outcome], None] = lambda outcome: None,
) -> pd.DataFrame:
    """Runs what ``out`` does not hold yet, and returns the table, which is also written there.

    The table is written, with what there is by then, when the sweep is interrupted, too. ``begun`` is told how many
    points are known and how many are to be run, ``ended`` each outcome. Raises :class:`traces.errors.InputError` for a
    wrong grid or folder, before anything is written.
    """
    check_out(out, grid, resume=resume)
    sweep = Sweep.of(grid)
    if not resume:
        check_some_run(sweep.scenarios)
    with backend as run_all, opened(out, grid, resume=resume) as store:
        known = store.outcomes(sweep.keys)
        tasks = sweep.tasks(known)
        begun(len(known), len(tasks))
        try:
            for outcome in run_all(tasks):
                store.add(outcome)
                known[outcome.key] = outcome
                ended(outcome)
        finally:
            table = sweep.table(known)
            store.write_table(table)
    return table
