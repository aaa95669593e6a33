"""Sub-commands that measure: decode under a memory limit, and calibrate."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from real.cli import MOST_SEED, Domains, choose
from real.jobs import Generation, Limits, PromptJob, TraceJob
from real.models.names import check_model
from real.progress import bar, status
from sim import options
from sim.needs import check_causal
from sim.presets import Preset
from sim.results import RunResult, check_folder
from sim.spec import ModelSpec, catalogue
from sim.target import DTYPE_OF
from traces import prompts as prompt_files
from traces import store
from traces.errors import InputError, unknown_name
from traces.limits import MOST_BATCH
from traces.prompts import SHIPPED_PROMPTS, Prompt, load_prompts
from traces.schema import Trace, TraceError

if TYPE_CHECKING:  # torch and transformers are imported when a model is run, not to print a help text
    from real.decode import Machine

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
ProfileFile = Annotated[
    Path | None,
    typer.Option("--profile", help="Costs of `moetwin calibrate`, for policies that weigh them; else a catalogue's."),
]


def decode(
    model: Model = SMALL,
    random_weights: RandomWeights = False,
    prompt: Annotated[str | None, typer.Option(help="A text to continue.")] = None,
    prompts: PromptFile = None,
    domains: Domains = None,
    routing: Routing = None,
    repeats: Repeats = 1,
    system: options.System = None,
    systems: options.Systems = None,
    evict: options.Evict = None,
    calibration: options.Calibration = None,
    place: options.Place = None,
    prefetch: options.Prefetch = None,
    policy_file: options.PolicyFile = None,
    option: options.Option = None,
    scope: options.Scope = None,
    cache: options.Cache = None,
    gpu_memory: options.GpuMemory = None,
    profile: ProfileFile = None,
    device: Device = "auto",
    dtype: Dtype = "fp32",
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Most tokens to decode for each prompt.")] = 64,
    max_prompt_tokens: Annotated[int, typer.Option(min=1, help="A longer prompt is cut here.")] = 128,
    batch: Annotated[int, typer.Option(min=1, max=MOST_BATCH, help="Sequences decoded together, in lock-step.")] = 1,
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

      moetwin decode --routing mixed --systems mixtral-offloading,hybrimoe,ktransformers --calibration code --out runs

      moetwin decode --model olmoe-1b-7b --random-weights --routing mine.safetensors --gpu-memory 8GiB --dtype bf16
    """
    own = {"evict": evict, "place": place, "prefetch": prefetch, "scope": scope, "synchronous": synchronous}
    chosen = options.chosen_systems(system, systems, policy_file or (), option or (), own)
    texts = _Texts(prompt, prompts, domains)
    recorded = _recorded(routing, texts, trace_out)
    fitted = options.calibration_of(calibration, recorded, batch)
    limits = Limits(batch, cache, gpu_memory, fitted, together=systems is not None, profile=profile)
    if recorded is None:
        _check_decoding(chosen, limits, repeats, random_weights)
    outputs = _Outputs(out, trace_out, repeats, force, () if systems is None else tuple(one.name for one in chosen))
    job: TraceJob | PromptJob
    if recorded is not None:
        job = TraceJob(recorded, chosen, limits, repeats)
    else:
        shown, full = not as_json and batch == 1, trace_out is not None
        generation = Generation(max_prompt_tokens, max_new_tokens, temperature, seed, shown, full)
        job = PromptJob(texts.read(), chosen[0], limits, generation)
    job.check(_dimensions(model, dtype, random_weights))
    with machine_of(model, dtype=dtype, device=device, random_weights=random_weights, seed=seed) as machine:
        runs, trace = job.run(machine)
    told = outputs.save(runs, trace)
    if systems is None:
        options.show_run(runs[0][_fastest(runs[0])], as_json=as_json, **told)
    else:
        fastest = [repeated[_fastest(repeated)] for repeated in runs]
        options.show_runs([(run.info.system["name"], run) for run in fastest], job.left_out, as_json=as_json)


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
    if out.suffix != ".toml":
        raise InputError(f"out must end in .toml, as a profile is such a file, got {out}")
    with (
        machine_of(model, dtype=dtype, device=device, random_weights=random_weights, seed=seed) as machine,
        status("calibrating") as say,
    ):
        from real.calibrate import calibrate as measure

        profile = measure(machine, name=name or machine.hardware, repeats=repeats, seed=seed, progress=say)
    profile.save(out, force=force)
    Console(highlight=False).print(f"profile: {out} ({profile.digest[:12]})", soft_wrap=True)


def _dimensions(model: str, dtype: str, random_weights: bool) -> ModelSpec:
    """What is known of a model before it is loaded; raises :class:`InputError` for one that cannot be."""
    if dtype not in DTYPE_OF.values():
        raise unknown_name("dtype", dtype, set(DTYPE_OF.values()))
    if random_weights != (model == SMALL) and model in catalogue.model_names():
        return catalogue.model(model).in_dtype(dtype)  # at once, where transformers takes seconds to be imported
    check_model(model, random_weights=random_weights)
    with status("loading"):
        from real.models.load import dimensions

        return dimensions(model, dtype=dtype, random_weights=random_weights)


