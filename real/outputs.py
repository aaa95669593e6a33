"""Where measured runs and their trace are written: all that was asked for, or nothing."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

from sim import options
from sim.results import RunResult, check_folder, signals_held, write_folder
from traces import store
from traces.errors import InputError
from traces.schema import Trace, TraceError


@dataclass(frozen=True)
class Outputs:
    """What is written, as it was asked for."""

    repeats: Annotated[
        int, typer.Option(min=1, help="Times that a routing is run; with --out DIR also into DIR-2, DIR-3 and so on.")
    ] = 1
    out: Annotated[Path | None, typer.Option(help="Folder for the result's tables; of --systems, one each in it.")] = (
        None
    )
    trace_out: Annotated[Path | None, typer.Option(help="Also write the routing of this run as a trace.")] = None
    force: options.Force = False

    def check(self, *, side_by_side: bool) -> None:
        """Raises :class:`InputError` for what could not be written after the work.

        Several systems run ``side_by_side`` get a folder each inside ``out``.
        """
        if self.out is None and self.repeats > 1:
            raise InputError(f"out must be given for {self.repeats} repeats, which are written side by side, got none")
        folders = self._folders(1 if side_by_side else self.repeats)
        for folder in folders:
            check_folder(folder, force=self.force)
        after = None if self.out is None else _numbered(self.out, self.repeats + 1)
        if self.repeats > 1 and not side_by_side and after is not None and after.exists():
            raise InputError(f"out must have no folder of more repeats beside it, got {after}, which exists")
        if self.trace_out is not None:
            self._check_trace_out(self.trace_out, folders)

    def save(self, runs: Sequence[Sequence[RunResult]], trace: Trace, *, side_by_side: bool) -> dict[str, str]:
        """Writes what was asked for: DIR, DIR-2, DIR-3 and so on, of several systems DIR/NAME, DIR/NAME-2 and so on.

        Interrupts wait until all is written. Returns what to tell of it.
        """
        with signals_held():
            told = self._save_systems(runs) if side_by_side else self._save_repeats(runs[0])
            if self.trace_out is not None:
                told["trace"] = str(store.save(trace, self.trace_out, force=self.force))
        return told

    def _save_systems(self, runs: Sequence[Sequence[RunResult]]) -> dict[str, str]:
        if self.out is None:
            return {}

        def write(draft: Path) -> None:
            for repeated in runs:
                for number, run in enumerate(repeated, start=1):
                    run.save(_numbered(draft / run.info.system["name"], number))

        return {"result": str(write_folder(self.out, write, force=self.force))}

    def _save_repeats(self, runs: Sequence[RunResult]) -> dict[str, str]:
        saved = [
            str(run.save(folder, force=self.force))
            for run, folder in zip(runs, self._folders(len(runs)), strict=False)  # nowhere to write: no folders
        ]
        told = {"result": ", ".join(saved)} if saved else {}
        if len(saved) > 1:
            told["shown"] = f"{saved[fastest(runs)]}, whose median token is the fastest of {len(saved)} repeats"
        return told

    def _folders(self, count: int) -> list[Path]:
        return [] if self.out is None else [_numbered(self.out, number) for number in range(1, count + 1)]

    def _check_trace_out(self, path: Path, folders: Sequence[Path]) -> None:
        try:
            store.check_trace_target(path, force=self.force)
        except TraceError as error:
            raise InputError(f"trace-{error}") from error  # it speaks of out
        file = path.resolve()
        for folder in (folder.resolve() for folder in folders):
            if folder == file or folder in file.parents or file in folder.parents:
                raise InputError(f"trace-out must be apart from the folder of out, got {path}")


def _numbered(folder: Path, number: int) -> Path:
    """The folder of a repeat: DIR, DIR-2, DIR-3 and so on."""
    if number == 1:
        return folder
    named = folder if folder.name not in ("", "..") else folder.resolve()
    return Path(f"{named}-{number}")


def fastest(runs: Sequence[RunResult]) -> int:
    """Which run has the fastest median token: the first of equals, and of runs that decode nothing."""
    medians = [run.headline()["time_per_output_token_p50_s"] for run in runs]
    return min(range(len(runs)), key=lambda index: medians[index] or 0.0)
