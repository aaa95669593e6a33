"""Sub-commands that measure: decode under a memory limit, and calibrate."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from real.jobs import Limits, PromptJob, TraceJob
from real.memory import check_room, on_gpu
from real.models.names import check_model
from real.options import Continuation, LimitOptions, ModelOptions, Texts
from real.outputs import Outputs, fastest
from real.profile_tables import tables
from real.progress import bar, status
from sim import options
from sim.grouped import grouped
from sim.memory import MemoryPlan
from sim.needs import check_causal
from sim.presets import Preset
from sim.results import RunResult
from traces import store
from traces.errors import InputError

if TYPE_CHECKING:  # torch and transformers are imported when a model is run, not to print a help text
    from real.decode import Machine


@grouped
def decode(
    of_model: ModelOptions,
    texts: Texts,
    systems: options.SystemOptions,
    limit: LimitOptions,
    continuation: Continuation,
    outputs: Outputs,
    as_json: options.AsJsonLines = False,
) -> None:
    """Decode for real, with only a part of the experts on the device, and measure.

    A prompt's text goes to standard output as it grows, and what was measured then to standard error.

    Examples:

      moetwin decode --prompt "def add(a, b):" --cache 25%

      moetwin decode --model ./my-checkpoint --system hybrimoe --gpu-memory 8GiB --prompt "Once upon" --stop "The end"

      moetwin decode --domains speeches --evict lfu --prefetch next-router --out runs/measured --trace-out t.safetensors

      moetwin decode --routing mixed --evict belady --cache 8 --repeats 3 --out runs/belady

      moetwin decode --routing mixed --systems mixtral-offloading,hybrimoe,ktransformers --calibration code --out runs

      moetwin decode --model olmoe-1b-7b --random-weights --routing mine.safetensors --gpu-memory 8GiB --dtype bf16
    """
    chosen, side_by_side = systems.chosen(), systems.systems is not None
    recorded = texts.recorded()
    limits = limit.limits(recorded, together=side_by_side, device=of_model.device)
    if recorded is None:
        _check_decoding(chosen, limits, outputs.repeats)
    outputs.check(side_by_side=side_by_side)
    job: TraceJob | PromptJob
    if recorded is not None:
        job = TraceJob(recorded, chosen, limits, outputs.repeats)
    else:
        made = continuation.generation(of_model, show=not as_json, full_trace=outputs.trace_out is not None)
        job = PromptJob(texts.read(), chosen[0], limits, made)
    spec = of_model.dimensions()
    plan = job.check(spec)
    terminal = Console(stderr=True, highlight=False)
    if terminal.is_terminal:
        terminal.print(f"memory, planned: {plan.told()}", style="dim", soft_wrap=True)
    room = partial(check_room, spec, gpu=on_gpu(of_model.device))
    with machine_of(of_model.model, **of_model.loading(), room=lambda: job.find_room(room)) as machine:
        runs, trace = job.run(machine)
    told = outputs.save(runs, trace, side_by_side=side_by_side)
    best = [repeated[fastest(repeated)] for repeated in runs]
    if side_by_side:
        options.show_runs([(run.info.system["name"], run) for run in best], job.left_out, as_json=as_json)
        for label, value in told.items() if not as_json else ():
            typer.echo(f"{label}: {value}")
    elif as_json:
        options.show_run(best[0], as_json=True, extra={**told, **job.told})
    else:
        extra = {**_memory_of(best[0]), **told}
        options.show_run(best[0], as_json=False, to_stderr=recorded is None, extra=extra)


def _memory_of(run: RunResult) -> dict[str, str]:
    """What the run copied, and the memory that was planned and taken."""
    copied = run.operations.bytes[run.operations.op == "copy"].sum()
    taken = ", ".join(f"{size / 1e6:,.1f} MB {_TAKEN[name]}" for name, size in run.info.peak.items())
    plan = MemoryPlan(**run.info.memory)
    return {
        "copied to the device, in all": f"{copied / 1e6:,.1f} MB",
        "memory, planned": plan.told(),
        "memory, at most": taken,
    }


_TAKEN = {
    "host_resident_bytes": "on the host, the program included",
    "device_allocated_bytes": "on the device",
    "device_reserved_bytes": "reserved there",
    "device_context_bytes": "in use there beyond that (context, other processes)",
}


@grouped
def calibrate(
    out: Annotated[Path, typer.Option(help="The profile to write (.toml).")],
    of_model: ModelOptions,
    name: Annotated[str, typer.Option(help="What results call this machine.")] = "",
    repeats: Annotated[int, typer.Option(min=3, help="Times that everything is measured.")] = 7,
    force: options.Force = False,
) -> None:
    """Measure this machine, and write the profile that `moetwin simulate --profile` reads.

    Examples:

      moetwin calibrate --out here.toml

      moetwin calibrate --model olmoe-1b-7b --random-weights --dtype bf16 --device cuda --out h100.toml

      moetwin calibrate --device cuda --cpu-threads 8 --out h100-8-threads.toml
    """
    store.check_target(out, force=force)
    if out.suffix != ".toml":
        raise InputError(f"out must end in .toml, as a profile is such a file, got {out}")
    with machine_of(of_model.model, **of_model.loading()) as machine, status("calibrating") as say:
        from real.calibrate import calibrate as measure

        profile = measure(machine, name=name or machine.hardware, repeats=repeats, seed=of_model.seed, progress=say)
    profile.save(out, force=force)
    terminal = Console(highlight=False)
    for table in tables(profile):
        terminal.print(table)
    terminal.print(f"profile: {out} ({profile.digest[:12]})", soft_wrap=True)


@contextmanager
def machine_of(
    model: str,
    *,
    dtype: str = "fp32",
    quant: str | None = None,
    device: str = "auto",
    random_weights: bool = False,
    seed: int = 0,
    cpu_threads: int | None = None,
    room: Callable[[], None] = lambda: None,
) -> Iterator[Machine]:
    """Loads a model on a device, with its experts on the host; the device is closed in the end.

    ``room`` is asked once the device is open, before anything is loaded: it raises where there is none.
    """
    check_model(model, random_weights=random_weights)
    with status("loading"):
        from real.decode import Machine
        from real.device import open_device
        from real.models.load import load

        opened = open_device(device, cpu_threads)
    with opened:
        room()
        with status(f"loading {model}"):
            loaded = load(model, dtype=dtype, random_weights=random_weights, seed=seed, quant=quant)
        with bar(f"{'generating' if random_weights else 'packing'} experts", loaded.spec.moe_layers) as advance:
            machine = Machine.prepare(loaded, opened, seed=seed, progress=advance)
        yield machine


def _check_decoding(systems: Sequence[Preset], limits: Limits, repeats: int) -> None:
    """Raises :class:`InputError` for what only a forced routing can have."""
    if repeats > 1:
        raise InputError(f"repeats must be 1 without routing, got {repeats}")
    if len(systems) > 1:
        raise InputError(f"routing must be given to run {len(systems)} systems side by side, got none")
    if systems[0].sim_only:
        raise InputError(f"system must be one that real models can run, got {systems[0].name}, which is simulated only")
    check_causal(limits.fitted(systems[0])[0], limits.calibration)
