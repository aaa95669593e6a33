"""This machine as a profile: measured times of copies, experts, dense parts, host work and their contention.

Two sources. Single pieces of work go through the device's own lanes, alone and beside each other, over slots and
experts in turn, so that no cache is warmer than in a run. Dense parts, head and host come from whole runs on seeded
synthetic routing, which no validation ever uses. Every number is the least of its repeats, with median and p90 beside.
"""

from __future__ import annotations

import datetime
import os
import platform
from collections.abc import Callable, Sequence
from functools import partial
from importlib.metadata import version
from itertools import combinations

import numpy as np
import numpy.typing as npt
import pandas as pd
import torch

from real.decode import Machine, replay
from real.device import Work
from real.executor import Assignments, Executor, Kernel
from real.routing import lookahead
from sim.controller import ExpertShape, OffloadController, Predicted
from sim.costs import RooflineCosts
from sim.plan import CPU, GPU, Operation
from sim.results import RunResult
from sim.spec import HostSpec, catalogue
from sim.spec.profile import DensePoint, Point, Profile, Slowdown
from sim.systems import Budget, SystemSpec
from traces.schema import Phase
from traces.synthetic import Sizes, zipf
from traces.workload import lock_step

EXPERT_TOKENS = (1, 2, 4, 8, 16, 32, 64, 128)
RESOURCES = ("gpu", "link", "cpu")
LEAST_PIECE_S = 0.02
"""Pieces are timed in series of at least this long beside each other, so that they overlap for most of it."""

Samples = npt.NDArray[np.float64]


def calibrate(
    machine: Machine, *, name: str, repeats: int = 7, seed: int = 0, progress: Callable[[str], None] = lambda text: None
) -> Profile:
    """Measures ``machine`` with its model; ``progress`` is told what is being measured. Takes seconds to a minute."""
    bench = _Bench(machine, repeats)
    progress("copies")
    copies = _points({bench.expert_bytes: bench.alone("link", 1)})
    progress("experts")
    gpu = _points({tokens: bench.alone("gpu", tokens) for tokens in EXPERT_TOKENS})
    first, later = bench.cpu_experts(EXPERT_TOKENS)
    progress("contention")
    slowdowns = bench.slowdowns()
    lookahead_s = bench.lookahead_s()
    bench.close()
    progress("whole layers")
    runs = _calibration_runs(machine, repeats, seed)
    return Profile(
        name=name,
        device=machine.device.name,
        date=datetime.datetime.now(datetime.UTC).date().isoformat(),
        machine=describe_machine(),
        model=machine.loaded.spec,
        host=_host(runs, machine.device.joins_layers),
        copies=copies,
        gpu_expert=gpu,
        cpu_expert_first=_points(first),
        cpu_expert_later=_points(later),
        dense=_dense(runs),
        head=_head(runs),
        lookahead_s=lookahead_s,
        slowdowns=slowdowns,
        token_s=float(np.mean([_best(steps)[_decode(steps)].mean() for steps in map(_latencies, runs)])),
    )


def describe_machine() -> dict[str, str]:
    """What a profile says of the machine: processor, cores, system, versions; and the GPU, when there is one."""
    facts = {
        "processor": platform.processor() or platform.machine(),
        "cores": str(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()),
        "system": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
        **{package: version(package) for package in ("torch", "transformers", "numpy")},
    }
    if torch.cuda.is_available():
        facts["gpu"] = torch.cuda.get_device_name()
    return facts


