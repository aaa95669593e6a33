"""This machine as a profile: measured times of copies, experts, dense parts, host work and their contention.

Whole runs on seeded synthetic routing, which no validation ever uses, give every number that decoding needs, as it is
in a run: with threads that wake up and caches that are cold. Single pieces of work on the device's own lanes add how
the time of an expert grows with its tokens. Experts that a GPU computes together have equal shares of that time
(:func:`real.timing.spans`): one number stands for them and for those that are computed alone, when a copy has come.
"""

from __future__ import annotations

import datetime
import os
import platform
from collections.abc import Callable, Sequence
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd
import torch

from real import fit
from real.bandwidth import transfers
from real.bench import MOST_SLOWDOWN, Bench
from real.decode import Machine, replay
from real.memory import told_when_full
from real.planning import planning
from real.subjects import synthetic_routing
from sim.costs import RooflineCosts
from sim.results import RunResult
from sim.spec import catalogue
from sim.spec.profile import Point, Pool, Profile, Slowdown
from sim.systems import STAGING_SLOTS, Budget, SystemSpec
from traces.errors import InputError
from traces.standin import MOST_AHEAD
from traces.workload import Workload, lock_step

NEW_TOKENS = 12


class Plan(NamedTuple):
    """A calibration run: tokens of the prompt, sequences in lock-step, and the system."""

    prompt_tokens: int
    lanes: int
    system: SystemSpec


POOL = SystemSpec(evict="fifo", scope="global", holds="nothing")
"""Every expert goes through the staging slots: few enough that a processor's cache may hold them."""
PLANS = (
    Plan(4, 1, SystemSpec()),
    Plan(48, 1, SystemSpec()),
    Plan(24, 4, SystemSpec()),
    Plan(32, 1, SystemSpec(place="cpu-on-miss")),
)


@told_when_full()
def calibrate(
    machine: Machine, *, name: str, repeats: int = 7, seed: int = 0, progress: Callable[[str], None] = lambda text: None
) -> Profile:
    """Measures ``machine`` with its model; ``progress`` is told what is being measured. Takes seconds to a minute.

    Raises :class:`InputError` for an encoder-decoder, and when the GPU's memory is full.
    """
    if machine.loaded.encoder_layers:
        told = "as a profile has one dense part for all layers and passes"
        raise InputError(f"model must be a decoder to be calibrated with, {told}, got {machine.loaded.spec.name}")
    progress("single pieces of work")
    bench = Bench(machine, repeats)
    gpu, cpu = bench.experts("gpu"), bench.experts("cpu")
    copy, lookahead_s, slowdowns = bench.copy(), bench.lookahead_s(), bench.slowdowns()
    by_threads = bench.cpu_by_threads()
    progress("copies by size")
    copied = transfers(bench, machine.device, machine.loaded.spec.expert_bytes)
    progress("whole layers on synthetic routing")
    runs = _calibration_runs(machine, [*PLANS, Plan(32, 1, POOL)], repeats, seed)
    pool = runs.pop()
    single = _singles(runs)
    alone = {"gpu": gpu[0], "cpu": cpu[0], "link": copy}
    fits = {name: fit.fit(single[single.resource == name], point) for name, point in alone.items()}
    on_cpu = single[single.resource == "cpu"]
    progress("decisions of the policies")
    deciding = planning(machine, _slots(machine), seed)
    return Profile(
        name=name,
        device=machine.device.name,
        date=datetime.datetime.now(datetime.UTC).date().isoformat(),
        machine=describe_machine(),
        model=machine.loaded.spec,
        host=fit.host(runs, machine.device.joins_layers),
        copies=(fits["link"].point(machine.loaded.spec.expert_bytes),),
        chunk_bytes=min(machine.device.chunk_bytes, machine.loaded.spec.expert_bytes),
        gpu_expert=fit.shifted(gpu, fits["gpu"]),
        cpu_expert_first=fit.shifted(cpu, fit.fit(on_cpu[on_cpu["first"]], cpu[0])),
        cpu_expert_later=fit.shifted(cpu, fit.fit(on_cpu[~on_cpu["first"]], cpu[0])),
        small_pool=_small_pool(_singles([pool]), gpu, fits, machine.loaded.spec.expert_bytes),
        dense=fit.dense(runs),
        head=fit.head(runs),
        lookahead_s=lookahead_s,
        slowdowns=slowdowns,
        planning=deciding,
        transfers=copied,
        experts_pinned=0 < machine.store.pinned_bytes == machine.store.bytes,
        cpu_by_threads=by_threads,
        cpu_threads=machine.device.cpu_threads,
        notes=(*machine.store.notes, *_notes(slowdowns)),
        token_s=float(np.mean([fit.token_s(runs[turn]) for turn, plan in enumerate(PLANS) if plan.lanes == 1])),
    )


def _singles(runs: Sequence[list[RunResult]]) -> pd.DataFrame:
    """Copies, and experts of one token, out of each step's fastest repeat."""
    rows = pd.concat([fit.best_rows(repeated, [fit.pieces(run) for run in repeated]) for repeated in runs])
    return rows[(rows.tokens == 1) | (rows.resource == "link")]


def _small_pool(rows: pd.DataFrame, gpu: list[Point], fits: dict[str, fit.Fit], expert_bytes: int) -> Pool:
    """What copies and experts take in slots that are used over and over; never more than in others."""
    quick = {name: fit.fit(rows[rows.resource == name], point) for name, point in (("gpu", gpu[0]), ("link", gpu[0]))}
    quick = {name: replace(one, base_s=min(one.base_s, fits[name].base_s)) for name, one in quick.items()}
    return Pool(
        slots=STAGING_SLOTS + 1,
        copies=(quick["link"].point(expert_bytes),),
        gpu_expert=fit.shifted(gpu, quick["gpu"]),
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


def _calibration_runs(machine: Machine, plans: Sequence[Plan], repeats: int, seed: int) -> list[list[RunResult]]:
    """Whole runs on synthetic routing, every repeat of every plan in turn: a list of repeats for each plan."""
    costs = RooflineCosts(machine.loaded.spec, catalogue.hardware(catalogue.REFERENCE_MACHINE))
    workloads = [_workload(machine, plan.prompt_tokens, plan.lanes, seed + turn) for turn, plan in enumerate(plans)]
    runs: list[list[RunResult]] = [[] for _ in workloads]
    for _ in range(repeats):
        for kept, workload, plan in zip(runs, workloads, plans, strict=True):
            slots = 1 if plan.system.holds == "nothing" else _slots(machine)
            kept.append(replay(machine, workload, plan.system, Budget(slots=slots), costs))
    return runs


def _slots(machine: Machine) -> int:
    """Three eighths of the experts, a share that validation leaves out."""
    return max(1, 3 * machine.loaded.spec.experts // 8)


def _workload(machine: Machine, prompt_tokens: int, lanes: int, seed: int) -> Workload:
    lengths = {"sequences": lanes, "prompt_tokens": prompt_tokens, "new_tokens": NEW_TOKENS}
    return lock_step(synthetic_routing(machine.loaded.spec, seed, lookahead=MOST_AHEAD, **lengths), lanes)


def _notes(slowdowns: Sequence[Slowdown]) -> list[str]:
    return [
        f"{one.resource} beside {' and '.join(one.others)} took {MOST_SLOWDOWN:.0f} times as long or more"
        for one in slowdowns
        if one.factor >= MOST_SLOWDOWN
    ]


def _processor() -> str:
    """The processor's name, where the system tells it."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{names[0] if names else platform.processor()} ({platform.machine()})"
