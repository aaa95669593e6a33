"""Random delays in everything that a device does: no run changes, and taking a wait out is found."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache, partial

import numpy as np
import pytest
import torch

from real.cpu_device import CpuDevice
from real.decode import Machine
from real.device import Chunks, Run, Work
from real.executor import Executor
from real.record import Collector
from real.routing import RouterTap
from real.store import SlotError
from sim.plan import COPY, Operation
from sim.policies import PLACEMENT, PREFETCH
from tests.real import tiny
from tests.real.running import PROMPTS, assert_near, forced, own_model
from traces.workload import Workload, lock_step

FORCED = [[3, 4], [7, 8], [9, 10]]
FAMILIES = ("qwen3_moe", "olmoe", "mixtral", "qwen2_moe", "deepseek_v2")
AHEAD = [name for name, policy in PREFETCH.items() if not policy.needs - {"lookahead", "future"} and name != "none"]
CHUNK_BYTES = 1024
"""A sixth of an expert of the tiny models."""
QUICK, SLOW = (0.0, 4e-5), (3e-4, 6e-4)
"""Seconds of a pause, from and to."""

Pauses = dict[str, tuple[float, float]]


class Jittery(CpuDevice):
    """The CPU device with a random pause before every piece of work on the resources that ``pauses`` names.

    ``careless`` takes waits out: those of the GPU for its copies ("gpu"), or those of copies for the last read of
    their slots ("copy").
    """

    chunk_bytes = CHUNK_BYTES

    def __init__(self, seed: int, pauses: Pauses, careless: str = "") -> None:
        super().__init__(pin=False)
        self._rng, self._pauses, self._careless = np.random.default_rng(seed), pauses, careless

    def gpu(self, run: Run, after: Sequence[Work]) -> Work:
        return super().gpu(self._late("gpu", run), () if self._careless == "gpu" else after)

    def copy(self, run: Run | Chunks, after: Sequence[Work], *, prefetch: bool = False) -> Work:
        late = self._late("copy", run) if callable(run) else [self._late("copy", chunk) for chunk in run]
        return super().copy(late, () if self._careless == "copy" else after, prefetch=prefetch)

    def save(self, run: Run, after: Sequence[Work]) -> Work:
        return super().save(self._late("save", run), after)

    def cpu(self, run: Run) -> Work:
        return super().cpu(self._late("cpu", run))

    def _late(self, resource: str, run: Run) -> Run:
        least_s, most_s = self._pauses[resource]
        pause_s = float(self._rng.uniform(least_s, most_s))

        def after_a_pause() -> None:
            time.sleep(pause_s)
            run()

        return after_a_pause


@cache
def workload(model_type: str, lanes: int) -> Workload:
    """What the plain model's routers choose, and would choose a layer later, for the forced tokens."""
    loaded = tiny.model(model_type)
    collector = Collector(loaded)
    with RouterTap(loaded.layers, collector):
        tiny.logits_of(loaded, PROMPTS[:lanes], FORCED[:lanes], hooks=collector)
    return lock_step(replace(collector.finish(), gates=None), lanes)  # those of a trace are rounded


@cache
def wanted(model_type: str, lanes: int) -> list[torch.Tensor]:
    """Logits of the plain model."""
    return list(tiny.logits_of(own_model(model_type), PROMPTS[:lanes], FORCED[:lanes]))


def logits(device: CpuDevice, model_type: str, lanes: int, slots: int, **system: object) -> list[torch.Tensor]:
    machine = Machine.prepare(own_model(model_type), device)
    return forced(machine, workload(model_type, lanes), PROMPTS[:lanes], FORCED[:lanes], slots, **system).logits


def systems(count: int) -> list[tuple[int, str, int, int, dict[str, object]]]:
    """Random systems on random models; every placement and every prefetch policy comes up."""
    rng = np.random.default_rng(11)
    places, aheads, drawn = [*PLACEMENT], ["none", *AHEAD], []
    for seed in range(count):
        system: dict[str, object] = {
            "place": places[seed % len(places)],
            "prefetch": aheads[seed % len(aheads)],
            "evict": str(rng.choice(["lru", "lfu", "belady"])),
            "scope": str(rng.choice(["layer", "global"])),
            "write_back": bool(rng.random() < 0.3),
        }
        family, lanes, slots = str(rng.choice(FAMILIES)), int(rng.integers(1, 4)), int(rng.integers(1, 5))
        drawn.append((seed, family, lanes, slots, system))
    return drawn


JITTER: Pauses = {"gpu": (0.0, 2e-4), "copy": (0.0, 1e-4), "save": (0.0, 3e-4), "cpu": (0.0, 3e-4)}


@pytest.mark.parametrize(
    ("seed", "model_type", "lanes", "slots", "system"), systems(20), ids=[f"run{seed}" for seed in range(20)]
)
def test_no_delay_changes_what_comes_out(
    seed: int, model_type: str, lanes: int, slots: int, system: dict[str, object]
) -> None:
    with Jittery(seed, JITTER) as device:
        assert_near(logits(device, model_type, lanes, slots, **system), wanted(model_type, lanes))


def test_every_placement_and_prefetch_is_among_the_random_systems() -> None:
    drawn = [system for *_, system in systems(20)]
    assert {system["place"] for system in drawn} == {*PLACEMENT}
    assert {system["prefetch"] for system in drawn} == {"none", *AHEAD}


def is_wrong(run: Callable[[], list[torch.Tensor]], right: Sequence[torch.Tensor]) -> bool:
    """Whether a run noticed that a slot held something else, or gave other logits."""
    try:
        assert_near(run(), right)
    except (SlotError, AssertionError):
        return True
    return False


LATE_COPIES: Pauses = {"gpu": QUICK, "copy": SLOW, "save": QUICK, "cpu": QUICK}
LATE_READS: Pauses = {"gpu": SLOW, "copy": QUICK, "save": QUICK, "cpu": QUICK}


def test_a_copy_waits_for_the_last_read_of_its_slot_also_where_a_plan_does_not_say_so(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    awaited = Executor._awaited

    def left_out(executor: Executor, operation: Operation) -> list[Work]:
        return [] if operation.op == COPY else awaited(executor, operation)

    monkeypatch.setattr(Executor, "_awaited", left_out)
    with Jittery(5, LATE_READS) as device:
        assert_near(logits(device, "qwen3_moe", 3, 1), wanted("qwen3_moe", 3))


@pytest.mark.parametrize("prefetch", ["none", "next-router"])
@pytest.mark.parametrize(("careless", "pauses"), [("gpu", LATE_COPIES), ("copy", LATE_READS)])
def test_a_wait_that_is_taken_out_is_found(careless: str, pauses: Pauses, prefetch: str) -> None:
    for mutation in ("", careless):
        with Jittery(5, pauses, mutation) as device:
            # one slot a layer: most of a prompt's experts stream through the staging slots
            run = partial(logits, device, "qwen3_moe", 3, 1, prefetch=prefetch)
            found = is_wrong(run, wanted("qwen3_moe", 3))
        assert found == bool(mutation)
