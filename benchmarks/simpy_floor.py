"""How much of SimPy's own speed the engine keeps: the same copies and kernels on a bare skeleton, in one run.

The skeleton decides nothing and records nothing: one link server with its own priority heap, one timeout for a copy
and one for a kernel, a kernel waits for its own copy. It replays the operations that the engine has logged. The engine
decides them, and keeps the tables that a sweep keeps: requests, tokens and layers, without operations and events.

    python -m benchmarks.simpy_floor [TRACE] [--repeats 5] [--out FILE.json]

Where the trace has scores and look-ahead, HybriMoE with its prefetch runs as well, for its own rate: it does other work
than the skeleton. At the dimensions of DeepSeek-V2-Lite:

    moetwin trace like mixed --model deepseek-v2-lite --sequences 4 --new-tokens 128 --out v2-lite.safetensors
    python -m benchmarks.simpy_floor v2-lite.safetensors
"""

from __future__ import annotations

import datetime
import heapq
import json
import statistics
import time
from collections.abc import Callable, Generator
from importlib.metadata import version
from itertools import groupby
from pathlib import Path
from typing import Annotated, Any

import simpy
import typer

from analysis.files import check_file, write_text
from real.calibrate import describe_machine
from sim.costs import RooflineCosts
from sim.engine import Engine
from sim.results import RunResult
from sim.run import build_controller, routings_of, run_info, simulate
from sim.spec import ModelSpec
from sim.spec.catalogue import REFERENCE_MACHINE, hardware
from sim.spec.catalogue import model as catalogue_model
from sim.systems import Budget, SystemSpec, parse_capacity
from traces.schema import Trace
from traces.shipped import find_trace
from traces.store import load
from traces.workload import Workload, one_at_a_time

DENSE_S, EXPERT_S, COPY_S = 60e-6, 15e-6, 40e-6
HYBRIMOE = SystemSpec(evict="mrs", prefetch="impact", place="hybrimoe")


def skeleton(layers: list[tuple[list[int], list[tuple[int, bool]]]]) -> float:
    """Runs layers of (copies, [(expert, waits for its copy)]) and returns the simulated end."""
    env = simpy.Environment()
    heap: list[tuple[int, int, simpy.Event]] = []
    bell = [env.event()]

    def link() -> Generator[simpy.Event, Any, None]:
        while True:
            if not heap:
                bell[0] = env.event()
                yield bell[0]
            _, _, done = heapq.heappop(heap)
            yield env.timeout(COPY_S)
            done.succeed()

    def gpu() -> Generator[simpy.Event, Any, None]:
        number = 0
        for copies, kernels in layers:
            yield env.timeout(DENSE_S)
            arriving = {}
            for expert in copies:
                number += 1
                arriving[expert] = env.event()
                heapq.heappush(heap, (0, number, arriving[expert]))
            if heap and not bell[0].triggered:
                bell[0].succeed()
            for expert, waits in kernels:
                if waits:
                    yield arriving[expert]
                yield env.timeout(EXPERT_S)

    env.process(link())
    env.run(env.process(gpu()))
    return float(env.now)


def layers_of(run: RunResult) -> list[tuple[list[int], list[tuple[int, bool]]]]:
    """The copies and kernels of each layer, as the engine submitted them."""
    rows = zip(*(run.operations[name].tolist() for name in ("step", "layer", "op", "expert")), strict=True)
    layers = []
    for _, group in groupby(rows, key=lambda row: row[:2]):
        operations = [row[2:] for row in group]
        copies = [expert for op, expert in operations if op == "copy"]
        arriving = set(copies)
        layers.append((copies, [(expert, expert in arriving) for op, expert in operations if op == "gpu"]))
    return layers


def small_model(trace: Trace) -> ModelSpec:
    """A model of the trace's shape; the floor does not depend on its widths."""
    header = trace.header
    return ModelSpec(
        name=header.model, source="benchmark", layers=header.layers, moe_layers=header.layers, experts=header.experts,
        top_k=header.top_k, hidden=192, expert_width=64, heads=6, kv_heads=2, head_dim=32, vocab=4096, dtype="fp32",
    )  # fmt: skip