class _Bench:
    """Single pieces of work on the lanes of a device, over all slots and experts in turn."""

    def __init__(self, machine: Machine, repeats: int) -> None:
        spec = machine.loaded.spec
        self.machine, self.repeats, self.expert_bytes = machine, repeats, spec.expert_bytes
        slots = max(1, spec.experts // 4)
        shape = ExpertShape(spec.moe_layers, spec.experts, spec.top_k, spec.expert_bytes)
        costs = RooflineCosts(spec, catalogue.hardware(catalogue.hardware_names()[0]))
        predicted = Predicted(costs.gpu_expert_s, costs.cpu_expert_s, costs.copy_s(spec.expert_bytes))
        controller = OffloadController(SystemSpec(), shape, Budget(slots=slots), predicted)
        self._executor = Executor(machine.loaded, controller, machine.device, machine.store)
        self._places = [(layer, expert) for expert in range(slots) for layer in range(spec.moe_layers)]
        self._sources = [(layer, expert) for expert in range(spec.experts) for layer in range(spec.moe_layers)]
        self._turn = {resource: 0 for resource in RESOURCES}
        for slot, (layer, expert) in enumerate(self._places):
            self._executor.slots.load(slot, layer, expert)

    def close(self) -> None:
        """Lets go of the slots."""
        del self._executor

    def alone(self, resource: str, tokens: int) -> Samples:
        """Seconds of every repeat of one piece of work on an otherwise idle machine."""
        self._settle([self._piece(resource, tokens)])
        return np.array([self._settle([self._piece(resource, tokens)])[0] for _ in range(3 * self.repeats)])

    def cpu_experts(self, sizes: Sequence[int]) -> tuple[dict[int, Samples], dict[int, Samples]]:
        """CPU experts by tokens: the first of a layer, and those right after it."""
        first, later = {}, {}
        for tokens in sizes:
            rows = [self._settle([self._piece("cpu", tokens) for _ in range(3)]) for _ in range(self.repeats)]
            first[tokens], later[tokens] = np.array([row[0] for row in rows]), np.array(rows)[:, 1:].ravel()
        return first, later

    def slowdowns(self) -> tuple[Slowdown, ...]:
        """How much longer single-token experts and copies take beside each other, two and three at a time."""
        alone = {resource: float(np.median(self.alone(resource, 1))) for resource in RESOURCES}
        factors = []
        for count in (2, 3):
            for together in combinations(RESOURCES, count):
                for resource, seconds in self._together(together, alone).items():
                    others = tuple(one for one in together if one != resource)
                    factor = max(1.0, seconds / alone[resource])
                    factors.append(Slowdown(resource=resource, others=others, factor=factor))
        return tuple(factors)

    def lookahead_s(self) -> float:
        """Seconds of one later router on one token's hidden state."""
        loaded, device = self.machine.loaded, self.machine.device
        routers = [layer.router for layer in loaded.layers]
        if len(routers) == 1:
            return 0.0
        hidden = torch.zeros(
            1, loaded.spec.hidden, device=device.torch_device, dtype=next(loaded.model.parameters()).dtype
        )
        times = []
        with torch.inference_mode():
            for _ in range(10 * self.repeats):
                start = device.mark()
                lookahead(hidden, 0, 1, routers, loaded.spec.top_k).flatten().tolist()
                end = device.mark()
                device.settle()
                times.append(device.time_of(end) - device.time_of(start))
        return float(min(times))

    def _together(self, resources: Sequence[str], alone: dict[str, float]) -> dict[str, float]:
        """Median seconds of pieces that ran while all the other resources were busy all the time."""
        span_s = max(LEAST_PIECE_S, self.repeats * max(alone[one] for one in resources))
        works: dict[str, list[Work]] = {one: [] for one in resources}
        for one in resources:
            works[one] = [self._piece(one, 1) for _ in range(max(3, round(span_s / alone[one])))]
        self._settle([work for pieces in works.values() for work in pieces])
        begin = max(pieces[0].start_s for pieces in works.values())
        end = min(pieces[-1].end_s for pieces in works.values())
        inside = {
            one: [work.end_s - work.start_s for work in pieces if work.start_s >= begin and work.end_s <= end]
            for one, pieces in works.items()
        }
        return {one: float(np.median(times)) if times else alone[one] for one, times in inside.items()}

    def _piece(self, resource: str, tokens: int) -> Work:
        """Submits one piece of work, on the next slot or expert in turn."""
        turn = self._turn[resource]
        self._turn[resource] = turn + 1
        device, slots = self.machine.device, self._executor.slots
        if resource == "link":
            spare = len(self._places) + turn % 2
            return device.copy(partial(slots.load, spare, *self._sources[-1 - turn % len(self._sources)]), ())
        places = self._places if resource == "gpu" else self._sources
        slot = turn % len(places)
        layer, expert = places[slot]
        operation = Operation(turn, GPU if resource == "gpu" else CPU, layer, expert, slot, tokens, 0)
        kernel = self._kernel(expert, tokens)
        return (
            device.gpu(partial(kernel.run, operation), ())
            if resource == "gpu"
            else device.cpu(kernel.on_cpu(operation))
        )

    def _kernel(self, expert: int, tokens: int) -> Kernel:
        hidden = self._hidden(tokens)
        ids = torch.full((tokens, 1), expert, device=hidden.device)
        gates = torch.ones(tokens, 1, device=hidden.device)
        return Kernel(self._executor, hidden, gates, Assignments(ids, gates, None))

    def _hidden(self, tokens: int) -> torch.Tensor:
        spec, store = self.machine.loaded.spec, self.machine.store
        return torch.ones(tokens, spec.hidden, device=self.machine.device.torch_device, dtype=store.dtype)

    def _settle(self, works: Sequence[Work]) -> list[float]:
        device = self.machine.device
        device.wait(works, lambda: None)
        device.settle()
        return [work.end_s - work.start_s for work in works]


def _calibration_runs(machine: Machine, repeats: int, seed: int) -> list[list[RunResult]]:
    """Whole runs on synthetic routing, every repeat of every workload in turn: a list of repeats for each workload."""
    spec = machine.loaded.spec
    slots = max(spec.top_k, spec.experts // 2)
    costs = RooflineCosts(spec, catalogue.hardware(catalogue.hardware_names()[0]))
    workloads = []
    for prompt, batch in ((4, 1), (48, 1), (24, 4)):
        sizes = Sizes(
            sequences=batch, prompt_tokens=prompt, new_tokens=12, layers=spec.moe_layers, experts=spec.experts,
            top_k=spec.top_k, expert_bytes=spec.expert_bytes,
        )  # fmt: skip
        workloads.append(lock_step(zipf(np.random.default_rng(seed), sizes), batch))
    runs: list[list[RunResult]] = [[] for _ in workloads]
    for _ in range(repeats):
        for kept, workload in zip(runs, workloads, strict=True):
            kept.append(replay(machine, workload, SystemSpec(), Budget(slots=min(slots, spec.experts)), costs))
    return runs


def _latencies(runs: Sequence[RunResult]) -> pd.DataFrame:
    """Seconds of every step (rows) in every repeat (columns); the index holds step and phase."""
    frames = [run.tokens.groupby(["step", "phase"])[["start_s", "end_s"]].first() for run in runs]
    return pd.concat([frame.end_s - frame.start_s for frame in frames], axis=1)


def _best(latencies: pd.DataFrame) -> Samples:
    return latencies.min(axis=1).to_numpy()


def _decode(latencies: pd.DataFrame) -> npt.NDArray[np.bool_]:
    return latencies.index.get_level_values("phase").to_numpy() == int(Phase.DECODE)


def _dense(workloads: Sequence[Sequence[RunResult]]) -> tuple[DensePoint, ...]:
    """For every number of tokens a line over the context, through each step's best repeat."""
    rows = []
    for runs in workloads:
        dense = pd.concat([run.layers.groupby("step").dense_s.mean() for run in runs], axis=1)
        steps = runs[0].tokens.groupby("step").tokens.sum()
        context = (runs[0].tokens.groupby(["sequence"]).tokens.cumsum()).groupby(runs[0].tokens.step).max()
        for step in dense.index:
            rows.append((int(steps[step]), int(context[step]), float(dense.loc[step].min()), dense.loc[step]))
    points = []
    for tokens in sorted({row[0] for row in rows}):
        mine = [row for row in rows if row[0] == tokens]
        contexts, best = np.array([row[1] for row in mine], float), np.array([row[2] for row in mine])
        slope = float(np.polyfit(contexts, best, 1)[0]) if len(set(contexts)) > 1 else 0.0
        slope = max(0.0, slope)
        every = np.concatenate([row[3].to_numpy() for row in mine])
        points.append(
            DensePoint(
                tokens=tokens,
                base_s=max(0.0, float(np.median(best - slope * contexts))),
                per_context_s=slope,
                least_context=int(contexts.min()),
                most_context=int(contexts.max()),
                p90_s=float(np.quantile(every, 0.9)),
                repeats=len(every),
            )
        )
    return tuple(points)


def _head(workloads: Sequence[Sequence[RunResult]]) -> tuple[Point, ...]:
    samples: dict[int, list[float]] = {}
    for runs in workloads:
        lanes = runs[0].tokens.groupby("step").size()
        heads = pd.concat([run.tokens.groupby("step").head_s.first() for run in runs], axis=1).min(axis=1)
        for step, seconds in heads.items():
            samples.setdefault(int(lanes[step]), []).append(float(seconds))
    return _points({size: np.array(values) for size, values in samples.items()}, best=np.median)


def _host(workloads: Sequence[Sequence[RunResult]], joins_layers: bool) -> HostSpec:
    """The controller's fixed and per-operation seconds (a line through decode layers), and waking up at the end."""
    counts, before, after = [], [], []
    for runs in workloads:
        for run in runs:
            operations = run.operations.groupby(["step", "layer"]).size()
            plans = run.events[run.events.kind == "plan"].set_index(["step", "layer"])
            layers = run.layers[run.layers.phase == int(Phase.DECODE)].set_index(["step", "layer"])
            planned_s = (plans.end_s - plans.start_s).reindex(layers.index)
            counts.append(operations.reindex(layers.index, fill_value=0).to_numpy(float))
            before.append(planned_s.to_numpy())
            after.append((layers.host_s - planned_s).to_numpy())
    sizes, seconds = np.concatenate(counts), np.concatenate(before)
    quiet = seconds <= np.quantile(seconds, 0.5)
    slope = float(np.polyfit(sizes[quiet], seconds[quiet], 1)[0]) if len(set(sizes[quiet])) > 1 else 0.0
    slope = max(0.0, slope)
    return HostSpec(
        source="measured in calibration runs",
        layer_s=0.0,
        readback_s=0.0,
        controller_s=max(0.0, float(np.median((seconds - slope * sizes)[quiet]))),
        operation_s=slope,
        join_s=max(0.0, float(np.quantile(np.concatenate(after), 0.25))),
        joins_layers=joins_layers,
    )


def _points(samples: dict[int, Samples], best: Callable[[Samples], float] = np.min) -> tuple[Point, ...]:
    """One point a size, ascending; seconds never fall with the size, because noise must not make more work cheaper."""
    points: list[Point] = []
    for size, seconds in sorted(samples.items()):
        least = max(float(best(seconds)), points[-1].best_s if points else 0.0)
        points.append(
            Point(
                size=size,
                best_s=least,
                median_s=float(np.median(seconds)),
                p90_s=float(np.quantile(seconds, 0.9)),
                repeats=len(seconds),
            )
        )
    return tuple(points)
