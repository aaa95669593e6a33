"""Tokens a second beside other programs: the same machine, weights, tokens, routing, and bytes on the device.

    python -m benchmarks.peers [--model olmoe-1b-7b] [--device cuda] [--cache 25% | --gpu-memory 8GiB]
                               [--profile FILE.toml] [--repeats 5] [--out FILE.json] [--json]

The limit is what our systems plan to take: dense weights, slots, KV cache and workspace. `accelerate` gets it for its
weights alone, and `moe-policylang` a pool of as many experts a layer as we have slots. A run is a prompt and its forced
tokens, with the caches empty at its beginning; the first run of each program is not counted, the others take turns, and
a figure is the median over the repeats, with the least and the most. Peak bytes are what torch allocated on a GPU.

Greedy choices are read in the run that is not counted, and should be the same in all. With `--profile`, what the
simulator predicts for our systems stands beside it; for accelerate, the time in which the layers that it copies would
pass over the link at its calibrated rate, which its pageable copies do not reach.

On a machine without a GPU accelerate has no offload that would compare: its files are read in place, from the page
cache, which no limit holds. It runs there as `accelerate-files` if it is asked for by name, to show that it works.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import median
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table

from analysis.files import check_file
from benchmarks import evidence
from benchmarks.peer_programs import Accelerate, Own, PolicyLang, Program, UnableError, take_experts
from real.decode import Machine
from real.device import open_device
from real.jobs import Limits, Size, predicted_costs
from real.progress import bar, status
from real.subjects import Subject, subject
from sim.presets import preset
from sim.run import simulate
from sim.target import parse_bytes
from traces.errors import unknown_name
from traces.schema import Phase
from traces.shipped import find_trace
from traces.store import load as load_trace
from traces.workload import Workload, one_at_a_time

SYSTEMS = "mixtral-offloading,hybrimoe,ktransformers"
PEERS = ("accelerate", "accelerate-files", "moe-policylang")
FILES_ONLY = "on the CPU its offload reads files in place, which no limit holds (ask for accelerate-files to run it)"


@dataclass
class Row:
    """What came out for one program. ``same_tokens``: share of greedy choices equal to those of the first program."""

    name: str
    tokens_per_s: list[float] = field(default_factory=list)
    planned_bytes: int = 0
    peak_bytes: int | None = None
    same_tokens: float | None = None
    expected_tokens_per_s: float | None = None
    note: str = ""
    not_run: str = ""


@dataclass(frozen=True)
class Bench:
    """One model on one machine: our systems, the model that is given to the others, and the limit for all."""

    chosen: Subject
    workload: Workload
    machine: Machine
    own: list[Own]
    slots: int
    limit_bytes: int

    @property
    def device(self) -> torch.device:
        return self.machine.device.torch_device

    def programs(self, peers: Sequence[str]) -> list[Program]:
        """Our systems, then the peers on a model of their own."""
        if not peers:
            return [*self.own]
        theirs = self.chosen.load()
        take_experts(theirs, self.machine)
        made: dict[str, Callable[[], Program]] = {
            "accelerate": lambda: Accelerate(theirs, self.limit_bytes, self.device),
            "accelerate-files": lambda: Accelerate(theirs, self.limit_bytes, self.device, "accelerate-files"),
            "moe-policylang": lambda: PolicyLang(theirs, self.slots, self.device),
        }
        return [*self.own, *(made[name]() for name in peers)]


class Laps:
    """A stopwatch over forward passes, which waits for the device at the end of each."""

    def __init__(self) -> None:
        self._at_s: list[float] = []

    def __call__(self) -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self._at_s.append(time.perf_counter())

    def tokens_per_s(self, workload: Workload) -> float:
        """Decode tokens by the seconds of their passes; the first pass, a prompt, has no beginning and needs none."""
        decoded = [
            after - before
            for step, before, after in zip(workload.steps[1:], self._at_s, self._at_s[1:], strict=False)
            if step.phase == Phase.DECODE
        ]
        return len(decoded) / sum(decoded)


def main(
    model: Annotated[str, typer.Option(help="moetwin-small, wide, a folder, or a catalogue name.")] = "moetwin-small",
    device: Annotated[str, typer.Option(help="cpu, cuda or auto.")] = "auto",
    dtype: Annotated[str, typer.Option(help="fp32, bf16 or fp16.")] = "fp32",
    cache: Annotated[str | None, typer.Option(help="Size of our caches, such as 25%.")] = None,
    gpu_memory: Annotated[str | None, typer.Option(help="Limit of device memory, such as 8GiB, in its place.")] = None,
    systems: Annotated[str, typer.Option(help="Our systems, with commas.")] = SYSTEMS,
    peers: Annotated[str, typer.Option(help="Others, with commas; or none.")] = "accelerate,moe-policylang",
    tokens: Annotated[int, typer.Option(min=2, help="Tokens to decode in a run.")] = 32,
    repeats: Annotated[int, typer.Option(min=1, help="Runs that are counted.")] = 5,
    time_limit: Annotated[float | None, typer.Option(min=1, help="Seconds after which no new turn begins.")] = None,
    profile: Annotated[Path | None, typer.Option(help="Costs of `moetwin calibrate` for this model here.")] = None,
    out: Annotated[Path | None, typer.Option(help="Keep the figures here (.json).")] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace the file of --out.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Runs every program in turn, and prints a table."""
    begun_s = time.monotonic()
    if out is not None:
        check_file(out, force=force)
    asked, others = _names(systems), [name for name in _names(peers) if name != "none"]
    for name in others:
        if name not in PEERS:
            raise unknown_name("peers", name, PEERS)
    with open_device(device) as opened:
        limits = {"cache": cache, "gpu_memory": gpu_memory}
        with status("loading"):
            bench = prepared(model, dtype, opened, asked, tokens=tokens, profile=profile, **limits)
            left_out = {} if opened.name == "cuda" else {"accelerate": FILES_ONLY}
            programs = bench.programs([name for name in others if name not in left_out])
        left_s = None if time_limit is None else time_limit - (time.monotonic() - begun_s)
        rows = compared(programs, bench, repeats, left_s=left_s)
        rows += [Row(name, not_run=why) for name, why in left_out.items() if name in others]
        if profile is not None:
            predict(rows, programs, bench, profile)
    figures = {
        "model": bench.chosen.name,
        "dtype": bench.chosen.spec.dtype,
        "device": opened.name,
        "limit_bytes": bench.limit_bytes,
        "workload": bench.workload.describe(),
        "routing": bench.workload.trace.digest,
        "repeats": repeats,
        "programs": [asdict(row) for row in rows],
    }
    if out is not None:
        evidence.keep(out, (), force=force, **figures)
    if as_json:
        typer.echo(json.dumps(figures, indent=1))
    else:
        show(figures)


