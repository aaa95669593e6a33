"""``moetwin validate``: what it asks for, and the measuring; the judging is the command line's next step."""

from __future__ import annotations

import re
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.progress import Progress as Bar

from real.checks import check_cpu_threads
from real.options import CpuThreads
from real.progress import status
from sim import options
from sim.target import DTYPE_OF
from traces.errors import InputError, unknown_name
from traces.paths import fault_of_target

if TYPE_CHECKING:  # torch and transformers are imported when a model is run, not to print a help text
    from real.validate import Progress, Validation

MOST_TOKENS = 4096
_UNITS_S = {"s": 1, "m": 60, "h": 3600}


@dataclass(frozen=True)
class Measured:
    """What was measured, for the judging: the folder, what is missing in it, and how the outcome is to be told."""

    folder: Path
    missing: dict[str, list[str]]
    done: int
    total: int
    archive: Path | None
    as_json: bool


def validate(
    out: Annotated[Path, typer.Option(help="Folder of the validation; one that was begun is gone on with.")],
    model: Annotated[
        list[str] | None,
        typer.Option(
            help="wide, moetwin-small, a checkpoint's folder, or a catalogue name or TOML file; repeatable.",
            show_default="wide; with cuda olmoe-1b-7b, deepseek-v2-lite and qwen3-30b-a3b",
        ),
    ] = None,
    device: Annotated[str, typer.Option(help="cpu, cuda, or auto for a GPU where there is one.")] = "auto",
    dtype: Annotated[str | None, typer.Option(help="fp32, bf16 or fp16.", show_default="fp32; with cuda bf16")] = None,
    systems: Annotated[
        str | None,
        typer.Option(
            help="Published systems, or TOML files of your own, separated by commas.", show_default="eight of them"
        ),
    ] = None,
    caches: Annotated[str, typer.Option(help="Cache sizes, separated by commas.")] = "25%,50%,75%",
    repeats: Annotated[int, typer.Option(min=2, help="Measured runs of everything, interleaved.")] = 7,
    tokens: Annotated[int, typer.Option(min=1, max=MOST_TOKENS, help="Decode tokens of each sequence.")] = 12,
    sequences: Annotated[int, typer.Option(min=1, help="Sequences, one of each domain while there is one.")] = 3,
    trace: Annotated[str, typer.Option(help="Recorded routing that is judged: a file, or a shipped name.")] = "mixed",
    calibration: Annotated[str, typer.Option(help="Another recording, for systems that are fitted to one.")] = "code",
    time_limit: Annotated[
        str | None,
        typer.Option(
            help="Stop measuring before this time (30m), and begin nothing that would not fit; judging what is there "
            "follows, a few seconds a configuration at most."
        ),
    ] = None,
    seed: Annotated[int, typer.Option(min=0, max=2**31, help="Of random weights and of synthetic routing.")] = 0,
    cpu_threads: CpuThreads = None,
    archive: Annotated[Path | None, typer.Option(help="Also write the whole folder as one .tar.gz file.")] = None,
    as_json: options.AsJson = False,
) -> Measured:
    """Calibrate this machine, run systems on routing that calibration never saw, simulate the same, and judge.

    A call that was interrupted, or met its time limit, is made again to go on: finished runs are kept.

    Examples:

      moetwin validate --device cpu --out results/here

      moetwin validate --device cuda --out results/h100 --time-limit 25m --archive h100.tar.gz

      moetwin validate --model moetwin-small --systems hybrimoe,ktransformers --caches 25%,50% --out small
    """
    ends_s = None if time_limit is None else time.monotonic() + _seconds(time_limit)
    _check_archive(archive, out)
    named = (tuple(model or ()), device, dtype, systems, caches)
    wanted = _Wanted(*named, repeats, tokens, sequences, trace, calibration, seed, cpu_threads)
    with status("loading"):
        validation = wanted.validation(out)
    progress = _run(validation, ends_s)
    return Measured(out, progress.missing, progress.done, progress.total, archive, as_json)


