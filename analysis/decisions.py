"""The first stage of a comparison: did both clocks decide the same, row for row and operation for operation?"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from analysis.frames import COUNTS
from sim.results import COLUMNS, RunInfo, RunResult

_KEYS = ["step", "layer"]


@dataclass(frozen=True)
class CountCheck:
    """One counting column of the layers table, compared exactly at every (step, layer)."""

    column: str
    measured: int
    simulated: int
    rows: int
    mismatching: int
    first: str

    @property
    def exact(self) -> bool:
        """Whether the column is equal in every row."""
        return self.mismatching == 0


@dataclass(frozen=True)
class OperationCheck:
    """The executed-operation logs, compared entry for entry. ``promised``: the mode says they are equal."""

    measured: int
    simulated: int
    mismatching: int
    promised: bool
    first: str

    @property
    def exact(self) -> bool:
        """Whether the logs have the same entries in the same order."""
        return self.mismatching == 0


@dataclass(frozen=True)
class Decisions:
    """All checks of the decision stage; ``operations`` is None unless both runs kept their log."""

    checks: tuple[CountCheck, ...]
    operations: OperationCheck | None

    @property
    def exact(self) -> bool:
        """Whether everything that is promised to be equal is equal."""
        logs = self.operations is None or self.operations.exact or not self.operations.promised
        return logs and all(check.exact for check in self.checks)

    @property
    def first_mismatch(self) -> str:
        """The first difference in words, empty when there is none."""
        found = [check.first for check in self.checks if check.first]
        return found[0] if found else (self.operations.first if self.operations else "")


def is_synchronous(info: RunInfo) -> bool:
    """Whether a run promises equal operation logs: ``synchronous`` is true, or ``mode`` says so, in its system."""
    return info.system.get("synchronous") is True or info.system.get("mode") == "synchronous"


def compare_decisions(measured: RunResult, simulated: RunResult) -> Decisions:
    """Compares the counting columns of the layers tables, and the operation logs where both runs have one."""
    merged = measured.layers[[*_KEYS, *COUNTS]].merge(
        simulated.layers[[*_KEYS, *COUNTS]], on=_KEYS, how="outer", suffixes=("_m", "_s"), indicator=True
    )
    return Decisions(
        checks=tuple(_count_check(merged, column) for column in COUNTS),
        operations=_operation_check(measured, simulated),
    )


def _count_check(merged: pd.DataFrame, column: str) -> CountCheck:
    ours, theirs = merged[f"{column}_m"], merged[f"{column}_s"]
    differs = (merged["_merge"] != "both") | (ours != theirs)
    first = merged[differs].head(1)
    return CountCheck(
        column=column,
        measured=int(ours.sum()),
        simulated=int(theirs.sum()),
        rows=len(merged),
        mismatching=int(differs.sum()),
        first="" if first.empty else _count_difference(first.iloc[0], column),
    )


def _count_difference(row: pd.Series, column: str) -> str:
    place = f"step {int(row['step'])}, layer {int(row['layer'])}"
    if row["_merge"] != "both":
        side = "measured" if row["_merge"] == "left_only" else "simulated"
        return f"{place}: only the {side} run has this row"
    return f"{place}: {column} is {int(row[f'{column}_m'])} measured, {int(row[f'{column}_s'])} simulated"


def _operation_check(measured: RunResult, simulated: RunResult) -> OperationCheck | None:
    ours, theirs = measured.operations, simulated.operations
    if ours.empty or theirs.empty:
        return None
    columns = list(COLUMNS["operations"])
    shared = min(len(ours), len(theirs))
    left, right = (table[columns].head(shared).reset_index(drop=True) for table in (ours, theirs))
    wrong = np.flatnonzero((left != right).any(axis=1).to_numpy(bool))
    first = ""
    if wrong.size:
        first = _operation_difference(int(wrong[0]), left.iloc[wrong[0]], right.iloc[wrong[0]])
    elif len(ours) != len(theirs):
        first = f"entry {shared}: the logs have {len(ours)} entries measured, {len(theirs)} simulated"
    return OperationCheck(
        measured=len(ours),
        simulated=len(theirs),
        mismatching=int(wrong.size) + abs(len(ours) - len(theirs)),
        promised=is_synchronous(measured.info) and is_synchronous(simulated.info),
        first=first,
    )


def _operation_difference(entry: int, left: Any, right: Any) -> str:
    names = [name for name in COLUMNS["operations"] if left[name] != right[name]]
    both = (" ".join(f"{name}={row[name]}" for name in names) for row in (left, right))
    return f"entry {entry} (step {left['step']}, layer {left['layer']}): {next(both)} measured, {next(both)} simulated"
