"""Sub-commands that measure: decode under a memory limit, and calibrate."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer
from rich.console import Console
from rich.progress import Progress

from real.cli import MOST_SEED, choose
from sim import options
from sim.costs import Costs, RooflineCosts
from sim.results import RunResult, check_folder
from sim.spec import ModelSpec, catalogue
from sim.systems import Budget, SystemSpec
from sim.target import budget_of, retarget, workload_of
from traces import prompts as prompt_files
from traces import store
from traces.errors import InputError
from traces.prompts import SHIPPED_PROMPTS, Prompt, load_prompts
from traces.schema import Trace
from traces.shipped import find_trace

if TYPE_CHECKING:  # torch and transformers are imported when a model is run, not to print a help text
    from torch import Tensor

    from real.decode import Machine
    from real.generate import Sampler

SMALL = "moetwin-small"
RandomWeights = Annotated[
    bool, typer.Option("--random-weights", help="Build a catalogue model at its true size, with random weights.")
]
Device = Annotated[str, typer.Option(help="cpu, cuda, or auto for a GPU where there is one.")]
Dtype = Annotated[str, typer.Option(help="fp32, bf16 or fp16.")]


def decode(
    model: Annotated[str, typer.Option(help="moetwin-small, a checkpoint's folder, or a catalogue name.")] = SMALL,
    random_weights: RandomWeights = False,
    prompt: Annotated[str | None, typer.Option(help="A text to continue.")] = None,
    prompts: Annotated[Path | None, typer.Option(help="A .jsonl or .txt file of prompts; else the project's.")] = None,
    domains: Annotated[str, typer.Option(help="Only prompts of these domains, separated by commas.")] = "",
    routing: Annotated[
        str | None, typer.Option(help="Force the routing of this trace on the model, instead of prompts.")
    ] = None,
    evict: options.Evict = "lru",
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

      moetwin decode --routing mixed --evict belady --cache 8

      moetwin decode --model olmoe-1b-7b --random-weights --routing mine.safetensors --gpu-memory 8GiB --dtype bf16
    """
    system = options.system_of(evict=evict, place=place, prefetch=prefetch, scope=scope, synchronous=synchronous)
    _check_outputs(out, trace_out, force=force)
    if routing is not None and (prompt or prompts or domains or trace_out):
        raise InputError("routing must be given without prompts, domains and trace-out, got both")
    texts = [] if routing else _texts(prompt, prompts, domains)
    recorded = store.load(find_trace(routing)) if routing else None
    generation = _Generation(
        max_prompt_tokens,
        max_new_tokens,
        temperature,
        seed,
        stream=not as_json and batch == 1,
        full_trace=trace_out is not None,
    )
    if recorded is not None and random_weights and model in catalogue.model_names():
        retarget(recorded, catalogue.model(model))  # a trace of another shape is refused before a model is built
    with machine_of(model, dtype=dtype, device=device, random_weights=random_weights, seed=seed) as machine:
        limits = _Limits(machine.loaded.spec, batch, cache, gpu_memory, scope)
        if recorded is not None:
            run, trace = _replay(machine, recorded, system, limits), recorded
        else:
            run, trace = _continue(machine, texts, system, limits, generation)
    extra = {} if out is None else {"result": str(run.save(out, force=force))}
    if trace_out is not None:
        extra["trace"] = str(store.save(trace, trace_out, force=force))
    options.show_run(run, as_json=as_json, **extra)


