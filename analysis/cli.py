"""``moetwin compare``: measured and simulated runs in, a table on the terminal and a page on the disk out."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from analysis import text
from analysis.compare import Comparison
from analysis.compare import compare as compare_runs
from analysis.files import check_file, write_text
from analysis.frames import load_runs
from analysis.report import render_markdown, render_report, system_label, verdict
from analysis.timeline import write_perfetto
from sim.grouped import grouped
from sim.printing import console_for
from sim.results import check_folder
from traces.errors import InputError
from traces.schema import Trace
from traces.store import load as load_trace

ENDINGS = {"out": (".html", ".htm"), "perfetto": (".json",), "markdown": (".md",)}
"""How the names of the files end, by what is written into them."""


@dataclass(frozen=True)
class MeasuredRuns:
    """The options of judging measured runs that have yet to be simulated."""

    measured: Annotated[
        Path | None,
        typer.Option(
            help="Instead of two runs: a measured run or a folder of them (a validation's), simulated on --profile."
        ),
    ] = None
    profile: Annotated[Path | None, typer.Option(help="The profile to simulate measured runs on.")] = None
    calibration: Annotated[
        Path | None,
        typer.Option(help="With --measured: the trace that fitted systems learned from, if it is not found as theirs."),
    ] = None

    def judge(self, trace: Path | None, out: Path, *, as_json: bool, force: bool) -> None:
        """Simulates every measured run in a folder on a profile, and judges them all in one report."""
        if self.profile is None:
            raise InputError("profile must be given with --measured, got nothing")
        assert self.measured is not None
        from analysis.judging import PAGE, outcome_of, show, write_report

        check_folder(out, force=force)
        _spare_inputs({"out": out}, [self.measured])
        facts = {"runs": str(self.measured)}
        outcome = outcome_of([(self.measured, self.profile)], facts=facts, trace=trace, calibration=self.calibration)
        write_report(out, outcome, force=force)
        show(outcome, out / PAGE, as_json=as_json)


@dataclass(frozen=True)
class TwoRuns:
    """The options of comparing a measured with a simulated run."""

    repeat: Annotated[
        list[Path] | None, typer.Option(help="Further measured runs of the same work; repeatable. Gives the noise.")
    ] = None
    calibration_mean_s: Annotated[
        float | None,
        typer.Option(
            "--calibration-mean-s", min=1e-9, help="Mean seconds of a decode token while calibrating; gives the skill."
        ),
    ] = None
    perfetto: Annotated[
        Path | None, typer.Option(help="Also write both timelines as a Chrome trace, for ui.perfetto.dev.")
    ] = None
    markdown: Annotated[Path | None, typer.Option(help="Also write a short Markdown table.")] = None

    def compare(self, runs: list[Path], trace: Path | None, out: Path, *, as_json: bool, force: bool) -> None:
        """Compares ``runs``, the measured and the simulated one, and writes what was asked for."""
        inputs, targets = (
            [*runs, *(self.repeat or [])],
            {"out": out, "perfetto": self.perfetto, "markdown": self.markdown},
        )
        _check_targets(targets, force=force)
        _spare_inputs(targets, inputs)
        ours, theirs, *others = load_runs(inputs)
        recorded = None if trace is None else _trace(trace, ours.info.trace_digest)
        outcome = compare_runs(ours, theirs, repeats=others, calibration_mean_s=self.calibration_mean_s)
        page = render_report(comparison=outcome, measured=ours, simulated=theirs, trace=recorded, facts={})
        written = {"report": write_text(out, page, force=force)}
        if self.perfetto is not None:
            written["perfetto"] = write_perfetto(self.perfetto, [ours, theirs], force=force)
        if self.markdown is not None:
            written["markdown"] = write_text(self.markdown, render_markdown(outcome), force=force, field="markdown")
        _show(outcome, written, as_json=as_json)


@grouped
def compare(
    folder: MeasuredRuns,
    pair: TwoRuns,
    measured_run: Annotated[
        Path | None, typer.Argument(metavar="MEASURED", help="Result folder of the measured run.", show_default=False)
    ] = None,
    simulated: Annotated[
        Path | None, typer.Argument(help="Result folder of the simulated run.", show_default=False)
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(
            help="The HTML page to write, or with --measured the folder.", show_default="report.html, or report"
        ),
    ] = None,
    trace: Annotated[
        Path | None, typer.Option(help="The trace that both ran; adds expert popularity and the memory of all experts.")
    ] = None,
    json_: Annotated[bool, typer.Option("--json", help="Print one JSON object instead of the table.")] = False,
    force: Annotated[bool, typer.Option("--force", help="Replace files that exist.")] = False,
) -> None:
    """Compare a measured with a simulated run of the same work, or simulate measured runs, and write a report.

    With --measured each run's trace is sought beside it, in the folders above and among those that ship, unless --trace
    names its file. Runs that cannot be judged are left out, and told on stderr.

    Examples:

      moetwin compare runs/measured runs/simulated

      moetwin compare runs/r1 runs/simulated --repeat runs/r2 --repeat runs/r3 --out out.html --perfetto out.json

      moetwin compare --measured runs --profile here.toml --out report
    """
    if folder.measured is not None:
        _refuse({"a measured run by its place": measured_run, "simulated": simulated, **vars(pair)}, "with --measured")
        folder.judge(trace, out or Path("report"), as_json=json_, force=force)
        return
    _refuse({"profile": folder.profile, "calibration": folder.calibration}, "without --measured")
    for name, given in {"measured": measured_run, "simulated": simulated}.items():
        if given is None:
            raise InputError(f"{name} must be given, got nothing")
    runs = [one for one in (measured_run, simulated) if one is not None]
    pair.compare(runs, trace, out or Path("report.html"), as_json=json_, force=force)


def _refuse(given: Mapping[str, object], where: str) -> None:
    for name, value in given.items():
        if value:
            raise InputError(f"{name.replace('_', '-')} must be left out {where}, got {value}")


def _check_targets(targets: dict[str, Path | None], *, force: bool) -> None:
    """Refuses before anything is read or written, so that a wrong target costs nothing and leaves nothing."""
    seen: dict[Path, str] = {}
    for field, path in targets.items():
        if path is None:
            continue
        check_file(path, force=force, field=field)
        if path.absolute() in seen:
            raise InputError(f"{field} must be another file than {seen[path.absolute()]}, got {path}")
        seen[path.absolute()] = field
    for field, path in targets.items():
        if path is not None and path.suffix not in ENDINGS[field]:
            raise InputError(f"{field} must end in {' or '.join(ENDINGS[field])}, got {path}")


def _spare_inputs(targets: dict[str, Path | None], inputs: list[Path]) -> None:
    """Refuses to write into a result folder that is being read, with or without force."""
    for field, path in targets.items():
        for folder in inputs:
            if path is not None and path.resolve().is_relative_to(folder.resolve()):
                raise InputError(f"{field} must lie outside the runs that are compared, got {path}")


def _trace(path: Path, digest: str) -> Trace:
    trace = load_trace(path)
    if trace.digest != digest:
        raise InputError(f"trace must be the one that the runs replayed ({digest}), got {path} with {trace.digest}")
    return trace


def _show(outcome: Comparison, written: dict[str, Path], *, as_json: bool) -> None:
    if as_json:
        typer.echo(json.dumps({**outcome.to_dict(), **{name: str(path) for name, path in written.items()}}))
        return
    table = outcome_table(outcome)
    console = console_for(table)
    console.print(table)
    console.print(verdict(outcome))
    for name, path in written.items():
        console.print(f"{name}: {path}", soft_wrap=True)


def outcome_table(outcome: Comparison) -> Table:
    """The outcome as a rich table: the components of a decode token on both clocks, and the whole token."""
    title = f"{outcome.measured.model}, {system_label(outcome.measured.system)}: mean decode token"
    table = Table(title=title, title_justify="left")
    table.add_column("component")
    for name in ("measured ms", "simulated ms", "difference ms", "of the token"):
        table.add_column(name, justify="right")
    for part in outcome.critical():
        table.add_row(
            part.label, *_cells(part.measured_ms, part.simulated_ms), text.percent(part.of_token, signed=True)
        )
    ours, theirs = (float(outcome.tokens[f"{side}_s"].mean()) * 1e3 for side in ("measured", "simulated"))
    table.add_section()
    table.add_row("whole token", *_cells(ours, theirs), text.percent((theirs - ours) / ours, signed=True))
    return table


def _cells(measured: float, simulated: float) -> tuple[str, str, str]:
    return text.number(measured), text.number(simulated), text.signed_number(simulated - measured)
