"""How close the simulator comes on this machine: calibrated on synthetic routing, judged on recorded routing.

A model with random weights and experts of 12.6 MB (8 layers x 32 experts, top-4) replays recorded routing for real:
the beginning of one sequence of each of several domains, under systems and cache sizes that the calibration did not
see. A point is one decode token's fastest of several interleaved repeats; the error of a point is
|simulated - measured| / measured. Beside it stand the noise of the repeats, and the skill: our median error over that
of a constant, each system's own mean token in runs on synthetic routing. No number is fitted on what is judged.

    python -m benchmarks.fidelity --out analysis/results/NAME [--trace TRACE] [--repeats 7] [--tokens 12] [--domains 4]
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import pandas as pd
import typer
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from analysis import metrics
from analysis.compare import Comparison, compare
from real.calibrate import calibrate
from real.decode import Machine, replay
from real.device import open_device
from real.fit import token_s
from real.models.load import load, load_spec
from sim.costs import Costs
from sim.profile import ProfileCosts
from sim.results import RunResult, check_folder, write_folder
from sim.run import simulate
from sim.spec import ModelSpec
from sim.spec.profile import Profile
from sim.systems import Budget, SystemSpec, parse_capacity
from sim.target import retarget
from traces.schema import Phase, Trace
from traces.shipped import find_trace
from traces.store import load as load_trace
from traces.synthetic import Sizes, zipf
from traces.workload import Step, Workload, one_at_a_time

Judged = tuple[str, dict[str, str]]

JUDGED: tuple[Judged, ...] = (
    ("25%", {}),
    ("50%", {}),
    ("75%", {}),
    ("25%", {"evict": "lfu"}),
    ("50%", {"evict": "lfu"}),
    ("25%", {"evict": "belady"}),
    ("50%", {"evict": "belady"}),
    ("25%", {"place": "cpu-on-miss"}),
    ("50%", {"place": "cpu-on-miss"}),
    ("75%", {"place": "cpu-on-miss"}),
    ("25%", {"prefetch": "next-router"}),
    ("50%", {"prefetch": "next-router"}),
)
"""Cache sizes and systems that are judged; calibration runs another cache size, on synthetic routing."""


def wide_model(trace: Trace) -> ModelSpec:
    """A model of the trace's shape whose experts take 12.6 MB each."""
    header = trace.header
    return ModelSpec(
        name="random-8x32-12.6MB",
        source="benchmark",
        layers=header.layers,
        moe_layers=header.layers,
        experts=header.experts,
        top_k=header.top_k,
        hidden=1024,
        expert_width=1024,
        heads=16,
        kv_heads=4,
        head_dim=64,
        vocab=4096,
        tied_embeddings=True,
        dtype="fp32",
        expert_bits=32,
    )


def beginnings(trace: Trace, domains: int, tokens: int) -> Workload:
    """The prompt and the first ``tokens`` decode steps of the first sequence of each of ``domains`` domains."""
    first = {domain: sequence for sequence, domain in reversed(list(enumerate(trace.header.domains)))}
    chosen = set(sorted(first.values())[:domains])
    kept: list[Step] = []
    decoded: Counter[int] = Counter()
    for step in one_at_a_time(trace):
        (sequence,) = step.sequences
        decoded[sequence] += step.phase == Phase.DECODE
        if sequence in chosen and decoded[sequence] <= tokens:
            kept.append(replace(step, index=len(kept)))
    return Workload(trace, 1, kept)