def prepared(
    model: str,
    dtype: str,
    opened: Any,
    systems: Sequence[str],
    *,
    tokens: int,
    profile: Path | None,
    cache: str | None,
    gpu_memory: str | None,
) -> Bench:
    """The model on the device, our systems under the limit, and what they run."""
    recorded, learned = load_trace(find_trace("mixed")), load_trace(find_trace("code"))
    chosen = subject(model, dtype, recorded, learned, sequences=1, tokens=tokens)
    workload = one_at_a_time(chosen.judged)
    size = Size.of(workload, max(step.context for step in workload))
    calibration = learned_of(chosen)
    limits = Limits(1, cache, gpu_memory, calibration, together=True, profile=profile, device=opened.name)
    presets = [preset(name) for name in systems]
    planned = [limits.budget(one, chosen.spec, size) for one in presets]
    costs = predicted_costs(chosen.spec, profile)
    machine = Machine.prepare(chosen.load(), opened)
    own = [
        Own(one.name, machine, limits.fitted(one, workload.trace)[0], budget, plan, costs, calibration)
        for one, (budget, plan) in zip(presets, planned, strict=True)
    ]
    most = max(plan.total_bytes for _, plan in planned)
    slots = max(one.budget.total(chosen.spec.moe_layers, one.system.scope) for one in own) // chosen.spec.moe_layers
    limit = most if gpu_memory is None else parse_bytes(gpu_memory, "gpu-memory")
    return Bench(chosen, workload, machine, own, slots, limit)


def learned_of(chosen: Subject) -> Any:
    """What fitted systems learn from; None, so that their stand-ins are taken, where numba cannot be imported."""
    try:
        from sim.replay.calibration import TraceCalibration
    except ImportError:
        return None
    return TraceCalibration.of(chosen.learned, chosen.judged)


