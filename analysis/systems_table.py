"""Systems side by side as a person reads them: one row each, and the sentences below."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rich.console import ConsoleRenderable, Group
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from analysis import text

SHOWN = ("gpu", "cpu", "link")
"""Resources that have a column whether or not they were busy."""
BEYOND = {
    "bound_with_dense_on_cpu": "dense work on the CPU",
    "bound_with_deferral": "experts that join the next layer",
}
"""What sets a bound below that of most systems: fields of a record, in words."""
LEAST_BUSY = 0.01
"""Share of the time from which on another resource has one."""


def systems_table(records: Sequence[dict[str, Any]], title: str = "") -> Group:
    """Two tables with one row a record of :func:`analysis.systems.side_by_side`, the quickest first: times, and what
    they come from. The ``title`` above them says what was run on what."""
    named: list[ConsoleRenderable | str] = [Text(title, style="italic"), ""] if title else []
    return Group(*named, _times(ranked(records)), "", _causes(ranked(records)))


def _table(*columns: str) -> Table:
    table = Table(box=None, pad_edge=False, padding=(0, 1, 0, 0), header_style="bold")
    table.add_column("system", vertical="bottom", no_wrap=True)
    for name in columns:
        table.add_column(name, justify="right", vertical="bottom", no_wrap=True)
    return table


def _times(records: Sequence[dict[str, Any]]) -> Table:
    table = _table(
        *("tokens\na second", "ms a\ntoken", "95%\ninterval", "p50\nms", "p99\nms", "1st token\nms", "above\nbound")
    )
    for record in records:
        low, high = record["token_low_s"], record["token_high_s"]
        table.add_row(
            _name(record),
            text.number(_number(record["tokens_per_s"])),
            text.number(_ms(record["token_s"])),
            text.MISSING if low is None else f"{text.number(_ms(low))} to {text.number(_ms(high))}",
            text.number(_ms(record["time_per_output_token_p50_s"])),
            text.number(_ms(record["time_per_output_token_p99_s"])),
            text.number(_ms(record["time_to_first_token_p50_s"])),
            text.percent(_number(record["regret"]), signed=True),
        )
    return table


def _causes(records: Sequence[dict[str, Any]]) -> Table:
    others = {name for one in records for name, share in one["busy"].items() if (share or 0.0) >= LEAST_BUSY}
    busy = [*SHOWN, *sorted(others - {*SHOWN, "host"}), "host"]
    batched = any(one["hit_ratio_union"] != one["hit_ratio_assignments"] for one in records)
    hits = {"hits by\nunion": "hit_ratio_union"} if batched else {"\nhits": "hit_ratio_union"}
    if batched:
        hits["hits by\nassignm."] = "hit_ratio_assignments"
    table = _table(*hits, "copied\na token", *[f"{name}\nbusy" for name in busy], "\nstall", "bound\nby")
    for record in records:
        table.add_row(
            _name(record),
            *[text.percent(_number(record[one])) for one in hits.values()],
            text.binary_bytes(_number(copied(record))),
            *[text.percent(_number(record["busy"].get(one, 0.0))) for one in busy],
            text.percent(_number(record["stall_share"])),
            record["binding"] or text.MISSING,
        )
    return table


def _name(record: dict[str, Any]) -> str:
    return escape(label(record))


def label(record: dict[str, Any]) -> str:
    """The system's name, with what sets it apart from those that compete."""
    return str(record["system"]) if record["role"] == "system" else f"{record['system']} ({record['role']})"


def copied(record: dict[str, Any]) -> float | None:
    """Bytes copied a token; without those of prefetches where the run has not kept them."""
    size = record["bytes_per_token"]
    found: float | None = record["demand_bytes_per_token"] if size is None else size
    return found


def ranked(records: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The records by the mean time of a decode token, those without one last; equals in the order given."""
    return sorted(records, key=lambda record: (record["token_s"] is None, record["token_s"] or 0.0))


def verdicts(records: Sequence[dict[str, Any]]) -> list[str]:
    """The sentences below the table: what all were given, who is quickest, who cannot be told from it, the bound."""
    lines = [_memory(records), _best(records), _bound(records)]
    return [*[line for line in lines if line], *dict.fromkeys(one["caveat"] for one in records if one["caveat"])]


def _memory(records: Sequence[dict[str, Any]]) -> str:
    """What every system was given, and who stands outside, or uses less."""
    given = [one for one in records if one["role"] != "no limit" and one["fills_budget"]]
    if not given:
        return ""
    experts, size = given[0]["resident_experts"], given[0]["gpu_bytes"]
    others = [
        f"{one['system']} holds {format(one['resident_experts'], ',') if one['resident_experts'] else 'none'}"
        + (f" in {text.binary_bytes(one['gpu_bytes'])}" if one["resident_experts"] == experts else "")
        for one in records
        if (one["resident_experts"], one["gpu_bytes"]) != (experts, size)
    ]
    line = (
        f"equal for all: {text.binary_bytes(given[0]['gpu_bytes'])} of GPU memory, room for "
        f"{given[0]['resident_experts']:,} experts"
    )
    return f"{line}; but {', '.join(others)}" if others else line


def _best(records: Sequence[dict[str, Any]]) -> str:
    best = next((one for one in records if one["best"]), None)
    if best is None or best["token_s"] is None:
        return ""
    rivals = [one for one in records if one["role"] == "system" and one is not best]
    line = f"quickest without knowing the future: {best['system']}"
    if not rivals or rivals[0]["not_distinguishable_from_best"] is None:
        return line
    alike = [one["system"] for one in ranked(rivals) if one["not_distinguishable_from_best"]]
    told = f"not distinguishable from it: {', '.join(alike)}" if alike else "all others are distinguishable from it"
    return f"{line}; {told}"


def _bound(records: Sequence[dict[str, Any]]) -> str:
    """The bound of what competes, by what its systems may do beyond the others; the ceiling has its own."""
    least: dict[str, dict[str, Any]] = {}
    for one in records:
        if one["role"] == "no limit" or one["bound_token_s"] is None:
            continue
        kind = " and ".join(words for field, words in BEYOND.items() if one[field])
        least[kind] = min(least.get(kind, one), one, key=lambda record: float(record["bound_token_s"]))
    if not least:
        return ""
    told = {kind: f"{text.number(_ms(one['bound_token_s']))} ms a token" for kind, one in sorted(least.items())}
    first, *others = told
    why = "copies" if least[first]["bound_by"] == "link" else "host, GPU and CPU"
    line = f"no system {f'with {first} ' if first else ''}can take less than {told[first]} here, for its {why}"
    return "; ".join([line, *(f"with {kind}, {told[kind]}" for kind in others)])


def _number(value: float | None) -> float:
    return float("nan") if value is None else value


def _ms(value: float | None) -> float:
    return _number(value) * 1e3
