"""The executor against its limits: the link in a miss-bound run, Python in a layer, memory against its plan.

    python -m benchmarks.executor_limits [--model olmoe-1b-7b] [--device cuda] [--profile FILE.toml] [--out FILE.json]

The routing is uniform, which no cache helps. *Link*: bytes copied over the seconds of the passes, as a share of the
bandwidth that calibration found for one expert: in a long prompt, which is bound by misses, and in decoding, where the
link also waits for routers and dense layers when nothing is prefetched; and over the seconds in which copies were under
way. *Python*: what our own code takes in a layer of a decode token, from the router's hook to the return. *Memory*:
the most that torch allocated on the GPU against the plan, beside what it reserved and what is in use there beyond that
(the context, and other processes); and the most of the process on the host against its weights.

Without ``--profile`` the machine is calibrated first, and ``--keep-profile`` keeps what was found.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Annotated, Any

import numpy as np
import pandas as pd
import typer
from rich.console import Console
from rich.table import Table

from analysis.files import check_file
from benchmarks import evidence
from real.calibrate import calibrate
from real.decode import Machine, replay
from real.device import open_device
from real.jobs import Limits, Size
from real.progress import bar, status
from real.subjects import Subject, subject, synthetic_routing
from sim.memory import MemoryPlan
from sim.presets import preset
from sim.profile import ProfileCosts
from sim.results import RunResult
from sim.spec.profile import Profile
from traces.schema import Phase
from traces.shipped import find_trace
from traces.store import load as load_trace
from traces.workload import Workload, one_at_a_time

MISS_BOUND = "on-demand"
RUNS = ((MISS_BOUND, "25%"), ("mixtral-offloading", "25%"), ("hybrimoe", "25%"), ("mixtral-offloading", "75%"))
"""System and cache of each run: the first is that of the link, all of them are measured against their plans."""
FETCH = "mixtral-offloading"
"""Whose Python is judged: the fetch placement."""


@dataclass(frozen=True)
class Measured:
    """The repeats of one system and cache, and the bytes that they were to take."""

    system: str
    cache: str
    plan: MemoryPlan
    runs: list[RunResult]


def main(
    model: Annotated[str, typer.Option(help="moetwin-small, wide, a folder, or a catalogue name.")] = "moetwin-small",
    device: Annotated[str, typer.Option(help="cpu, cuda or auto.")] = "auto",
    dtype: Annotated[str, typer.Option(help="fp32, bf16 or fp16.")] = "fp32",
    prompt: Annotated[int, typer.Option(min=2, help="Tokens of the prompt.")] = 256,
    tokens: Annotated[int, typer.Option(min=2, help="Tokens to decode.")] = 32,
    repeats: Annotated[int, typer.Option(min=1, help="Runs of each system, which take turns.")] = 3,
    profile: Annotated[Path | None, typer.Option(help="Of `moetwin calibrate` for this model here.")] = None,
    keep_profile: Annotated[Path | None, typer.Option(help="Where a new profile is written (.toml).")] = None,
    out: Annotated[Path | None, typer.Option(help="Keep the figures here (.json).")] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace the files.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Measures, and prints the figures beside what they should be."""
    for path in (out, keep_profile):
        if path is not None:
            check_file(path, force=force)
    recorded, learned = load_trace(find_trace("mixed")), load_trace(find_trace("code"))
    chosen = subject(model, dtype, recorded, learned, sequences=1, tokens=2)
    with open_device(device) as opened:
        with status(f"loading {chosen.name}") as say:
            machine = Machine.prepare(chosen.load(), opened)
            if profile is None:
                found = calibrate(machine, name=machine.hardware, repeats=max(3, repeats), progress=say)
            else:
                found = Profile.load(profile)
        costs = ProfileCosts(found, chosen.spec)
        if profile is None and keep_profile is not None:
            found.save(keep_profile, force=force)
        measured = measure(machine, chosen, routing(chosen, prompt, tokens), costs, repeats)
    bandwidth = chosen.spec.expert_bytes / costs.copy_s(chosen.spec.expert_bytes)
    figures = {
        "model": chosen.name,
        "dtype": chosen.spec.dtype,
        "device": opened.name,
        "profile": found.digest,
        "prompt": prompt,
        "tokens": tokens,
        "repeats": repeats,
        "link_bytes_per_s": bandwidth,
        "link_share": link_share(measured[0].runs, bandwidth),
        "python_us": {f"{one.system} {one.cache}": python_us(one.runs) for one in measured},
        "memory": [memory(one) for one in measured],
        "host": host(measured, chosen),
    }
    if out is not None:
        evidence.keep(out, (), force=force, **figures)
    if as_json:
        typer.echo(json.dumps(figures, indent=1))
    else:
        show(figures)


def routing(chosen: Subject, prompt: int, tokens: int) -> Workload:
    """One sequence of uniform routing at the model's dimensions."""
    lengths = {"sequences": 1, "prompt_tokens": prompt, "new_tokens": tokens}
    return one_at_a_time(synthetic_routing(chosen.spec, seed=11, skew=0.0, lookahead=3, **lengths))


