"""What `moetwin decode` runs under a memory limit: prompts to be continued, or the routing of a trace."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from real.checks import check_temperature
from real.progress import bar, status
from sim.costs import Costs, RooflineCosts
from sim.needs import check_needs
from sim.presets import Preset
from sim.profile import ProfileCosts
from sim.results import RunResult
from sim.spec import ModelSpec, catalogue
from sim.spec.profile import Profile
from sim.systems import Budget, SystemSpec
from sim.target import budget_of, lanes_of, workload_of
from traces import prompts as prompt_files
from traces.errors import InputError
from traces.prompts import Prompt
from traces.schema import Trace

if TYPE_CHECKING:  # torch and transformers are imported when a model is run, not to print a help text
    from real.decode import Machine
    from real.generate import Sampler
    from sim.replay.calibration import TraceCalibration


class Limits:
    """The memory limit as it was asked for, to be worked out once the model and its longest sequence are known; and
    the trace that policies are fitted to. ``together``: several systems get the same bytes, whatever their scope.
    ``profile`` is what policies that weigh costs are told of this machine."""

    def __init__(
        self,
        batch: int,
        cache: str | None,
        gpu_memory: str | None,
        calibration: TraceCalibration | None,
        *,
        together: bool = False,
        profile: Path | None = None,
    ) -> None:
        self.batch, self.calibration, self._together, self.profile = batch, calibration, together, profile
        self._given: dict[str, Any] = {"cache": cache, "gpu_memory": gpu_memory}

    def budget(self, preset: Preset, spec: ModelSpec, lanes: int, context: int) -> Budget:
        """The slots beside a KV cache of ``context`` tokens in each of ``lanes``."""
        scope = preset.system.scope
        measure = "layer" if self._together else scope
        even = budget_of(spec, lanes=lanes, context=context, scope=measure, **self._given)
        if measure != scope:
            even = even.model_copy(update={"slots": even.slots * spec.moe_layers})
        return preset.budget(even, layers=spec.moe_layers, experts=spec.experts, calibration=self.calibration)

    def doubts(self, system: SystemSpec) -> list[str]:
        """What has to be told of the costs that the system's policies weighed."""
        weighs = system.place not in ("fetch", "cpu-on-miss", "static") or system.prefetch == "impact"
        if self.profile is not None or not weighs:
            return []
        machine = catalogue.REFERENCE_MACHINE
        return [f"policies weighed the costs of {machine}, not of this machine (give --profile for its own)"]

    def fitted(self, preset: Preset) -> tuple[SystemSpec, list[str]]:
        """The system as it runs with the calibration there is, and what has to be told of that."""
        return preset.fitted(calibrated=self.calibration is not None)


@dataclass(frozen=True)
class Generation:
    """How prompts are continued, whether the text is shown as it grows, and whether the routing is recorded in full.

    Raises :class:`InputError` for a temperature that is none.
    """

    max_prompt_tokens: int
    max_new_tokens: int
    temperature: float
    seed: int
    stream: bool
    full_trace: bool

    def __post_init__(self) -> None:
        check_temperature(self.temperature)

    def sampler(self) -> Sampler:
        """What chooses the tokens."""
        with status("loading"):
            from real.generate import Sampler

        return Sampler(self.temperature, seed=self.seed)


class TraceJob:
    """A trace's routing, run ``repeats`` times under each of ``systems``."""

    def __init__(self, trace: Trace, systems: Sequence[Preset], limits: Limits, repeats: int) -> None:
        self._trace, self._systems, self._limits, self._repeats = trace, [*systems], limits, repeats
        self.left_out: dict[str, str] = {}
        """Systems that cannot run here, and why."""

    def check(self, spec: ModelSpec) -> None:
        """Raises :class:`InputError` for a trace or a limit that does not fit a model that has yet to be loaded; of
        several systems, those that cannot run are left out, unless none can."""
        workload, context = workload_of(self._trace, spec, self._limits.batch)
        for preset in [*self._systems]:
            try:
                if preset.sim_only:
                    raise InputError(f"system must be one that real models can run, got {preset.name}, simulated only")
                self._limits.budget(preset, spec, lanes_of(workload), context)
                check_needs(workload.trace, self._limits.fitted(preset)[0], self._limits.calibration)
            except InputError as error:
                if len(self._systems) == 1:
                    raise
                self._systems.remove(preset)
                self.left_out[preset.name] = str(error)

    def run(self, machine: Machine) -> tuple[list[list[RunResult]], Trace]:
        """The repeats of every system; these take turns, so that a disturbance of the machine meets all of them."""
        from real.decode import replay

        spec, limits = machine.loaded.spec, self._limits
        workload, context = workload_of(self._trace, spec, limits.batch)
        costs = predicted_costs(spec, limits.profile)
        runs: list[list[RunResult]] = [[] for _ in self._systems]
        with bar("replaying", self._repeats * len(self._systems) * len(workload)) as advance:
            for _ in range(self._repeats):
                for preset, done in zip(self._systems, runs, strict=True):
                    system, notes = limits.fitted(preset)
                    budget = limits.budget(preset, spec, lanes_of(workload), context)
                    run = replay(
                        machine, workload, system, budget, costs, calibration=limits.calibration, progress=advance
                    )
                    done.append(_noted(run, [*notes, *limits.doubts(system)]))
        return runs, self._trace


class PromptJob:
    """Prompts, and how they are continued."""

    left_out: Mapping[str, str] = {}

    def __init__(self, texts: Sequence[Prompt], preset: Preset, limits: Limits, generation: Generation) -> None:
        self._texts, self._preset, self._limits, self._generation = texts, preset, limits, generation
        self._lanes = min(limits.batch, len(texts))

    def check(self, spec: ModelSpec) -> None:
        """Raises :class:`InputError` for a limit that does not even fit the shortest prompt."""
        self._limits.budget(self._preset, spec, self._lanes, 1 + self._generation.max_new_tokens)
        self._sampler = self._generation.sampler()

    def run(self, machine: Machine) -> tuple[list[list[RunResult]], Trace]:
        """One run of one system."""
        from real.decode import decode as decode_prompts
        from real.record import encode

        spec, limits, generation = machine.loaded.spec, self._limits, self._generation
        encoded = [tokens[: generation.max_prompt_tokens] for tokens in encode(machine.loaded, self._texts)]
        shown: dict[str, Any] = {}
        if generation.stream:
            shown = {"on_prompt": announce(machine, encoded), "on_text": lambda text: typer.echo(text, nl=False)}
        system, notes = limits.fitted(self._preset)
        run, trace, _ = decode_prompts(
            machine,
            encoded,
            system,
            limits.budget(self._preset, spec, self._lanes, max(map(len, encoded)) + generation.max_new_tokens),
            predicted_costs(spec, limits.profile),
            calibration=limits.calibration,
            batch=limits.batch,
            max_new_tokens=generation.max_new_tokens,
            sampler=self._sampler,
            domains=tuple(prompt.domain for prompt in self._texts),
            prompts_digest=prompt_files.digest(self._texts),
            made_by="moetwin decode",
            full_trace=generation.full_trace,
            **shown,
        )
        if generation.stream:
            typer.echo()
        return [[_noted(run, [*notes, *limits.doubts(system)])]], trace


def _noted(run: RunResult, notes: list[str]) -> RunResult:
    run.info = run.info.model_copy(update={"notes": [*notes, *run.info.notes]})
    return run


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