@contextmanager
def machine_of(
    model: str, *, dtype: str = "fp32", device: str = "auto", random_weights: bool = False, seed: int = 0
) -> Iterator[Machine]:
    """Loads a model on a device, with its experts on the host; the device is closed in the end."""
    check_model(model, random_weights=random_weights)
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


@dataclass(frozen=True)
class _Outputs:
    """Where the runs and the trace go; raises :class:`InputError` for what could not be written after the work.

    ``systems`` are the names of the folders inside ``out`` where several systems run side by side.
    """

    out: Path | None
    trace_out: Path | None
    repeats: int
    force: bool
    systems: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.out is None and self.repeats > 1:
            raise InputError(f"out must be given for {self.repeats} repeats, which are written side by side, got none")
        if self.systems and self.out is not None:
            check_folder(self.out, force=self.force)
            return
        for number in range(1, self.repeats + 1):
            if self.out is not None:
                check_folder(_numbered(self.out, number), force=self.force)
        after = None if self.out is None else _numbered(self.out, self.repeats + 1)
        if self.repeats > 1 and after is not None and after.exists():
            raise InputError(f"out must have no folder of more repeats beside it, got {after}, which exists")
        if self.trace_out is not None:
            self._check_trace_out(self.trace_out)

    def save(self, runs: Sequence[Sequence[RunResult]], trace: Trace) -> dict[str, str]:
        """Writes what was asked for: DIR, DIR-2, DIR-3 and so on, of several systems DIR/NAME, DIR/NAME-2 and so on.

        Returns what to tell of it.
        """
        saved = [self._save(repeated) for repeated in runs] if self.out is not None else []
        told = {"result": ", ".join(saved[0])} if saved else {}
        if saved and len(saved[0]) > 1:
            told["shown"] = (
                f"{saved[0][_fastest(runs[0])]}, whose median token is the fastest of {len(saved[0])} repeats"
            )
        if self.trace_out is not None:
            told["trace"] = str(store.save(trace, self.trace_out, force=self.force))
        return told

    def _save(self, repeated: Sequence[RunResult]) -> list[str]:
        assert self.out is not None, "only called where there is somewhere to write"
        folder = self.out / repeated[0].info.system["name"] if self.systems else self.out
        return [
            str(run.save(_numbered(folder, number), force=self.force)) for number, run in enumerate(repeated, start=1)
        ]

    def _check_trace_out(self, path: Path) -> None:
        try:
            store.check_trace_target(path, force=self.force)
        except TraceError as error:
            raise InputError(f"trace-{error}") from error  # it speaks of out
        file = path.resolve()
        folders = [] if self.out is None else [_numbered(self.out, number) for number in range(1, self.repeats + 1)]
        for folder in (folder.resolve() for folder in folders):
            if folder == file or folder in file.parents or file in folder.parents:
                raise InputError(f"trace-out must be apart from the folder of out, got {path}")


def _numbered(folder: Path, number: int) -> Path:
    """The folder of a repeat: DIR, DIR-2, DIR-3 and so on."""
    if number == 1:
        return folder
    named = folder if folder.name not in ("", "..") else folder.resolve()
    return Path(f"{named}-{number}")


def _fastest(runs: Sequence[RunResult]) -> int:
    """Which run has the fastest median token: the first of equals, and of runs that decode nothing."""
    medians = [run.headline()["time_per_output_token_p50_s"] for run in runs]
    return min(range(len(runs)), key=lambda index: medians[index] or 0.0)


@dataclass(frozen=True)
class _Texts:
    """The prompts, as they were asked for."""

    prompt: str | None
    prompts: Path | None
    domains: str | None

    @property
    def given(self) -> bool:
        return not (self.prompt is None and self.prompts is None and self.domains is None)

    def read(self) -> list[Prompt]:
        """The prompts themselves; raises :class:`InputError` for options that contradict each other."""
        if self.prompt is None:
            return choose(load_prompts(self.prompts or SHIPPED_PROMPTS), self.domains)
        if self.prompts is not None or self.domains is not None:
            raise InputError("prompt must be given without prompts and domains, got both")
        if not self.prompt.strip():
            raise InputError("prompt must hold text, got an empty one")
        prompt_files.check_characters(self.prompt, "prompt")
        return [Prompt("prompt", self.prompt)]


def _recorded(routing: str | None, texts: _Texts, trace_out: Path | None) -> Trace | None:
    """The trace whose routing is forced, if any; raises :class:`InputError` for options that contradict it."""
    if routing is None:
        return None
    if texts.given or trace_out is not None:
        raise InputError("routing must be given without prompts, domains and trace-out, got both")
    return options.read_trace(routing, "routing")


def _check_decoding(systems: Sequence[Preset], limits: Limits, repeats: int, random_weights: bool) -> None:
    """Raises :class:`InputError` for what only a forced routing can have."""
    if random_weights:
        raise InputError("routing must be given with random-weights (they read no prompts), got none")
    if repeats > 1:
        raise InputError(f"repeats must be 1 without routing, got {repeats}")
    if len(systems) > 1:
        raise InputError(f"routing must be given to run {len(systems)} systems side by side, got none")
    if systems[0].sim_only:
        raise InputError(f"system must be one that real models can run, got {systems[0].name}, which is simulated only")
    check_causal(limits.fitted(systems[0])[0], limits.calibration)
