"""The summary of the suite of the GPU: what its steps left, beside what the project asks of it.

Imports nothing beyond the standard library but the bars, which need nothing else, as the suite itself.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from statistics import median
from typing import Any

from analysis.bars import BARS, SHARES, asked, holds

LABELS = {
    "median": "median error of a token",
    "p90": "90th percentile of the error",
    "skill": "skill",
    "kendall_tau": "Kendall's tau",
}
"""Figures of a validation by their key, as they are called."""
NOTHING_TESTED = "nothing tested"
LINK, PYTHON_US, MEMORY, HOST = 0.9, 150.0, 0.02, 1.1


def collect(work: Path, done: Mapping[str, Any], left_out: list[str]) -> dict[str, Any]:
    """Everything that the steps printed or wrote as figures, by step, with how each one ended."""
    machine = _json(work / "machine.json")
    figures = {name: found for name in done if (found := figures_of(work / name)) is not None}
    tests = tested(work / "tests")
    return {"machine": machine, "steps": dict(done), "tests": tests, "figures": figures, "left_out": left_out}


def figures_of(folder: Path) -> Any:
    """The figures of a step: the file that it kept, or what it printed; None where it has none."""
    kept = _json(folder / "figures.json")
    return kept if kept is not None else _json(folder / "stdout.txt")


def unfinished(folder: Path) -> bool:
    """Whether a validation ended in good order, but with runs that are still missing, or with none to judge."""
    if not folder.name.startswith("validate-"):
        return False
    figures = figures_of(folder)
    return figures is None or not figures.get("complete", True)


def tested(folder: Path) -> str:
    """How many tests passed, failed or were skipped, in words; else the last line of what they printed, and nothing
    for a step that is no run of tests."""
    line = _last_line(folder / "stdout.txt") if folder.name == "tests" else ""
    found = re.findall(r"(\d+) (passed|failed|skipped|error)", line)
    if not found:
        return line
    counts = {"passed": 0, "skipped": 0} | {name: int(count) for count, name in found}
    words = ", ".join(f"{count} {name}" for name, count in counts.items())
    ran = any(count for name, count in counts.items() if name != "skipped")
    return words if ran else f"{NOTHING_TESTED} ({words})"


def told(figures: Mapping[str, Any]) -> str:
    """The summary as Markdown."""
    lines = ["# Figures of this machine", ""]
    lines += [f"- {name}: {value}" for name, value in (figures["machine"] or {}).items()]
    lines += ["", "| step | outcome | seconds |", "| --- | --- | ---: |"]
    lines += [f"| {name} | {one['status']} | {one.get('seconds', '')} |" for name, one in figures["steps"].items()]
    lines += ["", f"Tests: {figures['tests'] or 'not run'}", ""]
    rows = [*_rows(figures["figures"])]
    if rows:
        lines += ["| model | figure | value | asked | |", "| --- | --- | ---: | --- | --- |"]
        lines += [f"| {' | '.join(row)} |" for row in rows]
    for name, peers in figures["figures"].items():
        lines += _peers(peers) if name.startswith("peers-") else []
    if figures["left_out"]:
        lines += ["", f"Too large for the archive: {len(figures['left_out'])} tables, see summary.json."]
    return "\n".join(lines) + "\n"


def _rows(figures: Mapping[str, Any]) -> Iterator[tuple[str, ...]]:
    for name, found in figures.items():
        kind, _, model = name.partition("-")
        if kind == "validate":
            yield from _validation(model, found)
        elif kind == "limits":
            yield from _limits(model, found)


def _validation(model: str, found: Mapping[str, Any]) -> Iterator[tuple[str, ...]]:
    overall = found.get("overall", found)
    for key, bar in BARS["gpu"].items():
        value = overall.get(key)
        if isinstance(value, int | float):
            words = asked(key, f"{100 * bar:g} %" if key in SHARES else f"{bar:g}")
            yield model, LABELS[key], f"{value:.3f}", words, _verdict(holds(key, value, bar))


def _limits(model: str, found: Mapping[str, Any]) -> Iterator[tuple[str, ...]]:
    share = found["link_share"]
    asked = f"at least {LINK:.0%}"
    yield model, "link, a prompt bound by misses", f"{share['prompt']:.1%}", asked, _verdict(share["prompt"] >= LINK)
    yield model, "link, decoding without prefetch", f"{share['decode']:.1%}", "", ""
    yield model, "link, while copies were under way", f"{share['copies_under_way']:.1%}", "", ""
    for system, python in found["python_us"].items():
        fetch = system.startswith("mixtral-offloading")
        asked = f"at most {PYTHON_US:.0f} us" if fetch else ""
        verdict = _verdict(python["median"] <= PYTHON_US) if fetch else ""
        yield model, f"Python in a layer, {system}", f"{python['median']:.0f} us", asked, verdict
    for one in found["memory"]:
        over = one["allocated_over_planned"]
        if over is not None:
            label = f"allocated over planned, {one['system']} {one['cache']}"
            yield model, label, f"{over:.1%}", "within 2 %", _verdict(abs(over - 1) <= MEMORY)
        if one.get("device_reserved_bytes"):
            names = ("allocated", "reserved", "context")  # older figures have no context
            sizes = (f"{name} {one[key] / 1e9:.3f}" for name in names if (key := f"device_{name}_bytes") in one)
            yield model, f"GPU memory in GB, {one['system']} {one['cache']}", ", ".join(sizes), "", ""
    host = found["host"]["resident_over_weights"]
    if found["host"]["weights_bytes"] > 10**9:  # of smaller models the program itself takes more
        yield model, "host memory over weights", f"{host:.1%}", f"at most {HOST:.0%}", _verdict(host <= HOST)


def _peers(found: Mapping[str, Any]) -> list[str]:
    title = f"{found['model']} in {found['dtype']}, limit {found['limit_bytes'] / 1e9:.2f} GB"
    heads = ["program", "median", "least", "most", "expected", "peak GB", "same tokens", ""]
    lines = ["", f"Tokens a second, {title}:", "", f"| {' | '.join(heads)} |"]
    lines.append("| --- | ---: | ---: | ---: | ---: | ---: | ---: | --- |")
    for row in found["programs"]:
        speeds = row["tokens_per_s"]
        cells = (median(speeds), min(speeds), max(speeds)) if speeds else (None, None, None)
        numbers = [*cells, row["expected_tokens_per_s"], row["peak_bytes"] and row["peak_bytes"] / 1e9]
        same = "-" if row["same_tokens"] is None else f"{row['same_tokens']:.0%}"
        shown = " | ".join("-" if number is None else f"{number:.2f}" for number in numbers)
        lines.append(f"| {row['name']} | {shown} | {same} | {row['not_run'] or row['note']} |")
    return lines


def _verdict(good: bool) -> str:
    return "yes" if good else "NO"


def _json(path: Path) -> Any:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) else None


def _last_line(path: Path) -> str:
    try:
        lines = path.read_text(encoding="utf-8").strip().splitlines()
    except OSError:
        return ""
    return lines[-1].strip("= ") if lines else ""
