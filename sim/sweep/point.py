"""One point of a sweep: what a worker process is handed, runs, and hands back."""

from __future__ import annotations

import threading
import traceback
from dataclasses import asdict, dataclass, field, replace
from time import perf_counter
from typing import Any, Literal

from sim.bounds import Bounds, Demand, demand_of, lower_bound, regret_of
from sim.busy import busy_s
from sim.groups import decode_by_group
from sim.presets import SYSTEM
from sim.results import RunResult
from sim.scenario import Prepared, Scenario, alongside
from sim.sweep.keys import key_of
from traces.errors import InputError


@dataclass(frozen=True)
class Task:
    """A run to do, and the key that it is done under."""

    key: str
    scenario: Scenario


@dataclass(frozen=True)
class Outcome:
    """What became of a task. ``refused`` is for good: its scenario cannot run; ``failed`` is worth another try.

    Decode seconds and tokens of the groups of :mod:`sim.groups` tell how sure a difference to another point is. The
    ``role`` is that of its :class:`sim.presets.Preset`: whether it competes with others.
    """

    key: str
    status: Literal["ok", "refused", "failed"]
    reason: str = ""
    figures: dict[str, float | None] = field(default_factory=dict)
    decode_s_by_group: list[float] | None = None
    decode_tokens_by_group: list[int] | None = None
    notes: str = ""
    role: str = SYSTEM
    synthetic: bool = False
    seconds: float = 0.0

    def record(self) -> dict[str, Any]:
        """As plain values."""
        return asdict(self)


def run_point(task: Task) -> Outcome:
    """Runs a task, without the long tables; never raises, but when the process is interrupted.

    It is refused for what it says, and not for files that are missing or others where it runs: it then has failed.
    """
    begun_s = perf_counter()
    try:
        _check_content(task)
        outcome = _ran(task)
    except InputError as error:
        outcome = _stopped(task, error)
    except Exception as error:
        outcome = Outcome(task.key, "failed", _told(error))
    return replace(outcome, seconds=perf_counter() - begun_s)


def _ran(task: Task) -> Outcome:
    prepared = prepared_of(task.scenario)
    run = prepared.run(events=False, operations=False)
    (seconds,), tokens = decode_by_group([run])
    return Outcome(
        task.key,
        "ok",
        figures={**figures_of(run, prepared), **regret_of(run, _bounds(task.scenario, prepared))},
        decode_s_by_group=seconds.tolist(),
        decode_tokens_by_group=tokens.tolist(),
        notes="; ".join(run.info.notes),
        role=task.scenario.system.role,
        synthetic=run.info.synthetic,
    )


def _stopped(task: Task, error: InputError) -> Outcome:
    """What became of a task that met with ``error``: refused, if its files still are those that it was made of."""
    try:
        _check_content(task)
    except (InputError, _OtherContentError) as fault:
        return Outcome(task.key, "failed", " ".join(str(fault).split()))
    return Outcome(task.key, "refused", " ".join(str(error).split()))


def _check_content(task: Task) -> None:
    """Raises where the files and the code are not those that the task was made of."""
    if key_of(task.scenario) != task.key:
        raise _OtherContentError


ROUTED = ("trace", "batch", "batching", "prefill_chunk", "arrivals", "rate_per_s")
"""Fields of a scenario that decide which tokens pass which experts together, and so what there is to do."""

_DEMANDS: dict[tuple[str, int], Demand] = {}
"""What this process has had to do before, latest last: points that differ in policies or machine share it."""
MOST_DEMANDS = 32
_DEMANDS_LOCK = threading.Lock()
"""A worker of Dask runs points in several threads."""


def _bounds(scenario: Scenario, prepared: Prepared) -> Bounds | None:
    """The bounds of a point; None where the clock decides the order of its passes."""
    if prepared.workload is None:
        return None
    key = key_of(Scenario(**{field: getattr(scenario, field) for field in ROUTED})), prepared.slots
    with _DEMANDS_LOCK:
        demand = _DEMANDS.get(key)
    demand = demand or demand_of(prepared.plan, prepared.slots)
    with _DEMANDS_LOCK:
        _DEMANDS.pop(key, None)
        _DEMANDS[key] = demand
        while len(_DEMANDS) > MOST_DEMANDS:
            del _DEMANDS[next(iter(_DEMANDS))]
    return lower_bound(prepared, demand)


class _OtherContentError(Exception):
    """The worker sees other files, or runs other code, than the process that made the task."""

    def __str__(self) -> str:
        return "files or code have changed since the sweep began, or are others where this point was run"


def prepared_of(scenario: Scenario) -> Prepared:
    """What a point runs. ``cache`` counts slots a layer for every system, so that all have the same bytes for experts:
    one pool for all layers gets those of the layers together, as under a limit of memory it does anyway.
    """
    if scenario.system.system.scope == "global" and scenario.gpu_memory is None:
        (scenario,) = alongside(scenario, [scenario.system])
    return scenario.prepare()


def figures_of(run: RunResult, prepared: Prepared) -> dict[str, float | None]:
    """The headline figures of a run, what it copied, its GPU memory, and the shares of its time resources are busy.

    The link's share is None where a system prefetches: without events, nobody noted how long those copies took.
    """
    layers, tokens = run.layers, run.tokens
    steps = tokens[~tokens.step.duplicated()]
    span_s = float(steps.end_s.max() - steps.start_s.min())
    worked_s = busy_s(run, layers, tokens, prepared.costs)
    shares = {f"{name}_busy_share": None if s is None or span_s <= 0 else s / span_s for name, s in worked_s.items()}
    copied_bytes = float(layers.bytes.sum() + run.info.prefetched_bytes)
    sizes = {
        "copied_bytes_per_processed_token": copied_bytes / float(tokens.tokens.sum()) if len(tokens) else None,
        "capacity_bytes": float(run.info.capacity_bytes),
        "gpu_bytes": float(prepared.memory.total_bytes),
    }
    return {**run.headline(), **shares, **sizes}


def _told(error: Exception) -> str:
    """An error and where it was raised, in one line."""
    last = traceback.extract_tb(error.__traceback__)[-1]
    words = " ".join(str(error).split())
    if isinstance(error, _OtherContentError):
        return words
    return f"{type(error).__name__}: {words} ({last.filename.rpartition('/')[2]}, line {last.lineno})"
