"""``moetwin demo``, the half that compares: both clocks' runs become a report, and a line of outcome."""

from __future__ import annotations

from pathlib import Path
from typing import Protocol

from analysis.cli import outcome_table
from analysis.compare import Comparison, compare
from analysis.report import render_markdown, verdict, write_report
from analysis.timeline import write_perfetto
from sim.printing import console_for
from sim.results import RunResult, write_folder
from sim.spec.profile import Profile
from traces.schema import Trace
from traces.store import save


class Ran(Protocol):
    """What the running half hands over: runs of one workload on both clocks, and what they came of."""

    folder: Path
    force: bool
    trace: Trace
    samples: list[tuple[str, str]]
    profile: Profile
    measured: list[RunResult]
    simulated: RunResult
    facts: dict[str, str]


def present(ran: Ran) -> None:
    """Compares both clocks, writes everything that the demo made into its folder, and prints the outcome."""
    measured, *repeats = ran.measured
    comparison = compare(measured, ran.simulated, repeats=repeats, calibration_mean_s=ran.profile.token_s)
    write_folder(ran.folder, lambda draft: _write(draft, ran, comparison), force=ran.force)
    table = outcome_table(comparison)
    console = console_for(table)
    console.print(table)
    console.print(verdict(comparison))
    console.print(f"device: {ran.facts['device']}")
    console.print(f"report: {(ran.folder / 'report.html').resolve()}", soft_wrap=True)


def _write(folder: Path, ran: Ran, comparison: Comparison) -> None:
    measured = ran.measured[0]
    save(ran.trace, folder / "trace.safetensors")
    ran.profile.save(folder / "profile.toml")
    measured.save(folder / "measured")
    ran.simulated.save(folder / "simulated")
    write_perfetto(folder / "timeline.perfetto.json", [measured, ran.simulated])
    (folder / "report.md").write_text(render_markdown(comparison), encoding="utf-8")
    write_report(
        folder / "report.html",
        comparison=comparison,
        measured=measured,
        simulated=ran.simulated,
        trace=ran.trace,
        samples=ran.samples,
        facts=ran.facts,
    )
