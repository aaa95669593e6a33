"""What ``moetwin cache`` shows and writes: rich tables, JSON Lines, and tables as files."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from inspect import getdoc
from pathlib import Path
from typing import Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.measure import Measurement
from rich.table import Table

from analysis import text
from analysis.cache_study import BOUND, Cell
from sim.policies.base import EvictionPolicy
from sim.printing import console_for
from sim.replay.settings import UNSIZED
from traces.paths import whole_file

WIDE = 170
"""Columns of a table that nobody sees in a terminal, so that it is not squeezed."""

TWO_RANKINGS = (
    "ranked by assignment (what tokens see); the gap is by union (what is loaded), and may rank policies otherwise"
)
"""What has to be told where a table or a plot holds both."""

TABLES = (".csv", ".parquet")


def console(*tables: Table) -> Console:
    """Where tables go, wide enough for ``tables``."""
    found = console_for(*tables)
    if not found.is_terminal:
        found.width = max(found.width, WIDE)
    return found


def replay_table(cells: Sequence[Cell], *, bound: bool, phases: bool, wide: bool = True) -> Table:
    """One line a policy, capacity and phase; ``bound`` says whether Belady is one, ``phases`` whether to name them.

    Without ``wide`` it leaves out what a narrow terminal has no room for.
    """
    table = Table(box=None, pad_edge=False, header_style="bold")
    for name in ("policy", "capacity", "phase")[: 3 if phases else 2]:
        table.add_column(name, vertical="bottom", no_wrap=name != "policy")
    for name in _NARROW + (_WIDE if wide else ()):
        table.add_column(name, justify="right", no_wrap=True)
    for place, cell in enumerate(cells):
        if place:
            table.add_row()
        for row in sorted(cell.rows, key=lambda row: -row["hit_ratio_assignments"]):
            names = [_policy(row["policy"], bound=bound), row["capacity"], row["phase"]][: 3 if phases else 2]
            table.add_row(*names, *_narrow(row), *(_wide(row) if wide else ()))
    return table


_NARROW = (
    *("hit ratio by\nassignment", "\n95% interval", "hit ratio\nby union"),
    *("gap closed\nby union", "union\nmisses", "bytes\na token"),
)
_WIDE = ("compulsory\nmisses", "capacity\nmisses", "collision\nmisses", "\nregime", "accesses\na second")


def _policy(name: str, *, bound: bool) -> str:
    return f"{name}, hit-rate bound" if name == BOUND and bound else escape(name)


def _narrow(row: dict[str, Any]) -> list[str]:
    low, high, gap = row["hit_ratio_assignments_low"], row["hit_ratio_assignments_high"], row["gap_closed"]
    return [
        ratio(row["hit_ratio_assignments"]),
        text.MISSING if low is None else f"{low:.4f} to {high:.4f}",
        ratio(row["hit_ratio_union"]),
        text.MISSING if gap is None else text.percent(gap),
        f"{row['misses_union']:,}",
        text.MISSING if row["bytes_a_token"] is None else text.binary_bytes(row["bytes_a_token"]),
    ]


def _wide(row: dict[str, Any]) -> list[str]:
    return [
        *(f"{row[key]:,}" for key in ("compulsory_misses", "capacity_misses", "collision_misses")),
        f"{row['regime_mean']:.2f}",
        f"{text.number(row['accesses_per_s'] / 1e6)} M",
    ]


def print_replays(cells: Sequence[Cell], *, title: str, bound: bool, phases: bool) -> None:
    """The title, the table in the width that there is, and the sentences below it."""
    out = console()
    table = replay_table(cells, bound=bound, phases=phases)
    if Measurement.get(out, out.options.update(max_width=10_000), table).maximum > out.width:
        table = replay_table(cells, bound=bound, phases=phases, wide=False)
    print_lines(out, title)
    console(table).print(table)
    print_lines(out, "", *verdicts(cells, bound=bound))


def print_lines(out: Console, *lines: str) -> None:
    """Lines as they are, however long."""
    for line in lines:
        out.print(line, markup=False, soft_wrap=True)


def ratio(value: float | None) -> str:
    """A hit ratio with four decimals, or a dash."""
    return text.MISSING if value is None else f"{value:.4f}"


def verdicts(cells: Sequence[Cell], *, bound: bool) -> list[str]:
    """The sentences below the table: who is best, who cannot be told from it, and what to beware of."""
    lines = [
        f"{_where(cell.rows[0])}: {line}" for tell in (_verdict, _regime) for cell in cells if (line := tell(cell))
    ]
    lines += dict.fromkeys(cell.caveat for cell in cells if cell.caveat)
    rows = [row for cell in cells for row in cell.rows]
    if any(len(cell.rows) > 2 and cell.rows[0]["gap_closed"] is not None for cell in cells):
        lines.append(TWO_RANKINGS)
    if rows[0]["bytes_a_token"] is None:
        lines.append(f"{text.MISSING} for bytes{UNSIZED}")
    if not bound and any(row["policy"] == BOUND for row in rows):
        lines.append(f"{BOUND} bounds nothing here, for experts differ in bytes")
    if bound and any(_passed(cell) for cell in cells):
        lines.append(
            f"{BOUND} bounds the hits by union over all passes: by assignment, or in one phase, others may hit more"
        )
    loads = {(row["policy"], row["capacity"]): row["static_load_bytes"] for row in rows if row["static_load_bytes"]}
    for (policy, capacity), size in loads.items():
        lines.append(
            f"{policy} at {capacity}: {text.binary_bytes(size)} loaded before the first pass, beside its misses"
        )
    return lines


def _passed(cell: Cell) -> bool:
    """Whether a policy hits more assignments than Belady."""
    ratios = {row["policy"]: row["hit_ratio_assignments"] for row in cell.rows}
    return BOUND in ratios and max(ratios.values()) > ratios[BOUND]


def _where(row: dict[str, Any]) -> str:
    return str(row["capacity"] if row["phase"] == "all" else f"{row['capacity']}, {row['phase']}")


def _regime(cell: Cell) -> str:
    mean, above = cell.rows[0]["regime_mean"], cell.rows[0]["regime_above_one"]
    return f"regime (union over capacity) {mean:.2f} on average, above 1 in {text.percent(above)} of the events"


def _verdict(cell: Cell) -> str:
    """Who is best, and who cannot be told from it; nothing where there is nobody to compare with."""
    if cell.best is None or not cell.rivals:
        return ""
    best = f"best by assignment without knowing the future: {cell.best}"
    if cell.rows[0]["hit_ratio_assignments_low"] is None:
        return best
    if not cell.alike:
        return f"{best}; all others are distinguishable from it"
    return f"{best}; not distinguishable from it: {', '.join(cell.alike)}"


def echo_rows(rows: Iterable[dict[str, Any]]) -> None:
    """Prints JSON Lines."""
    for row in rows:
        typer.echo(json.dumps(row, allow_nan=False))


def write_rows(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """Writes ``rows`` as a CSV or Parquet table, by the ending of ``path``; constants of policies become JSON."""
    import pandas as pd

    frame = pd.DataFrame([_flat(row) for row in rows])
    with whole_file(path) as draft:
        if path.suffix == ".csv":
            frame.to_csv(draft, index=False)
        else:
            frame.to_parquet(draft, index=False)


def _flat(row: dict[str, Any]) -> dict[str, Any]:
    return {name: json.dumps(value) if isinstance(value, dict) else value for name, value in row.items()}


def curve_table(columns: dict[str, dict[str, float]], policies: Sequence[str], *, bound: bool) -> Table:
    """Hit ratios by assignment: one line a policy, one column a capacity; ``bound`` says whether Belady is one."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("hit ratio by assignment")
    for label in columns:
        table.add_column(label, justify="right")
    for policy in policies:
        table.add_row(_policy(policy, bound=bound), *(ratio(found[policy]) for found in columns.values()))
    return table