def _model(trace: Trace) -> ModelSpec:
    """The catalogue's DeepSeek-V2-Lite where the trace has its dimensions, so that times are in its proportions."""
    found = catalogue_model("deepseek-v2-lite")
    header = trace.header
    same = (header.layers, header.experts, header.top_k) == (found.moe_layers, found.experts, found.top_k)
    return found if same else small_model(trace)


def by_events(workload: Workload, budget: Budget, costs: RooflineCosts) -> None:
    """The same run with a SimPy event for every copy and group of kernels, as prefetch and contention need it."""
    controller = build_controller(workload, SystemSpec(), budget, costs)
    engine = Engine(controller, costs, events=False, operations=False, closed_form=False)
    engine.run(workload.steps, routings_of(workload.trace), lambda step: ())
    engine.log.result(run_info("simulated", workload, controller, hardware=costs.hardware.name))


def measure(workload: Workload, repeats: int) -> dict[str, float]:
    """Median process seconds of the engine (controller, policies and tables included), with the times of a layer
    worked out and with an event for each piece of work, and of the skeleton; the three are interleaved."""
    header = workload.trace.header
    budget = parse_capacity("25%", layers=header.layers, experts=header.experts)
    machine = hardware(REFERENCE_MACHINE)
    costs = RooflineCosts(_model(workload.trace), machine)
    run = simulate(workload, SystemSpec(), budget, costs, hardware=machine.name)
    layers = layers_of(run)
    contestants: dict[str, Callable[[], object]] = {
        "engine": lambda: simulate(
            workload, SystemSpec(), budget, costs, hardware=machine.name, events=False, operations=False
        ),
        "engine, by events": lambda: by_events(workload, budget, costs),
        "skeleton": lambda: skeleton(layers),
    }
    if workload.trace.lookahead_depth >= HYBRIMOE.lookahead_depth and workload.trace.scores is not None:
        contestants["hybrimoe, impact"] = lambda: simulate(
            workload, HYBRIMOE, budget, costs, hardware=machine.name, events=False, operations=False
        )
    seconds: dict[str, list[float]] = {name: [] for name in contestants}
    for _ in range(repeats):
        for name, contestant in contestants.items():
            start_s = time.process_time()
            contestant()
            seconds[name].append(time.process_time() - start_s)
    return {name: statistics.median(times) for name, times in seconds.items()}


def shown(figures: dict[str, Any]) -> list[str]:
    """One line for each contestant, from the figures that ``--out`` keeps."""
    rates: dict[str, float] = figures["tokens_per_s"]
    return [
        f"{name:18} {rate:8.0f} decode tokens/s, {rate / rates['skeleton']:5.2f} of the skeleton's rate"
        for name, rate in rates.items()
    ]


def main(
    trace: Annotated[str, typer.Argument(help="A recorded trace: a file, or a name that ships.")] = "mixed",
    repeats: Annotated[int, typer.Option(help="Runs of each; medians are printed.")] = 5,
    out: Annotated[Path | None, typer.Option(help="Also keep the figures in this .json file.")] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace the file that --out names.")] = False,
) -> None:
    """Prints decode tokens a second of engine and skeleton (LRU, 25 %), on one core, and their ratio."""
    if out is not None:
        check_file(out, force=force)
    workload = one_at_a_time(load(find_trace(trace)))
    tokens = workload.describe()["new_tokens"]
    figures = {
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "machine": {**describe_machine(), "simpy": version("simpy")},
        "trace": workload.trace.digest,
        "repeats": repeats,
        "tokens_per_s": {name: tokens / run_s for name, run_s in measure(workload, repeats).items()},
    }
    print("\n".join(shown(figures)))
    if out is not None:
        write_text(out, json.dumps(figures, indent=1) + "\n", force=force)


if __name__ == "__main__":
    typer.run(main)
