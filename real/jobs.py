"""What `moetwin decode` runs under a memory limit: prompts to be continued, or the routing of a trace."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import typer

from real.progress import bar, status
from sim.costs import Costs, RooflineCosts
from sim.results import RunResult
from sim.run import check_needs
from sim.spec import ModelSpec, catalogue
from sim.systems import Budget, SystemSpec
from sim.target import budget_of, workload_of
from traces import prompts as prompt_files
from traces.prompts import Prompt
from traces.schema import Trace

if TYPE_CHECKING:  # torch and transformers are imported when a model is run, not to print a help text
    from real.decode import Machine
    from real.generate import Sampler
    from sim.replay.calibration import TraceCalibration


class Limits:
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
class Generation:
    """How prompts are continued, whether the text is shown as it grows, and whether the routing is recorded in full."""

    max_prompt_tokens: int
    max_new_tokens: int
    temperature: float
    seed: int
    stream: bool
    full_trace: bool

    def sampler(self) -> Sampler:
        """Raises :class:`InputError` for a temperature that is none."""
        with status("loading"):
            from real.generate import Sampler

        return Sampler(self.temperature, seed=self.seed)


class TraceJob:
    """A trace's routing, run ``repeats`` times."""

    def __init__(self, trace: Trace, system: SystemSpec, limits: Limits, repeats: int) -> None:
        self._trace, self._system, self._limits, self._repeats = trace, system, limits, repeats

    def check(self, spec: ModelSpec) -> None:
        """Raises :class:`InputError` for a trace or a limit that does not fit a model that has yet to be loaded."""
        workload, context = workload_of(self._trace, spec, self._limits.batch)
        self._limits.budget(spec, context)
        check_needs(workload.trace, self._system, self._limits.calibration)

    def run(self, machine: Machine) -> tuple[list[RunResult], Trace]:
        from real.decode import replay

        spec, limits = machine.loaded.spec, self._limits
        workload, context = workload_of(self._trace, spec, limits.batch)
        budget, costs = limits.budget(spec, context), rough_costs(spec)
        with bar("replaying", self._repeats * len(workload)) as advance:
            runs = [
                replay(machine, workload, self._system, budget, costs, calibration=limits.calibration, progress=advance)
                for _ in range(self._repeats)
            ]
        return runs, self._trace


class PromptJob:
    """Prompts, and how they are continued."""

    def __init__(self, texts: Sequence[Prompt], system: SystemSpec, limits: Limits, generation: Generation) -> None:
        self._texts, self._system, self._limits, self._generation = texts, system, limits, generation

    def check(self, spec: ModelSpec) -> None:
        """Raises :class:`InputError` for a limit that does not even fit the shortest prompt, and for no temperature."""
        self._limits.budget(spec, 1 + self._generation.max_new_tokens)
        self._sampler = self._generation.sampler()

    def run(self, machine: Machine) -> tuple[list[RunResult], Trace]:
        from real.decode import decode as decode_prompts
        from real.record import encode

        spec, limits, generation = machine.loaded.spec, self._limits, self._generation
        encoded = [tokens[: generation.max_prompt_tokens] for tokens in encode(machine.loaded, self._texts)]
        shown: dict[str, Any] = {}
        if generation.stream:
            shown = {"on_prompt": announce(machine, encoded), "on_text": lambda text: typer.echo(text, nl=False)}
        run, trace, _ = decode_prompts(
            machine,
            encoded,
            self._system,
            limits.budget(spec, max(map(len, encoded)) + generation.max_new_tokens),
            rough_costs(spec),
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
        return [run], trace


def rough_costs(spec: ModelSpec) -> Costs:
    """Predicted costs, for placement policies that weigh them."""
    return RooflineCosts(spec, catalogue.hardware(catalogue.REFERENCE_MACHINE))


def announce(machine: Machine, encoded: Sequence[Sequence[int]]) -> Callable[[int], None]:
    """What shows the text of a prompt, to be followed by its continuation."""

    def show(index: int) -> None:
        typer.secho(("\n\n" if index else "\n") + machine.text(encoded[index]), dim=True, nl=False)

    return show