def policy_row(name: str, kind: type[EvictionPolicy]) -> dict[str, Any]:
    """One registered policy as its class tells it, ready for JSON."""
    words = " ".join((getdoc(kind) or "").replace("``", "").split())
    source = re.search(r"Sources?: (.*?)\.( |$)", words)
    return {
        "policy": name,
        "summary": words.partition(". ")[0].rstrip("."),
        "needs": sorted(kind.needs),
        "options": dict(kind.defaults),
        "source": source[1].replace("*", "") if source else "",
    }


def policy_table(rows: Iterable[dict[str, Any]]) -> Table:
    """The registered policies, one a line."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("policy", no_wrap=True)
    for name in ("what it does", "needs", "constants", "source"):
        table.add_column(name, overflow="fold")
    for row in rows:
        constants = ", ".join(f"{name}={value}" for name, value in row["options"].items())
        cells = (row["policy"], row["summary"], ", ".join(row["needs"]), constants, row["source"])
        table.add_row(*map(escape, cells))
    return table


def print_locality(record: dict[str, Any], name: str) -> None:
    """The verdict, and the numbers that it rests on; ``name`` is that of the model and the trace."""
    parts = (_overlaps(record), _segments(record), _sizes(record), _orders(record))
    out = console(*(table for _, table in parts))
    print_lines(out, f"{name}: {record['tokens']:,} tokens of {record['sequences']:,} sequences")
    out.print(record["verdict"]["sentence"], markup=False, soft_wrap=True)
    for title, table in parts:
        print_lines(out, "", title)
        out.print(table)


def _numbers(*columns: str) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold")
    for name in columns:
        table.add_column(name, justify="right", vertical="bottom")
    return table


def _overlaps(record: dict[str, Any]) -> tuple[str, Table]:
    overlap = record["overlap"]
    table = _numbers("any two", "chance", *map("lag {}".format, _LAGS))
    lags = {entry["lag"]: entry["mean"] for entry in overlap["lags"]}
    table.add_row(*map(ratio, (overlap["popularity"]["mean"], overlap["chance"], *(lags[lag] for lag in _LAGS))))
    return "share of a token's experts that another token has too", table


_LAGS = (1, 2, 4, 8, 16, 32, 64)


def _segments(record: dict[str, Any]) -> tuple[str, Table]:
    """SRP by window, with SCH at the capacities of the last table."""
    slots = [entry["capacity_slots"] for entry in record["lru"]]
    table = _numbers(
        "window",
        "SRP",
        "95% interval",
        "cache size\n/ active",
        *(f"SCH with\n{count} slots" for count in slots),
    )
    held = {(entry["window"], entry["capacity_slots"]): entry["mean"] for entry in record["sch"]}
    for entry in record["srp"]:
        interval = text.MISSING if entry["low"] is None else f"{entry['low']:.4f} to {entry['high']:.4f}"
        size = text.number(entry["cache_size"]) if entry["cache_size"] is not None else text.MISSING
        oracle = (ratio(held[entry["window"], count]) for count in slots)
        table.add_row(str(entry["window"]), ratio(entry["srp"]), interval, size, *oracle)
    return "best fixed set (SRP), and hits of an oracle (SCH), by window in tokens", table


def _sizes(record: dict[str, Any]) -> tuple[str, Table]:
    """Distinct experts by window and by batch, beside what uniform routing would need."""
    table = _numbers("tokens", "in a window", "in a batch", "if uniform")
    batches = {entry["batch"]: entry["mean"] for entry in record["batch_union"]}
    for entry in record["working_set"]:
        found = (entry["mean"], batches.get(entry["window"]), entry["uniform"])
        if found[:2] == (None, None):
            continue
        table.add_row(str(entry["window"]), *(text.MISSING if n is None else f"{n:.1f}" for n in found))
    return "distinct experts a layer", table


def _orders(record: dict[str, Any]) -> tuple[str, Table]:
    table = _numbers("slots a layer", "as recorded", "shuffled", "order gives")
    for entry in record["lru"]:
        values = (entry["hit_ratio"], entry["hit_ratio_shuffled"], entry["order_gain"])
        table.add_row(f"{entry['capacity_slots']} ({entry['capacity_share']:.1%})", *map(ratio, values))
    return f"hit ratio by assignment of LRU, one token a pass, {record['contract']} contract", table