def calibrate(
    out: Annotated[Path, typer.Option(help="The profile to write (.toml).")],
    model: Annotated[str, typer.Option(help="The model whose dimensions are measured.")] = SMALL,
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
    """The memory limit as it was asked for, to be worked out once the longest sequence is known."""

    def __init__(self, spec: ModelSpec, batch: int, cache: str | None, gpu_memory: str | None, scope: str) -> None:
        self.spec, self.batch = spec, batch
        self._given: dict[str, Any] = {"cache": cache, "gpu_memory": gpu_memory, "scope": scope}

    def budget(self, context: int) -> Budget:
        """The slots beside a KV cache of ``context`` tokens in every lane."""
        return budget_of(self.spec, lanes=self.batch, context=context, **self._given)

    @property
    def costs(self) -> Costs:
        """Predicted costs, for placement policies that weigh them."""
        return RooflineCosts(self.spec, catalogue.hardware(catalogue.REFERENCE_MACHINE))


def _replay(machine: Machine, trace: Trace, system: SystemSpec, limits: _Limits) -> RunResult:
    from real.decode import replay

    workload, context = workload_of(trace, limits.spec, limits.batch)
    budget = limits.budget(context)
    with bar("replaying", len(workload)) as advance:
        return replay(machine, workload, system, budget, limits.costs, progress=advance)


@dataclass(frozen=True)
class _Generation:
    """How prompts are continued, whether the text is shown as it grows, and whether the routing is recorded in full."""

    max_prompt_tokens: int
    max_new_tokens: int
    temperature: float
    seed: int
    stream: bool
    full_trace: bool


def _continue(
    machine: Machine, texts: Sequence[Prompt], system: SystemSpec, limits: _Limits, generation: _Generation
) -> tuple[RunResult, Trace]:
    from real.decode import decode as decode_prompts
    from real.generate import Sampler
    from real.record import encode

    encoded = [tokens[: generation.max_prompt_tokens] for tokens in encode(machine.loaded, texts)]
    sampler = Sampler(generation.temperature, seed=generation.seed)
    run, trace, _ = decode_prompts(
        machine,
        encoded,
        system,
        limits.budget(max(map(len, encoded)) + generation.max_new_tokens),
        limits.costs,
        batch=limits.batch,
        max_new_tokens=generation.max_new_tokens,
        sampler=_announcing(sampler, machine, encoded, generation) if generation.stream else sampler,
        on_text=(lambda text: typer.echo(text, nl=False)) if generation.stream else None,
        domains=tuple(prompt.domain for prompt in texts),
        prompts_digest=prompt_files.digest(texts),
        made_by="moetwin decode",
        full_trace=generation.full_trace,
    )
    if generation.stream:
        typer.echo()
    return run, trace


def _announcing(
    sampler: Sampler, machine: Machine, encoded: Sequence[Sequence[int]], generation: _Generation
) -> Sampler:
    """The sampler, which also shows the text of a prompt before it chooses the first token after it."""
    prompts, left, gap = iter(encoded), 0, "\n"

    def choose(logits: Tensor) -> list[int]:
        nonlocal left, gap
        if not left:
            typer.secho(gap + machine.text(next(prompts)), dim=True, nl=False)
            left, gap = generation.max_new_tokens, "\n\n"
        (token,) = sampler(logits)
        left = 0 if token in machine.loaded.eos_ids else left - 1
        return [token]

    return cast("Sampler", choose)


@contextmanager
def machine_of(
    model: str, *, dtype: str = "fp32", device: str = "auto", random_weights: bool = False, seed: int = 0
) -> Iterator[Machine]:
    """Loads a model on a device, with its experts on the host; the device is closed in the end."""
    with status("loading") as say:
        from real.decode import Machine
        from real.device import open_device
        from real.models.load import load

        opened = open_device(device)
    with opened:
        with status(f"loading {model}") as say:
            loaded = load(model, dtype=dtype, random_weights=random_weights, seed=seed)
            say(f"packing the experts of {model}")
            machine = Machine.prepare(loaded, opened, seed=seed)
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


def _check_outputs(out: Path | None, trace_out: Path | None, *, force: bool) -> None:
    """Raises :class:`InputError` before any work for what could not be written after it."""
    if out is not None:
        check_folder(out, force=force)
    if trace_out is not None:
        store.check_target(trace_out, force=force)


def _texts(prompt: str | None, prompts: Path | None, domains: str) -> list[Prompt]:
    if prompt is None:
        return choose(load_prompts(prompts or SHIPPED_PROMPTS), domains)
    if prompts is not None or domains:
        raise InputError("prompt must be given without prompts and domains, got both")
    if not prompt.strip():
        raise InputError("prompt must hold text, got an empty one")
    prompt_files.check_characters(prompt, "prompt")
    return [Prompt("prompt", prompt)]
