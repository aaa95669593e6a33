"""This machine as a profile: measured times of copies, experts, dense parts, host work and their contention.

Whole runs on seeded synthetic routing, which no validation ever uses, give every number that decoding needs, as it is
in a run: with threads that wake up and caches that are cold. Single pieces of work on the device's own lanes add how
the time of an expert grows with its tokens.
"""

from __future__ import annotations

import datetime
import os
import platform
from collections.abc import Callable
from functools import partial
from importlib.metadata import version
from itertools import combinations
from pathlib import Path

import numpy as np
import pandas as pd
import torch

from real import fit
from real.decode import Machine, replay
from real.device import Work
from real.kernels import Kernel, gated, kernel_for
from real.models.load import LoadedModel
from real.routing import lookahead
from real.store import DeviceSlots
from sim.costs import RooflineCosts
from sim.plan import CPU, GPU, Operation
from sim.results import RunResult
from sim.spec import catalogue
from sim.spec.profile import Point, Profile, Slowdown
from sim.systems import Budget, SystemSpec
from traces.synthetic import Sizes, zipf
from traces.workload import Workload, lock_step

EXPERT_TOKENS = (1, 2, 4, 8, 16, 32, 64, 128)
PLANS = ((4, 1, "fetch"), (48, 1, "fetch"), (24, 4, "fetch"), (32, 1, "cpu-on-miss"))
"""Calibration runs: tokens of the prompt, sequences in lock-step, placement."""
NEW_TOKENS = 12


def calibrate(
    machine: Machine, *, name: str, repeats: int = 7, seed: int = 0, progress: Callable[[str], None] = lambda text: None
) -> Profile:
    """Measures ``machine`` with its model; ``progress`` is told what is being measured. Takes seconds to a minute."""
    progress("single pieces of work")
    bench = _Bench(machine, repeats)
    gpu, cpu = bench.experts("gpu"), bench.experts("cpu")
    copy, lookahead_s = bench.copy(), bench.lookahead_s()
    progress("whole layers on synthetic routing")
    runs = _calibration_runs(machine, repeats, seed)
    rows = pd.concat([fit.best_rows(repeated, [fit.pieces(run) for run in repeated]) for repeated in runs])
    single = rows[(rows.tokens == 1) | (rows.resource == "link")]
    alone = {"gpu": gpu[0], "cpu": cpu[0], "link": copy}
    fits = {name: fit.fit(single[single.resource == name], point) for name, point in alone.items()}
    on_cpu = single[single.resource == "cpu"]
    return Profile(
        name=name,
        device=machine.device.name,
        date=datetime.datetime.now(datetime.UTC).date().isoformat(),
        machine=describe_machine(),
        model=machine.loaded.spec,
        host=fit.host(runs, machine.device.joins_layers),
        copies=(fits["link"].point(machine.loaded.spec.expert_bytes),),
        gpu_expert=fit.shifted(gpu, fits["gpu"]),
        cpu_expert_first=fit.shifted(cpu, fit.fit(on_cpu[on_cpu["first"]], cpu[0])),
        cpu_expert_later=fit.shifted(cpu, fit.fit(on_cpu[~on_cpu["first"]], cpu[0])),
        dense=fit.dense(runs),
        head=fit.head(runs),
        lookahead_s=lookahead_s,
        slowdowns=tuple(_slowdowns(fits)),
        notes=tuple(_notes(fits)),
        token_s=float(np.mean([fit.token_s(runs[turn]) for turn, plan in enumerate(PLANS) if plan[1] == 1])),
    )


def describe_machine() -> dict[str, str]:
    """What a profile says of the machine: processor, cores, system, versions; and the GPU, when there is one."""
    facts = {
        "processor": _processor(),
        "cores": str(os.cpu_count()),
        "system": platform.system(),
        "python": platform.python_version(),
        **{package: version(package) for package in ("torch", "transformers", "numpy")},
    }
    if torch.cuda.is_available():
        facts["gpu"] = torch.cuda.get_device_name()
    return facts


