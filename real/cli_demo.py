"""``moetwin demo``, the half that runs: decode and record, measure, calibrate, simulate on what was recorded."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

from real.calibrate import calibrate
from real.cli_run import machine_of
from real.decode import Machine, decode, replay
from real.generate import Sampler
from real.jobs import predicted_costs
from real.progress import bar, status
from real.record import encode
from sim.costs import Costs
from sim.profile import ProfileCosts
from sim.results import RunResult, check_folder
from sim.run import simulate
from sim.spec.profile import Profile
from sim.systems import Budget, SystemSpec, parse_capacity
from traces.prompts import SHIPPED_PROMPTS, digest, load_prompts
from traces.schema import Trace
from traces.workload import one_at_a_time

FOLDER = Path("moetwin-demo")
MODEL, CACHE = "moetwin-small", "25%"
PROMPT_TOKENS, NEW_TOKENS = 48, 40


@dataclass(frozen=True)
class Shown:
    """What the demo made: measured and simulated runs of one workload, and what belongs to them.

    ``samples`` are prompts with their continuations, ``facts`` what the runs were made on, ``folder`` where all of it
    goes, over other files where ``force`` says so.
    """

    folder: Path
    force: bool
    trace: Trace
    samples: list[tuple[str, str]]
    profile: Profile
    measured: list[RunResult]
    simulated: RunResult
    facts: dict[str, str]


def demo(
    out: Annotated[Path, typer.Option(help="Folder for the report, the trace, the profile and both runs.")] = FOLDER,
    device: Annotated[str, typer.Option(help="cpu, cuda, or auto for a GPU where there is one.")] = "auto",
    repeats: Annotated[int, typer.Option(min=2, help="Measured runs; each token's fastest one counts.")] = 7,
    force: Annotated[bool, typer.Option("--force", help="Write into a folder that holds other files.")] = False,
) -> Shown:
    """Run the whole twin on the small model that ships: decode, record, calibrate, simulate, compare, report.

    A real model decodes real prompts with a quarter of its experts on the device; the same policy objects then run in
    simulated time on what was recorded, with costs measured on this machine.

    Examples:

      moetwin demo

      moetwin demo --device cuda --out demo-gpu
    """
    check_folder(out, force=force)
    system = SystemSpec()
    with machine_of(MODEL, device=device) as machine:
        spec = machine.loaded.spec
        budget, rough = parse_capacity(CACHE, layers=spec.moe_layers, experts=spec.experts), predicted_costs(spec)
        trace, samples = _decoded(machine, system, budget, rough)
        workload = one_at_a_time(trace)
        with bar("measuring", repeats * len(workload)) as advance:
            runs = [replay(machine, workload, system, budget, rough, progress=advance) for _ in range(repeats)]
        with status("calibrating this machine") as say:
            profile = calibrate(machine, name=machine.hardware, progress=say)
    simulated = simulate(workload, system, budget, ProfileCosts(profile, spec), hardware=profile.name)
    facts = {"device": _device_line(machine), **profile.machine}
    return Shown(out, force, trace, samples, profile, runs, simulated, facts)


def _decoded(machine: Machine, system: SystemSpec, budget: Budget, costs: Costs) -> tuple[Trace, list[tuple[str, str]]]:
    """The routing of one prompt of every domain that ships, sampled with seed 0; each prompt with its continuation."""
    every = load_prompts(SHIPPED_PROMPTS)
    prompts = list({prompt.domain: prompt for prompt in reversed(every)}.values())[::-1]
    encoded = [tokens[:PROMPT_TOKENS] for tokens in encode(machine.loaded, prompts)]
    with bar("decoding", len(prompts) * NEW_TOKENS) as advance:
        _, trace, tokens = decode(
            machine,
            encoded,
            system,
            budget,
            costs,
            max_new_tokens=NEW_TOKENS,
            sampler=Sampler(temperature=0.8),
            progress=advance,
            domains=tuple(prompt.domain for prompt in prompts),
            prompts_digest=digest(prompts),
        )
    return trace, [(machine.text(start), machine.text(new)) for start, new in zip(encoded, tokens, strict=True)]


def _device_line(machine: Machine) -> str:
    if machine.device.name == "cuda":
        return f"GPU {machine.hardware}"
    return "no GPU was found or asked for: the CPU played its role"