def _run(validation: Validation, ends_s: float | None) -> Progress:
    """Measures what is left to measure, under a bar, until this time of :func:`time.monotonic`."""
    before = validation.progress()
    console = Console(stderr=True)
    with Bar(console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("validating", total=before.total, completed=before.done)
        progress = validation.run(
            limit_s=None if ends_s is None else ends_s - time.monotonic(),
            say=lambda text: bar.update(task, description=text),
            advance=lambda: bar.advance(task),
        )
    for note in progress.notes:
        console.print(f"time-limit: {note}", style="dim", soft_wrap=True)
    return progress


@dataclass(frozen=True)
class _Wanted:
    """The options that decide what is measured, as they were given."""

    models: tuple[str, ...]
    device: str
    dtype: str | None
    systems: str | None
    caches: str
    repeats: int
    tokens: int
    sequences: int
    trace: str
    calibration: str
    seed: int
    cpu_threads: int | None

    def validation(self, out: Path) -> Validation:
        """What runs in the folder ``out``; raises :class:`InputError` for whatever could not be run."""
        if self.dtype is not None and self.dtype not in DTYPE_OF.values():
            raise unknown_name("dtype", self.dtype, set(DTYPE_OF.values()))
        recorded = options.read_trace(self.trace, "trace")
        learned = options.read_trace(self.calibration, "calibration")
        if recorded.digest == learned.digest:
            raise InputError(f"calibration must be another recording than trace, got {self.calibration} for both")
        from real.memory import on_gpu
        from real.subjects import DEFAULT_DTYPES, DEFAULT_MODELS, subject
        from real.validate import DEFAULT_SYSTEMS, Settings, Validation

        device = "cuda" if on_gpu(self.device) else "cpu"
        check_cpu_threads(self.cpu_threads, device)
        models, dtype = self.models or DEFAULT_MODELS[device], self.dtype or DEFAULT_DTYPES[device]
        settings = Settings(
            device=device,
            models=models,
            dtype=dtype,
            systems=DEFAULT_SYSTEMS if self.systems is None else _names("systems", self.systems),
            caches=_names("caches", self.caches),
            repeats=self.repeats,
            tokens=self.tokens,
            sequences=self.sequences,
            trace=recorded.digest,
            calibration=learned.digest,
            seed=self.seed,
            cpu_threads=self.cpu_threads,
        )
        sizes = {"sequences": self.sequences, "tokens": self.tokens, "seed": self.seed}
        return Validation(out, settings, [subject(name, dtype, recorded, learned, **sizes) for name in models])


def _names(field: str, text: str) -> tuple[str, ...]:
    """The entries of a list with commas; raises :class:`InputError` for an empty one, and for one given twice."""
    names = tuple(name.strip() for name in text.split(",") if name.strip())
    if not names or len({*names}) < len(names):
        raise InputError(f"{field} must be different names with commas, got {text!r}")
    return names


def _seconds(text: str) -> float:
    match = re.fullmatch(r"\s*([0-9]{1,6}(?:\.[0-9]{1,3})?)\s*([smh])\s*", text)
    if not match or not float(match[1]):
        raise InputError(f"time-limit must be a time such as 90s, 30m or 2h, got {text!r}")
    return float(match[1]) * _UNITS_S[match[2]]


def _check_archive(archive: Path | None, out: Path) -> None:
    if archive is None:
        return
    if not archive.name.endswith(".tar.gz"):
        raise InputError(f"archive must end in .tar.gz, got {archive}")
    if archive.is_dir() or archive.resolve().is_relative_to(out.resolve()):
        raise InputError(f"archive must be a file outside the folder of out, got {archive}")
    fault = fault_of_target(archive)
    if fault is not None:
        raise InputError(f"archive must be a file that can be written, got {archive}: {fault}")
