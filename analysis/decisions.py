"""The first stage of a comparison: did both clocks decide the same, row for row and operation for operation?"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from analysis.frames import COUNTS
from sim.results import COLUMNS, RunInfo, RunResult

ROUTED = ("assignments", "union")
"""Counts that follow from the routing alone: no clock and no arrival can change them."""

_KEYS = ["step", "layer"]


@dataclass(frozen=True)
class CountCheck:
    """One counting column of the layers table, compared exactly at every (step, layer).

    ``measured`` and ``simulated`` are totals. ``promised``: the column must be equal, in every measured repeat; then
    ``mismatching`` counts the rows in which any of the repeats differs. Otherwise only the first one is compared.
    """

    column: str
    measured: int
    simulated: int
    rows: int
    mismatching: int
    promised: bool
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
    """All checks of the decision stage; ``operations`` is None unless both runs kept their log.

    ``promised``: all counts must be equal. Otherwise only those of :data:`ROUTED` must, since arrival times decide what
    was resident.
    """

    checks: tuple[CountCheck, ...]
    operations: OperationCheck | None
    promised: bool

    @property
    def exact(self) -> bool:
        """Whether everything that is promised to be equal is equal."""
        return all(check.exact or not check.promised for check in self._all())

    @property
    def equal(self) -> bool:
        """Whether everything is equal, promised or not."""
        return all(check.exact for check in self._all())

    @property
    def first_mismatch(self) -> str:
        """The first difference in words, one that breaks a promise before any other; empty when there is none."""
        found = sorted((check for check in self._all() if check.first), key=lambda check: not check.promised)
        return found[0].first if found else ""

    def _all(self) -> list[CountCheck | OperationCheck]:
        return [*self.checks, *([] if self.operations is None else [self.operations])]


def is_synchronous(info: RunInfo) -> bool:
    """Whether a run promises equal operation logs: ``synchronous`` is true in its system."""
    return info.system.get("synchronous") is True


def promises_counts(info: RunInfo) -> bool:
    """Whether a run promises equal counts: it is synchronous, or its system names no prefetch."""
    return is_synchronous(info) or info.system.get("prefetch", "none") == "none"


def compare_decisions(measured: RunResult, simulated: RunResult, repeats: Sequence[RunResult] = ()) -> Decisions:
    """Compares the counting columns of the layers tables, and the operation logs where both runs have one.

    ``repeats`` are further measured runs of the same work: what is promised must be equal in their counts as well.
    """
    merged = pd.concat([_merged(run, simulated, number) for number, run in enumerate([measured, *repeats])])
    promised = promises_counts(measured.info) and promises_counts(simulated.info)
    return Decisions(
        checks=tuple(_count_check(merged, column, promised or column in ROUTED) for column in COUNTS),
        operations=_operation_check(measured, simulated),
        promised=promised,
    )


def _merged(measured: RunResult, simulated: RunResult, repeat: int) -> pd.DataFrame:
    tables = [run.layers[[*_KEYS, *COUNTS]] for run in (measured, simulated)]
    merged = tables[0].merge(tables[1], on=_KEYS, how="outer", suffixes=("_m", "_s"), indicator=True)
    return merged.assign(repeat=repeat)


def _count_check(merged: pd.DataFrame, column: str, promised: bool) -> CountCheck:
    once = merged[merged["repeat"] == 0]
    compared = merged if promised else once
    wrong = compared[(compared["_merge"] != "both") | (compared[f"{column}_m"] != compared[f"{column}_s"])]
    return CountCheck(
        column=column,
        measured=int(once[f"{column}_m"].sum()),
        simulated=int(once[f"{column}_s"].sum()),
        rows=len(compared[_KEYS].drop_duplicates()),
        mismatching=len(wrong[_KEYS].drop_duplicates()),
        promised=promised,
        first="" if wrong.empty else _count_difference(wrong.iloc[0], column),
    )


def _count_difference(row: pd.Series, column: str) -> str:
    place = f"step {int(row['step'])}, layer {int(row['layer'])}"
    place += f", repeat {int(row['repeat']) + 1}" if row["repeat"] else ""
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
