"""Sub-commands that measure: decode under a memory limit, and calibrate."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.progress import Progress

from real.cli import MOST_SEED, choose
from sim import options
from sim.costs import Costs, RooflineCosts
from sim.results import RunResult, check_folder
from sim.spec import ModelSpec, catalogue
from sim.systems import Budget, SystemSpec
from sim.target import budget_of, workload_of
from traces import prompts as prompt_files
from traces import store
from traces.errors import InputError
from traces.prompts import SHIPPED_PROMPTS, Prompt, load_prompts
from traces.schema import Trace
from traces.shipped import find_trace

if TYPE_CHECKING:  # torch and transformers are imported when a model is run, not to print a help text
    from real.decode import Machine
    from real.generate import Sampler
    from sim.replay.calibration import TraceCalibration

SMALL = "moetwin-small"
Model = Annotated[
    str,
    typer.Option(help="moetwin-small, a checkpoint's folder, or with --random-weights a catalogue name or TOML file."),
]
RandomWeights = Annotated[
    bool, typer.Option("--random-weights", help="Build a model of these dimensions, with random weights.")
]
Device = Annotated[str, typer.Option(help="cpu, cuda, or auto for a GPU where there is one.")]
Dtype = Annotated[str, typer.Option(help="fp32, bf16 or fp16.")]
PromptFile = Annotated[Path | None, typer.Option(help="A .jsonl or .txt file of prompts; else the project's.")]
Routing = Annotated[str | None, typer.Option(help="Force the routing of this trace on the model, instead of prompts.")]
Repeats = Annotated[
    int, typer.Option(min=1, help="Times that a routing is run; with --out DIR also into DIR-2, DIR-3 and so on.")
]


def decode(
    model: Model = SMALL,
    random_weights: RandomWeights = False,
    prompt: Annotated[str | None, typer.Option(help="A text to continue.")] = None,
    prompts: PromptFile = None,
    domains: Annotated[str, typer.Option(help="Only prompts of these domains, separated by commas.")] = "",
    routing: Routing = None,
    repeats: Repeats = 1,
    evict: options.Evict = "lru",
    calibration: options.Calibration = None,
    place: options.Place = "fetch",
    prefetch: options.Prefetch = "none",
    scope: options.Scope = "layer",
    cache: options.Cache = None,
    gpu_memory: options.GpuMemory = None,
    device: Device = "auto",
    dtype: Dtype = "fp32",
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Most tokens to decode for each prompt.")] = 64,
    max_prompt_tokens: Annotated[int, typer.Option(min=1, help="A longer prompt is cut here.")] = 128,
    batch: Annotated[int, typer.Option(min=1, help="Sequences decoded together, in lock-step.")] = 1,
    temperature: Annotated[float, typer.Option(help="0 decodes greedily.")] = 0.0,
    seed: Annotated[int, typer.Option(min=0, max=MOST_SEED, help="Of sampling, and of random weights.")] = 0,
    synchronous: options.Synchronous = False,
    out: Annotated[Path | None, typer.Option(help="Folder for the result's tables.")] = None,
    trace_out: Annotated[Path | None, typer.Option(help="Also write the routing of this run as a trace.")] = None,
    force: options.Force = False,
    as_json: options.AsJson = False,
) -> None:
    """Decode for real, with only a part of the experts on the device, and measure.

    Examples:

      moetwin decode --prompt "def add(a, b):" --cache 25%

      moetwin decode --domains speeches --evict lfu --prefetch next-router --out runs/measured --trace-out t.safetensors

      moetwin decode --routing mixed --evict belady --cache 8 --repeats 3 --out runs/belady

      moetwin decode --model olmoe-1b-7b --random-weights --routing mine.safetensors --gpu-memory 8GiB --dtype bf16
    """
    system = options.system_of(evict=evict, place=place, prefetch=prefetch, scope=scope, synchronous=synchronous)
    folders = _check_outputs(out, trace_out, repeats, force=force)
    texts, recorded = _given(routing, prompt, prompts, domains, trace_out, repeats, random_weights)
    generation = _Generation(
        max_prompt_tokens,
        max_new_tokens,
        _sampler(temperature, seed),
        stream=not as_json and batch == 1,
        full_trace=trace_out is not None,
    )
    limits = _Limits(batch, cache, gpu_memory, scope, options.calibration_of(calibration, recorded, batch))
    if recorded is not None and random_weights:
        _check_fit(recorded, limits, model, dtype)
    with machine_of(model, dtype=dtype, device=device, random_weights=random_weights, seed=seed) as machine:
        if recorded is not None:
            runs, trace = _replay(machine, recorded, system, limits, repeats), recorded
        else:
            runs, trace = _continue(machine, texts, system, limits, generation)
    options.show_run(runs[0], as_json=as_json, **_save(runs, folders, trace, trace_out, force=force))


def calibrate(
    out: Annotated[Path, typer.Option(help="The profile to write (.toml).")],
    model: Model = SMALL,
    random_weights: RandomWeights = False,
    device: Device = "auto",
    dtype: Dtype = "fp32",
    name: Annotated[str, typer.Option(help="What results call this machine.")] = "",
    repeats: Annotated[int, typer.Option(min=3, help="Times that everything is measured.")] = 7,
    seed: Annotated[
        int, typer.Option(min=0, max=MOST_SEED, help="Of the synthetic routing and of random weights.")
    ] = 0,
    force: options.Force = False,
) -> None:
    """Measure this machine, and write the profile that `moetwin simulate --profile` reads.

    Examples:

      moetwin calibrate --out here.toml

      moetwin calibrate --model olmoe-1b-7b --random-weights --dtype bf16 --device cuda --out h100.toml
    """
    store.check_target(out, force=force)
    with (
        machine_of(model, dtype=dtype, device=device, random_weights=random_weights, seed=seed) as machine,
        status("calibrating") as say,
    ):
        from real.calibrate import calibrate as measure

        profile = measure(machine, name=name or machine.hardware, repeats=repeats, seed=seed, progress=say)
    profile.save(out, force=force)
    Console(highlight=False).print(f"profile: {out} ({profile.digest[:12]})", soft_wrap=True)


class _Limits:
    """The memory limit as it was asked for, to be worked out once the model and its longest sequence are known; and
    the trace that policies are fitted to."""

    def __init__(
        self, batch: int, cache: str | None, gpu_memory: str | None, scope: str, calibration: TraceCalibration | None
    ) -> None:
        self.batch, self.calibration = batch, calibration
        self._given: dict[str, Any] = {"cache": cache, "gpu_memory": gpu_memory, "scope": scope}

    def budget(self, spec: ModelSpec, context: int) -> Budget:
        """The slots beside a KV cache of ``context`` tokens in every lane."""
        return budget_of(spec, lanes=self.batch, context=context, **self._given)


@dataclass(frozen=True)
class _Generation:
    """How prompts are continued, whether the text is shown as it grows, and whether the routing is recorded in full."""

    max_prompt_tokens: int
    max_new_tokens: int
    sampler: Sampler
    stream: bool
    full_trace: bool


def _check_fit(trace: Trace, limits: _Limits, model: str, dtype: str) -> None:
    """Raises :class:`InputError` for a trace or a limit that does not fit a model that has yet to be built."""
    from real.models.load import random_spec, torch_dtype

    torch_dtype(dtype)
    spec = random_spec(model).in_dtype(dtype)
    _, context = workload_of(trace, spec, limits.batch)
    limits.budget(spec, context)


def _replay(machine: Machine, trace: Trace, system: SystemSpec, limits: _Limits, repeats: int) -> list[RunResult]:
    from real.decode import replay

    spec = machine.loaded.spec
    workload, context = workload_of(trace, spec, limits.batch)
    budget, costs = limits.budget(spec, context), _rough_costs(spec)
    with bar("replaying", repeats * len(workload)) as advance:
        return [
            replay(machine, workload, system, budget, costs, calibration=limits.calibration, progress=advance)
            for _ in range(repeats)
        ]


def _continue(
    machine: Machine, texts: Sequence[Prompt], system: SystemSpec, limits: _Limits, generation: _Generation
) -> tuple[list[RunResult], Trace]:
    from real.decode import decode as decode_prompts
    from real.record import encode

    spec = machine.loaded.spec
    encoded = [tokens[: generation.max_prompt_tokens] for tokens in encode(machine.loaded, texts)]
    shown: dict[str, Any] = {}
    if generation.stream:
        shown = {"on_prompt": _announce(machine, encoded), "on_text": lambda text: typer.echo(text, nl=False)}
    run, trace, _ = decode_prompts(
        machine,
        encoded,
        system,
        limits.budget(spec, max(map(len, encoded)) + generation.max_new_tokens),
        _rough_costs(spec),
        calibration=limits.calibration,
        batch=limits.batch,
        max_new_tokens=generation.max_new_tokens,
        sampler=generation.sampler,
        domains=tuple(prompt.domain for prompt in texts),
        prompts_digest=prompt_files.digest(texts),
        made_by="moetwin decode",
        full_trace=generation.full_trace,
        **shown,
    )
    if generation.stream:
        typer.echo()
    return [run], trace


def _rough_costs(spec: ModelSpec) -> Costs:
    """Predicted costs, for placement policies that weigh them."""
    return RooflineCosts(spec, catalogue.hardware(catalogue.REFERENCE_MACHINE))


def _announce(machine: Machine, encoded: Sequence[Sequence[int]]) -> Callable[[int], None]:
    """What shows the text of a prompt, to be followed by its continuation."""

    def show(index: int) -> None:
        typer.secho(("\n\n" if index else "\n") + machine.text(encoded[index]), dim=True, nl=False)

    return show


def _sampler(temperature: float, seed: int) -> Sampler:
    with status("loading"):
        from real.generate import Sampler

    return Sampler(temperature, seed=seed)


@contextmanager
def machine_of(
    model: str, *, dtype: str = "fp32", device: str = "auto", random_weights: bool = False, seed: int = 0
) -> Iterator[Machine]:
    """Loads a model on a device, with its experts on the host; the device is closed in the end."""
    with status("loading"):
        from real.decode import Machine
        from real.device import open_device
        from real.models.load import load

        opened = open_device(device)
    with opened:
        with status(f"loading {model}"):
            loaded = load(model, dtype=dtype, random_weights=random_weights, seed=seed)
        with bar(f"{'generating' if random_weights else 'packing'} experts", loaded.spec.moe_layers) as advance:
            machine = Machine.prepare(loaded, opened, seed=seed, progress=advance)
        yield machine


@contextmanager
def status(text: str) -> Iterator[Callable[[str], None]]:
    """A spinner on stderr; what it yields changes the text."""
    with Console(stderr=True).status(text) as spinner:
        yield lambda what: spinner.update(what)


@contextmanager
def bar(text: str, steps: int) -> Iterator[Callable[[], None]]:
    """A progress bar on stderr; what it yields advances it by one."""
    with Progress(console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task(text, total=steps)
        yield lambda: progress.advance(task)


def _check_outputs(out: Path | None, trace_out: Path | None, repeats: int, *, force: bool) -> list[Path]:
    """The folders of the repeats; raises :class:`InputError` before any work for what could not be written after it."""
    folders = [] if out is None else [out, *(Path(f"{out}-{number}") for number in range(2, repeats + 1))]
    for folder in folders:
        check_folder(folder, force=force)
    if trace_out is not None:
        store.check_target(trace_out, force=force)
    return folders


def _save(
    runs: Sequence[RunResult], folders: Sequence[Path], trace: Trace, trace_out: Path | None, *, force: bool
) -> dict[str, str]:
    """Writes what was asked for; returns what to tell of it."""
    saved = [str(run.save(folder, force=force)) for run, folder in zip(runs, folders, strict=False)]
    told = {"result": ", ".join(saved)} if saved else {}
    if trace_out is not None:
        told["trace"] = str(store.save(trace, trace_out, force=force))
    return told


def _given(
    routing: str | None,
    prompt: str | None,
    prompts: Path | None,
    domains: str,
    trace_out: Path | None,
    repeats: int,
    random_weights: bool,
) -> tuple[list[Prompt], Trace | None]:
    """The prompts, or the trace whose routing is forced; raises :class:`InputError` for options that contradict it."""
    if routing is not None:
        if prompt or prompts or domains or trace_out:
            raise InputError("routing must be given without prompts, domains and trace-out, got both")
        return [], store.load(find_trace(routing))
    if random_weights:
        raise InputError("routing must be given with random-weights (they read no prompts), got none")
    if repeats > 1:
        raise InputError(f"repeats must be 1 without routing, got {repeats}")
    return _texts(prompt, prompts, domains), None


def _texts(prompt: str | None, prompts: Path | None, domains: str) -> list[Prompt]:
    if prompt is None:
        return choose(load_prompts(prompts or SHIPPED_PROMPTS), domains)
    if prompts is not None or domains:
        raise InputError("prompt must be given without prompts and domains, got both")
    if not prompt.strip():
        raise InputError("prompt must hold text, got an empty one")
    prompt_files.check_characters(prompt, "prompt")
    return [Prompt("prompt", prompt)]