class _Bench:
    """Single pieces of work on the lanes of an idle device, over all slots or experts in turn, so that none is warm."""

    def __init__(self, machine: Machine, repeats: int) -> None:
        spec = machine.loaded.spec
        self._machine, self._repeats = machine, repeats
        held = [(layer, expert) for expert in range(max(1, spec.experts // 4)) for layer in range(spec.moe_layers)]
        self._slots: DeviceSlots = machine.slots(len(held))
        for slot, (layer, expert) in enumerate(held):
            self._slots.load(slot, layer, expert)
        every = [(layer, expert) for expert in range(spec.experts) for layer in range(spec.moe_layers)]
        self._places = {"gpu": held, "cpu": every}
        self._turn = 0
        self._act = machine.loaded.family.act_fn(machine.loaded.config)

    def experts(self, resource: str) -> list[Point]:
        """Seconds of one expert, for each of :data:`EXPERT_TOKENS`."""
        return [self._point(tokens, partial(self._expert, resource, tokens)) for tokens in EXPERT_TOKENS]

    def copy(self) -> Point:
        """Seconds of one copy."""
        return self._point(self._machine.loaded.spec.expert_bytes, self._copy)

    def lookahead_s(self) -> float:
        """Seconds of one later router on one token's hidden state."""
        loaded, device = self._machine.loaded, self._machine.device
        routers = [layer.router for layer in loaded.layers]
        if len(routers) == 1:
            return 0.0
        hidden, times = self._hidden(1), []
        with torch.inference_mode():
            for _ in range(10 * self._repeats):
                start = device.mark()
                lookahead(hidden, 0, 1, routers, loaded.spec.top_k).flatten().tolist()
                end = device.mark()
                device.settle()
                times.append(device.time_of(end) - device.time_of(start))
        return float(np.median(times))

    def _point(self, size: int, submit: Callable[[], Work]) -> Point:
        """Submits a piece of work over and over, each when the one before has ended; the first time is not counted."""
        device, seconds = self._machine.device, []
        for _ in range(1 + 3 * self._repeats):
            work = submit()
            device.wait([work])
            device.settle()
            seconds.append(work.end_s - work.start_s)
        counted = np.array(seconds[1:])
        return Point(
            size=size,
            value_s=float(counted.min()),
            median_s=float(np.median(counted)),
            p90_s=float(np.quantile(counted, 0.9)),
            repeats=len(counted),
        )

    def _expert(self, resource: str, tokens: int) -> Work:
        slot, layer, expert = self._next(resource)
        operation = Operation(self._turn, GPU if resource == "gpu" else CPU, layer, expert, slot, tokens, 0)
        kernel, device = self._kernel(expert, tokens), self._machine.device
        if resource == "gpu":
            return device.gpu(partial(kernel.run, operation), ())
        return device.cpu(kernel.on_cpu(operation))

    def _copy(self) -> Work:
        slot, layer, expert = self._next("gpu")
        return self._machine.device.copy(partial(self._slots.load, slot, layer, expert), ())

    def _next(self, resource: str) -> tuple[int, int, int]:
        """The next slot, with the layer and the expert that it holds; on the CPU, the next of all experts."""
        places, self._turn = self._places[resource], self._turn + 1
        return self._turn % len(places), *places[self._turn % len(places)]

    def _kernel(self, expert: int, tokens: int) -> Kernel:
        hidden = self._hidden(tokens)
        ids = torch.full((tokens, 1), expert, device=hidden.device)
        return kernel_for(self._compute, hidden, ids, torch.ones_like(ids, dtype=torch.float32))

    def _compute(self, operation: Operation, hidden: torch.Tensor) -> torch.Tensor:
        layer, expert = operation.layer, operation.expert
        if operation.op == GPU:
            return gated(self._act, *self._slots.read(operation.slot, layer, expert), hidden)
        store = self._machine.store
        return gated(self._act, *store.views(store.expert(layer, expert)), hidden)

    def _hidden(self, tokens: int) -> torch.Tensor:
        loaded: LoadedModel = self._machine.loaded
        device = self._machine.device.torch_device
        return torch.ones(tokens, loaded.spec.hidden, device=device, dtype=self._machine.store.dtype)


def _calibration_runs(machine: Machine, repeats: int, seed: int) -> list[list[RunResult]]:
    """Whole runs on synthetic routing, every repeat of every plan in turn: a list of repeats for each plan.

    The cache holds three eighths of the experts, a share that validation leaves out.
    """
    spec = machine.loaded.spec
    budget = Budget(slots=max(1, 3 * spec.experts // 8))
    costs = RooflineCosts(spec, catalogue.hardware(catalogue.REFERENCE_MACHINE))
    workloads = [_workload(machine, prompt, lanes, seed + turn) for turn, (prompt, lanes, _) in enumerate(PLANS)]
    runs: list[list[RunResult]] = [[] for _ in workloads]
    for _ in range(repeats):
        for kept, workload, plan in zip(runs, workloads, PLANS, strict=True):
            kept.append(replay(machine, workload, SystemSpec(place=plan[2]), budget, costs))
    return runs


def _workload(machine: Machine, prompt_tokens: int, lanes: int, seed: int) -> Workload:
    spec = machine.loaded.spec
    sizes = Sizes(
        sequences=lanes,
        prompt_tokens=prompt_tokens,
        new_tokens=NEW_TOKENS,
        layers=spec.moe_layers,
        experts=spec.experts,
        top_k=spec.top_k,
        expert_bytes=spec.expert_bytes,
    )
    return lock_step(zipf(np.random.default_rng(seed), sizes), lanes)


def _slowdowns(fits: dict[str, fit.Fit]) -> list[Slowdown]:
    sets = [chosen for count in (2, 3) for chosen in combinations(fit.RESOURCES, count)]
    return [
        fits[one].slowdown(one, tuple(other for other in together if other != one))
        for together in sets
        for one in together
    ]


def _notes(fits: dict[str, fit.Fit]) -> list[str]:
    return [
        f"{name} beside {other} took more than {1 / (1 - fit.MOST_SLOPE):.0f} times as long, and counts with that"
        for name, found in fits.items()
        for other in found.clipped
    ]


def _processor() -> str:
    """The processor's name, where the system tells it."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{names[0] if names else platform.processor()} ({platform.machine()})"
