"""What `moetwin decode` runs under a memory limit: prompts to be continued, or the routing of a trace."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import typer

from real.checks import check_temperature
from real.cli import unused_lanes
from real.memory import on_gpu, workspace_bytes
from real.progress import bar, status
from sim.costs import Costs, RooflineCosts
from sim.memory import MemoryPlan
from sim.needs import check_needs, has_residuals, learned_digest, router_means
from sim.presets import Preset
from sim.profile import ProfileCosts, other_threads
from sim.results import RunResult
from sim.spec import ModelSpec, catalogue
from sim.spec.profile import Profile
from sim.systems import Budget, SystemSpec
from sim.target import budget_of, lanes_of, retarget, workload_of
from traces import prompts as prompt_files
from traces.errors import InputError
from traces.prompts import Prompt
from traces.schema import Trace
from traces.workload import Workload

if TYPE_CHECKING:  # torch and transformers are imported when a model is run, not to print a help text
    from real.decode import Machine
    from real.generate import Sampler
    from sim.replay.calibration import TraceCalibration


LEFT_OUT = (
    "choices that the model cannot make were left out of the trace: its encoder routes only what is read, its decoder "
    "only what is written (--trace-out writes the trace that ran)"
)


class Limits:
    """The memory limit as it was asked for, to be worked out once the model and its longest sequence are known; and
    the trace that policies are fitted to. ``together``: several systems get the same bytes, whatever their scope.
    ``profile`` is what policies that weigh costs are told of this machine; ``context``, in place of the longest
    sequence, how many tokens of KV cache there has to be room for; ``device`` where all that is."""

    def __init__(
        self,
        batch: int,
        cache: str | None,
        gpu_memory: str | None,
        calibration: TraceCalibration | None,
        *,
        together: bool = False,
        profile: Path | None = None,
        context: int | None = None,
        device: str = "cpu",
    ) -> None:
        self.batch, self.calibration, self._together, self.profile = batch, calibration, together, profile
        self._given: dict[str, Any] = {"cache": cache, "gpu_memory": gpu_memory}
        self._context, self._device = context, device

    def budget(self, preset: Preset, spec: ModelSpec, size: Size) -> tuple[Budget, MemoryPlan]:
        """The slots beside everything else that a run of ``size`` needs, and the bytes of all.

        Raises :class:`InputError`, with the least that would do, when not even one expert fits.
        """
        if self._context is not None and self._context < size.context:
            raise InputError(f"context must be at least the {size.context} tokens of a sequence, got {self._context}")
        context = self._context or size.context
        workspace = workspace_bytes(spec, lanes=size.lanes, rows=size.rows, context=context, gpu=on_gpu(self._device))
        scope = preset.system.scope
        measure = "layer" if self._together else scope
        even = budget_of(
            spec, lanes=size.lanes, context=context, scope=measure, workspace_bytes=workspace, **self._given
        )
        if measure != scope:
            even = even.model_copy(update={"slots": even.slots * spec.moe_layers})
        budget = preset.budget(even, layers=spec.moe_layers, experts=spec.experts, calibration=self.calibration)
        plan = MemoryPlan.of(spec, budget, scope=scope, lanes=size.lanes, context=context, workspace_bytes=workspace)
        return budget, plan

    def costs(self, spec: ModelSpec) -> Costs:
        """What policies that weigh costs are told; raises :class:`InputError` for a profile of another model or device.

        A result names them, whether its policies asked or not.
        """
        costs = predicted_costs(spec, self.profile)
        if isinstance(costs, ProfileCosts):
            measured, device = costs.profile.device, "cuda" if on_gpu(self._device) else "cpu"
            if measured != device:
                raise InputError(f"profile must be measured on the device of the run, {device}, got one of {measured}")
        return costs

    def doubts(self, system: SystemSpec, costs: Costs) -> list[str]:
        """What has to be told of the costs that the system's policies weighed."""
        if isinstance(costs, ProfileCosts):
            return _other_machine(costs.profile)
        weighs = system.place not in ("fetch", "cpu-on-miss", "static") or system.prefetch == "impact"
        if not weighs:
            return []
        machine = catalogue.REFERENCE_MACHINE
        return [f"policies weighed the costs of {machine}, not of this machine (give --profile for its own)"]

    def noted(self, run: RunResult, plan: MemoryPlan, costs: Costs, notes: list[str]) -> RunResult:
        """The run with what it was told beforehand, the memory that was planned, and ``notes`` before its own."""
        threads = other_threads(costs.profile, run.info.cpu_threads) if isinstance(costs, ProfileCosts) else []
        told = {"costs": costs.name, "calibration_digest": learned_digest(self.calibration)}
        changed = {**told, "memory": plan.model_dump(), "notes": [*notes, *threads, *run.info.notes]}
        run.info = run.info.model_copy(update=changed)
        return run

    def fitted(self, preset: Preset, trace: Trace | None = None) -> tuple[SystemSpec, list[str]]:
        """The system as it runs with the calibration and the look-ahead of ``trace`` there are, and what has to be told
        of that; without a trace the calibration's residuals correct the look-ahead."""
        residuals = bool(router_means(self.calibration)) if trace is None else has_residuals(trace)
        return preset.fitted(calibrated=self.calibration is not None, residuals=residuals)