def constants(machine: Machine, judged: Sequence[Judged], costs: Costs, repeats: int) -> dict[str, float]:
    """Each system's mean decode token on synthetic routing, at the cache size of the calibration, by label."""
    spec = machine.loaded.spec
    sizes = Sizes(
        sequences=1, prompt_tokens=32, new_tokens=12, layers=spec.moe_layers, experts=spec.experts,
        top_k=spec.top_k, expert_bytes=spec.expert_bytes, lookahead=1,
    )  # fmt: skip
    workload = one_at_a_time(zipf(np.random.default_rng(7), sizes))
    budget = Budget(slots=3 * spec.experts // 8)
    systems = {SystemSpec(**system).label(): SystemSpec(**system) for _, system in judged}
    return {
        label: token_s([replay(machine, workload, system, budget, costs) for _ in range(repeats)])
        for label, system in systems.items()
    }


def measure(
    machine: Machine, workload: Workload, judged: Sequence[Judged], repeats: int, profile: Profile, costs: Costs
) -> list[Comparison]:
    """Replays every judged configuration, all repeats interleaved, and compares each with its simulation."""
    spec = machine.loaded.spec
    configurations = [
        (SystemSpec(**system), parse_capacity(cache, layers=spec.moe_layers, experts=spec.experts))
        for cache, system in judged
    ]
    runs: list[list[RunResult]] = [[] for _ in configurations]
    with Progress(console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("measuring", total=repeats * len(configurations) * len(workload))
        for _ in range(repeats):
            for kept, (system, budget) in zip(runs, configurations, strict=True):
                kept.append(replay(machine, workload, system, budget, costs, progress=lambda: bar.advance(task)))
    simulated = [simulate(workload, system, budget, costs, hardware=profile.name) for system, budget in configurations]
    return [
        compare(measured[0], predicted, repeats=measured[1:])
        for measured, predicted in zip(runs, simulated, strict=True)
    ]


def summary(comparisons: Sequence[Comparison], judged: Sequence[Judged], means_s: dict[str, float]) -> dict[str, Any]:
    """The figures of the protocol, over all decode tokens of all configurations."""
    tokens = pd.concat([comparison.tokens for comparison in comparisons])
    measured, simulated = tokens.measured_s.to_numpy(), tokens.simulated_s.to_numpy()
    error = metrics.summarise_errors(measured, simulated)
    means = [(float(one.tokens.measured_s.mean()), float(one.tokens.simulated_s.mean())) for one in comparisons]
    constant = [
        means_s[SystemSpec(**system).label()]
        for (_, system), one in zip(judged, comparisons, strict=True)
        for _ in range(len(one.tokens))
    ]
    noise = float(np.median([one.noise for one in comparisons]))
    tau = metrics.kendall_tau([pair[0] for pair in means], [pair[1] for pair in means], noise)
    return {
        "median_error": error.median,
        "p90_error": error.p90,
        "bias": error.bias,
        "skill": metrics.skill(measured, simulated, np.array(constant)),
        "noise": noise,
        "constants_ms": {label: mean_s * 1e3 for label, mean_s in means_s.items()},
        "kendall_tau": tau.tau,
        "pairs_left_out": tau.left_out,
        "decisions_exact": all(one.decisions.exact for one in comparisons),
        "configurations": [
            {
                "cache": cache,
                "system": SystemSpec(**system).label(),
                "measured_ms": measured_s * 1e3,
                "simulated_ms": simulated_s * 1e3,
                "median_error": one.error.median,
                "noise": one.noise,
                "components_ms": {part.label: [part.measured_ms, part.simulated_ms] for part in one.critical()},
            }
            for (cache, system), (measured_s, simulated_s), one in zip(judged, means, comparisons, strict=True)
        ],
    }


def show(title: str, figures: dict[str, Any]) -> None:
    """Prints the figures as a table."""
    table = Table(title=title)
    for column in ("system", "cache", "measured ms", "simulated ms", "median error", "noise"):
        table.add_column(column, justify="left" if column in ("system", "cache") else "right")
    for row in figures["configurations"]:
        table.add_row(
            row["system"], row["cache"], f"{row['measured_ms']:.2f}", f"{row['simulated_ms']:.2f}",
            f"{row['median_error']:.1%}", f"{row['noise']:.1%}",
        )  # fmt: skip
    Console(highlight=False).print(table)
    print(
        f"median error {figures['median_error']:.1%}  p90 {figures['p90_error']:.1%}  bias {figures['bias']:+.1%}  "
        f"skill {figures['skill']:.2f}  noise {figures['noise']:.1%}  tau {figures['kendall_tau']:.2f} "
        f"({figures['pairs_left_out']:.0%} of pairs left out)  decisions exact: {figures['decisions_exact']}"
    )


def main(
    out: Annotated[Path | None, typer.Option(help="Folder for the profile and the figures.")] = None,
    trace: Annotated[str, typer.Option(help="A recorded trace: a file, or a name that ships.")] = "mixed",
    repeats: Annotated[int, typer.Option(help="Interleaved repeats of everything.")] = 7,
    tokens: Annotated[int, typer.Option(help="Decode tokens of each sequence.")] = 12,
    domains: Annotated[int, typer.Option(help="Domains, of each of which one sequence is run.")] = 4,
    small: Annotated[bool, typer.Option(help="Judge the small model that ships, instead of wide experts.")] = False,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    force: Annotated[bool, typer.Option("--force", help="Write into a folder that holds files.")] = False,
) -> None:
    """Prints the errors of every judged configuration, and the figures over all of them."""
    if out is not None:
        check_folder(out, force=force)
    recorded = load_trace(find_trace(trace))
    console = Console(stderr=True)
    with open_device(device) as opened:
        loaded = load("moetwin-small") if small else load_spec(wide_model(recorded))
        with console.status("packing experts"):
            machine = Machine.prepare(loaded, opened)
        with console.status("calibrating"):
            profile = calibrate(machine, name=machine.hardware, repeats=repeats)
        costs = ProfileCosts(profile, loaded.spec)
        workload = beginnings(retarget(recorded, loaded.spec), domains, tokens)
        means_s = constants(machine, JUDGED, costs, repeats=3)
        comparisons = measure(machine, workload, JUDGED, repeats, profile, costs)
    figures = {
        "date": profile.date,
        "machine": profile.machine,
        "profile": profile.digest,
        "trace": recorded.digest,
        "workload": workload.describe(),
        "repeats": repeats,
        **summary(comparisons, JUDGED, means_s),
    }
    show(loaded.spec.name, figures)
    if out is not None:

        def write(folder: Path) -> None:
            profile.save(folder / "profile.toml")
            (folder / "fidelity.json").write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")

        write_folder(out, write, force=force)


if __name__ == "__main__":
    typer.run(main)