def compared(programs: Sequence[Program], bench: Bench, repeats: int, *, left_s: float | None = None) -> list[Row]:
    """A row for each program: greedy choices of the first run, speeds of ``repeats`` runs that take turns.

    With ``left_s`` no turn begins that might not end within so many seconds; two are made in any case.
    """
    rows = [Row(one.name, planned_bytes=_planned(one, bench)) for one in programs]
    begun_s, longest_s, reference = time.monotonic(), 0.0, list[int]()
    with bar("decoding", (1 + repeats) * len(programs)) as advance:
        for turn in range(1 + repeats):
            turned_s = time.monotonic()
            if turn > 1 and left_s is not None and turned_s - begun_s + longest_s > left_s:
                break
            for row, one in zip(rows, programs, strict=True):
                if not row.not_run:
                    _take_turn(row, one, bench, reference, counted=turn > 0)
                advance()
            longest_s = max(longest_s, time.monotonic() - turned_s)
    return rows


def _take_turn(row: Row, one: Program, bench: Bench, reference: list[int], *, counted: bool) -> None:
    """One run of a program. The first program to be run fills in ``reference``, the choices that others should make."""
    chosen, laps = list[int](), Laps()
    try:
        with _measured(row, one), one.ready(), _watched(one, None if counted else chosen):
            one.run(bench.workload, laps)
    except UnableError as error:
        row.not_run = str(error)
        return
    except Exception as error:  # another program may fail in any way, and the others go on
        if isinstance(one, Own):
            raise
        row.not_run = f"{type(error).__name__}: {error}"
        return
    row.note = one.note
    if counted:
        row.tokens_per_s.append(laps.tokens_per_s(bench.workload))
        return
    reference[:] = reference or chosen
    row.same_tokens = sum(map(int.__eq__, chosen, reference)) / len(reference)


def predict(rows: Sequence[Row], programs: Sequence[Program], bench: Bench, profile: Path) -> None:
    """Fills in what the simulator expects of our systems, and the least time of accelerate's copies."""
    costs = predicted_costs(bench.chosen.spec, profile)
    for row, one in zip(rows, programs, strict=False):
        if isinstance(one, Own):
            run = simulate(
                bench.workload, one.system, one.budget, costs, hardware="profile", calibration=one.calibration
            )
            row.expected_tokens_per_s = run.headline()["tokens_per_s"]
        elif isinstance(one, Accelerate) and one.offloaded_bytes and not row.not_run:
            expert_bytes = bench.chosen.spec.expert_bytes
            row.expected_tokens_per_s = expert_bytes / costs.copy_s(expert_bytes) / one.offloaded_bytes


def show(figures: dict[str, Any]) -> None:
    """The table of the figures that ``--out`` keeps, and below it what has to be known of each program."""
    limit = f"{figures['limit_bytes'] / 1e9:.3f} GB"
    table = Table(title=f"{figures['model']} in {figures['dtype']} on {figures['device']}, limit {limit}")
    for column in ("program", "tokens/s", "least", "most", "expected", "peak GB", "same tokens"):
        table.add_column(column, justify="left" if column == "program" else "right")
    for row in figures["programs"]:
        speeds = row["tokens_per_s"]
        cells = (median(speeds), min(speeds), max(speeds)) if speeds else (None, None, None)
        peak, same = row["peak_bytes"], row["same_tokens"]
        table.add_row(
            row["name"],
            *("-" if cell is None else f"{cell:.2f}" for cell in (*cells, row["expected_tokens_per_s"])),
            "-" if peak is None else f"{peak / 1e9:.3f}",
            "-" if same is None else f"{same:.0%}",
        )
    console = Console(highlight=False)
    console.print(table)
    for row in figures["programs"]:
        told = f"not run: {row['not_run']}" if row["not_run"] else row["note"]
        if told:
            console.print(f"{row['name']}: {told}", soft_wrap=True, markup=False)


@contextmanager
def _watched(one: Program, chosen: list[int] | None) -> Iterator[None]:
    """Reads the greedy choice of every forward pass into ``chosen``."""
    if chosen is None:
        yield
        return
    head = one.loaded.model.get_output_embeddings()
    handle = head.register_forward_hook(lambda module, args, logits: chosen.append(int(logits[0, -1].argmax())))
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def _measured(row: Row, one: Program) -> Iterator[None]:
    """Notes the most memory that torch had given on a GPU; of another program, less what our model keeps there."""
    if not torch.cuda.is_available():
        yield
        return
    beside = 0 if isinstance(one, Own) else torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    yield
    row.peak_bytes = max(row.peak_bytes or 0, torch.cuda.max_memory_allocated() - beside)


def _planned(one: Program, bench: Bench) -> int:
    return one.plan.total_bytes if isinstance(one, Own) else bench.limit_bytes


def _names(text: str) -> list[str]:
    return [name.strip() for name in text.split(",") if name.strip()]


if __name__ == "__main__":
    typer.run(main)
