"""Tables of sweeps made by hand, and what is shown of them."""

from __future__ import annotations

from itertools import product
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import tomli_w
from matplotlib.figure import Figure

from analysis.sweep_commands import plot
from analysis.sweep_table import Shown, SweepTable, View, shown

LINK = "hardware.link_gb_per_s"
LINKS = [4, 8, 16, 32]
RATES = {"cpu": [10.0] * 4, "same": [10.0] * 4, "link": [4.0, 8.0, 12.0, 16.0]}
BASE = {"trace": "mixed", "cache": "25%"}


GROUPS = 20
"""Groups of sequences, of 10 tokens each, in every row."""


def by_group(row: dict[str, Any]) -> dict[str, Any]:
    """Decode seconds and tokens by group that make the row's rate, the same in every group."""
    rate = row.get("tokens_per_s")
    return {"decode_s_by_group": [10 / rate] * GROUPS, "decode_tokens_by_group": [10] * GROUPS} if rate else {}


def stored(folder: Path, axes: dict[str, list[Any]], rows: list[dict[str, Any]]) -> Path:
    """A folder of a sweep over ``axes``, whose rows have these fields beside those of their axes."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = [{"synthetic": False, "notes": "", "role": "system", **by_group(row), **row} for row in rows]
    (folder / "sweep.toml").write_text(tomli_w.dumps({"base": BASE, "axes": axes}))
    points = [dict(zip(axes, values, strict=True)) for values in product(*axes.values())]
    table = pd.DataFrame([{**at, "status": "ok", "reason": "", **row} for at, row in zip(points, rows, strict=True)])
    table.assign(key="k", seconds=1.0).to_parquet(folder / "sweep.parquet")
    return folder


def by_link(folder: Path) -> Path:
    """Three systems over four links: two that do not care, and one that wins above 8 sqrt 2."""
    rows = [
        {"tokens_per_s": rate, "gpu_bytes": 1e9 + place * 1e8, "stall_share": 0.5, "misses": 10.0 * (place + 1)}
        for place, rates in enumerate(RATES.values())
        for rate in rates
    ]
    return stored(folder, {"system": [*RATES], "hardware.link_gb_per_s": LINKS}, rows)


def by_numbers(folder: Path) -> Path:
    """Two axes of numbers, one of them in per cent and not in order; one point was refused."""
    rows: list[dict[str, Any]] = [
        {"tokens_per_s": float(share * link), "gpu_bytes": share * 1e7} for share in (50, 25) for link in LINKS
    ]
    rows[5] = {"status": "refused", "reason": "no room", "tokens_per_s": None, "gpu_bytes": None}
    return stored(folder, {"cache": ["50%", "25%"], "hardware.link_gb_per_s": LINKS}, rows)


def view(folder: Path, **asked: Any) -> Shown:
    return shown(SweepTable.load(folder), View(**asked))


def words_of(figure: Figure) -> list[str]:
    return [text.get_text() for ax in figure.axes for text in ax.texts]


def told(capsys: pytest.CaptureFixture[str], folder: Path, out: Path | None = None, **asked: Any) -> list[str]:
    as_json = asked.pop("as_json", False)
    plot(folder, View(**asked), out=out, as_json=as_json, force=False)
    return capsys.readouterr().out.splitlines()