class Size(NamedTuple):
    """How much runs at once: sequences, the most tokens of one forward pass, and of one sequence's KV cache."""

    lanes: int
    rows: int
    context: int

    @classmethod
    def of(cls, workload: Workload, context: int) -> Size:
        """That of a trace's forward passes, the longest of whose KV caches has ``context`` tokens."""
        return cls(lanes_of(workload), max(len(step.tokens) * max(step.tokens) for step in workload), context)


@dataclass(frozen=True)
class Generation:
    """How prompts are continued, whether the text is shown, and whether the routing is recorded in full.

    Raises :class:`InputError` for a temperature that is none.
    """

    max_prompt_tokens: int
    max_new_tokens: int
    temperature: float
    seed: int
    show: bool
    full_trace: bool
    stop: Sequence[str] = ()

    def __post_init__(self) -> None:
        check_temperature(self.temperature)

    def sampler(self) -> Sampler:
        """What chooses the tokens."""
        with status("loading"):
            from real.generate import Sampler

        return Sampler(self.temperature, seed=self.seed)

    def cut(self, encoded: Sequence[Sequence[int]]) -> tuple[list[list[int]], list[str]]:
        """The prompts as far as they are read, and what has to be told of that."""
        most = self.max_prompt_tokens
        longer = sum(len(tokens) > most for tokens in encoded)
        told = [f"prompts were cut after {most} tokens (--max-prompt-tokens): {longer} of {len(encoded)}"]
        return [[*tokens[:most]] for tokens in encoded], told if longer else []


class TraceJob:
    """A trace's routing, run ``repeats`` times under each of ``systems``."""

    def __init__(self, trace: Trace, systems: Sequence[Preset], limits: Limits, repeats: int) -> None:
        self._trace, self._systems, self._limits, self._repeats = trace, [*systems], limits, repeats
        self.left_out: dict[str, str] = {}
        """Systems that cannot run here, and why."""
        self.told: dict[str, Any] = {}
        self._plans: dict[str, MemoryPlan] = {}

    def check(self, spec: ModelSpec) -> MemoryPlan:
        """The memory that the run needs, of several systems the one that needs most.

        Raises :class:`InputError` for a trace or a limit that does not fit a model that has yet to be loaded; of
        several systems, those that cannot run are left out, unless none can.
        """
        _check_dimensions(self._trace, spec)
        self._limits.costs(spec)
        workload, context = workload_of(self._trace, spec, self._limits.batch)
        size = Size.of(workload, context)

        def checked(preset: Preset) -> None:
            if preset.sim_only:
                raise InputError(f"system must be one that real models can run, got {preset.name}, simulated only")
            self._plans[preset.name] = self._limits.budget(preset, spec, size)[1]
            check_needs(workload.trace, self._limits.fitted(preset, workload.trace)[0], self._limits.calibration)

        self._keep(checked)
        return max((self._plans[preset.name] for preset in self._systems), key=lambda plan: plan.total_bytes)

    def find_room(self, check: Callable[[MemoryPlan], None]) -> None:
        """Leaves out systems whose memory ``check`` refuses; raises its :class:`InputError` when none is left."""
        self._keep(lambda preset: check(self._plans[preset.name]))

    def _keep(self, check: Callable[[Preset], None]) -> None:
        for preset in [*self._systems]:
            try:
                check(preset)
            except InputError as error:
                if len(self._systems) == 1:
                    raise
                self._systems.remove(preset)
                self.left_out[preset.name] = str(error)

    def run(self, machine: Machine) -> tuple[list[list[RunResult]], Trace]:
        """The repeats of every system, which take turns, so that a disturbance of the machine meets all of them; and
        the trace that ran."""
        from real.decode import replay
        from real.routing import routable

        spec, limits = machine.loaded.spec, self._limits
        trace = routable(self._trace, machine.loaded.encoder_layers)
        told = [] if trace is self._trace else [LEFT_OUT]
        workload, context = workload_of(trace, spec, limits.batch)
        costs, size = limits.costs(spec), Size.of(workload, context)
        runs: list[list[RunResult]] = [[] for _ in self._systems]
        with bar("replaying", self._repeats * len(self._systems) * len(workload)) as advance:
            for _ in range(self._repeats):
                for preset, done in zip(self._systems, runs, strict=True):
                    system, notes = limits.fitted(preset, workload.trace)
                    budget, plan = limits.budget(preset, spec, size)
                    run = replay(
                        machine, workload, system, budget, costs, calibration=limits.calibration, progress=advance
                    )
                    done.append(limits.noted(run, plan, costs, [*told, *notes, *limits.doubts(system, costs)]))
        return runs, workload.trace