def measure(machine: Machine, chosen: Subject, workload: Workload, costs: ProfileCosts, repeats: int) -> list[Measured]:
    """Every run of :data:`RUNS` once without being counted, then ``repeats`` times in turn."""
    size = Size.of(workload, max(step.context for step in workload))
    runs, measured = [], []
    for name, cache in RUNS:
        limits = Limits(1, cache, None, None, together=True, device=machine.device.name)
        system = limits.fitted(preset(name), workload.trace)[0]
        budget, plan = limits.budget(preset(name), chosen.spec, size)
        runs.append((system, budget))
        measured.append(Measured(name, cache, plan, []))
    with bar("measuring", (1 + repeats) * len(runs)) as advance:
        for turn in range(1 + repeats):
            for (system, budget), kept in zip(runs, measured, strict=True):
                run = replay(machine, workload, system, budget, costs)
                if turn:
                    kept.runs.append(run)
                advance()
    return measured


def link_share(runs: Sequence[RunResult], bytes_per_s: float) -> dict[str, float]:
    """Shares of the calibrated bandwidth, medians over the runs."""
    shares: dict[str, list[float]] = {"prompt": [], "decode": [], "copies_under_way": []}
    for run in runs:
        for name, phase in (("prompt", Phase.PREFILL), ("decode", Phase.DECODE)):
            layers, passes = run.layers[run.layers.phase == phase], run.tokens[run.tokens.phase == phase]
            seconds = float((passes.end_s - passes.start_s).sum())
            shares[name].append(float(layers.bytes.sum()) / seconds / bytes_per_s)
        busy_s = union_s(run.events[(run.events.resource == "link") & (run.events.kind == "copy")])
        shares["copies_under_way"].append(float(run.layers.bytes.sum()) / busy_s / bytes_per_s)
    return {name: median(values) for name, values in shares.items()}


def union_s(events: pd.DataFrame) -> float:
    """Seconds in which at least one of the events was under way."""
    ordered = events.sort_values("start_s")
    before_s = ordered.end_s.cummax().shift(fill_value=-np.inf)
    return float((ordered.end_s - np.maximum(ordered.start_s, before_s)).clip(lower=0).sum())


def python_us(runs: Sequence[RunResult]) -> dict[str, float]:
    """Microseconds of our own code in a layer of a decode token: median and 90th percentile over layers and runs."""
    layers = pd.concat([run.layers[run.layers.phase == Phase.DECODE] for run in runs])
    return {"median": float(layers.python_s.median()) * 1e6, "p90": float(layers.python_s.quantile(0.9)) * 1e6}


def memory(one: Measured) -> dict[str, Any]:
    """The plan of a run, and the most that it took on a GPU."""
    peaks = {name: max(run.info.peak.get(name, 0) for run in one.runs) for name in _GPU_PEAKS}
    taken = peaks["device_allocated_bytes"] / one.plan.total_bytes if peaks["device_allocated_bytes"] else None
    told = {"system": one.system, "cache": one.cache, "planned_bytes": one.plan.total_bytes}
    return {**told, **peaks, "allocated_over_planned": taken}


_GPU_PEAKS = ("device_allocated_bytes", "device_reserved_bytes", "device_context_bytes")


def host(measured: Sequence[Measured], chosen: Subject) -> dict[str, float]:
    """The most that the process took on the host, and the weights that it holds there."""
    spec = chosen.spec
    weights = spec.moe_layers * spec.experts * spec.expert_bytes + spec.dense_bytes
    resident = max(run.info.peak["host_resident_bytes"] for one in measured for run in one.runs)
    return {"weights_bytes": weights, "resident_bytes": resident, "resident_over_weights": resident / weights}


def show(figures: dict[str, Any]) -> None:
    """The figures that ``--out`` keeps, as tables."""
    console, shares = Console(highlight=False), figures["link_share"]
    table = Table(title=f"{figures['model']} in {figures['dtype']} on {figures['device']}")
    gigabytes = ("planned GB", "allocated GB", "reserved GB", "context GB")
    for column in ("system", "cache", "Python us a layer", "p90", *gigabytes, "over plan"):
        table.add_column(column, justify="left" if column in ("system", "cache") else "right")
    for row in figures["memory"]:
        python, over = figures["python_us"][f"{row['system']} {row['cache']}"], row["allocated_over_planned"]
        table.add_row(
            row["system"], row["cache"], f"{python['median']:.0f}", f"{python['p90']:.0f}",
            *(f"{row[name] / 1e9:.3f}" for name in ("planned_bytes", *_GPU_PEAKS)),
            "-" if over is None else f"{over:.1%}",
        )  # fmt: skip
    console.print(table)
    console.print(
        f"link {figures['link_bytes_per_s'] / 1e9:.2f} GB/s calibrated; used {shares['prompt']:.0%} of it in a prompt, "
        f"{shares['decode']:.0%} in decoding, {shares['copies_under_way']:.0%} while copies were under way",
        soft_wrap=True,
    )
    console.print(f"host {figures['host']['resident_over_weights']:.0%} of the weights", soft_wrap=True)


if __name__ == "__main__":
    typer.run(main)