class PromptJob:
    """Prompts, and how they are continued."""

    left_out: Mapping[str, str] = {}

    def __init__(self, texts: Sequence[Prompt], preset: Preset, limits: Limits, generation: Generation) -> None:
        self._texts, self._preset, self._limits, self._generation = texts, preset, limits, generation
        self._lanes = min(limits.batch, len(texts))
        self.told: dict[str, Any] = {}
        """Of a run: the continuation of every prompt."""

    def check(self, spec: ModelSpec) -> MemoryPlan:
        """The memory that the shortest prompts would need.

        Raises :class:`InputError` for a limit that does not even fit these.
        """
        self._limits.costs(spec)
        self._plan = self._limits.budget(self._preset, spec, self._size([[0]]))[1]
        self._sampler = self._generation.sampler()
        return self._plan

    def find_room(self, check: Callable[[MemoryPlan], None]) -> None:
        """Raises the :class:`InputError` of ``check`` when it refuses the memory."""
        check(self._plan)

    def run(self, machine: Machine) -> tuple[list[list[RunResult]], Trace]:
        """One run of one system."""
        from real.decode import decode as decode_prompts
        from real.record import check_positions, encode

        limits, generation = self._limits, self._generation
        encoded, cut = generation.cut(encode(machine.loaded, self._texts))
        check_positions(machine.loaded, encoded, generation.max_new_tokens)
        system, notes = limits.fitted(self._preset)
        budget, plan = limits.budget(self._preset, machine.loaded.spec, self._size(encoded))
        told = [*unused_lanes(limits.batch, len(encoded)), _recording(generation)]
        costs = limits.costs(machine.loaded.spec)
        with self._shown(machine, encoded) as shown:
            run, trace, new = decode_prompts(
                machine,
                encoded,
                system,
                budget,
                costs,
                calibration=limits.calibration,
                batch=limits.batch,
                max_new_tokens=generation.max_new_tokens,
                sampler=self._sampler,
                stop=generation.stop,
                domains=tuple(prompt.domain for prompt in self._texts),
                prompts_digest=prompt_files.digest(self._texts),
                made_by="moetwin decode",
                full_trace=generation.full_trace,
                **shown,
            )
        self.told = {"texts": [machine.text(tokens) for tokens in new]}
        if generation.show and self._lanes > 1:
            show = announce(machine, encoded)
            for index, text in enumerate(self.told["texts"]):
                show(index)
                typer.echo(text, nl=False)
            typer.echo()
        run = limits.noted(run, plan, costs, [*notes, *limits.doubts(system, costs), *cut, *told])
        run.info = run.info.model_copy(update={"recorded": _recorded(generation)})
        return [[run]], trace

    def _size(self, encoded: Sequence[Sequence[int]]) -> Size:
        longest = max(map(len, encoded))
        return Size(self._lanes, self._lanes * longest, longest + self._generation.max_new_tokens)

    @contextmanager
    def _shown(self, machine: Machine, encoded: Sequence[Sequence[int]]) -> Iterator[dict[str, Any]]:
        """What shows the text as it grows, or how far the run is where there is not one text at a time."""
        if not (self._generation.show and self._lanes == 1):
            batches = -(-len(encoded) // self._lanes)
            with bar("decoding", batches * self._generation.max_new_tokens) as advance:
                yield {"progress": advance}
            return
        try:
            yield {"on_prompt": announce(machine, encoded), "on_text": lambda text: typer.echo(text, nl=False)}
        finally:
            typer.echo()  # what follows, an error included, gets a line of its own


def _recorded(generation: Generation) -> str:
    """What is taken down while prompts are continued; the experts always are, as they are what the run has run."""
    return "experts, weights, scores and look-ahead" if generation.full_trace else "experts and weights"


def _recording(generation: Generation) -> str:
    return f"routing was recorded ({_recorded(generation)}), which is a part of the dense layers' time"


def _other_machine(profile: Profile) -> list[str]:
    """What a profile was measured on, where that is not this machine."""
    from real.calibrate import describe_machine

    here = describe_machine()
    parts = ("processor", "gpu") if profile.device == "cuda" else ("processor",)
    return [
        f"the profile was measured with the {part} {profile.machine.get(part, 'unknown')}, not this machine's "
        f"{here.get(part, 'unknown')}"
        for part in parts
        if profile.machine.get(part) != here.get(part)
    ]


def _check_dimensions(trace: Trace, spec: ModelSpec) -> None:
    """Raises :class:`InputError`, with the way out, for a trace of another model's dimensions."""
    try:
        retarget(trace, spec)
    except InputError as error:
        raise InputError(
            f"{error} (`moetwin trace like` makes routing of any dimensions in the manner of a trace)"
        ) from error


def predicted_costs(spec: ModelSpec, profile: Path | None = None) -> Costs:
    """Predicted costs, for policies that weigh them: a profile's, or those of the catalogue's reference machine.

    Raises :class:`InputError` for a profile that was measured with another model.
    """
    if profile is None:
        return RooflineCosts(spec, catalogue.hardware(catalogue.REFERENCE_MACHINE))
    return ProfileCosts(Profile.load(profile), spec)


def announce(machine: Machine, encoded: Sequence[Sequence[int]]) -> Callable[[int], None]:
    """What shows the text of a prompt, to be followed by its continuation."""

    def show(index: int) -> None:
        typer.secho(("\n\n" if index else "\n") + machine.text(encoded[index]), dim=True, nl=False)

    return show
