"""Single pieces of work on the lanes of an idle device: what each takes, alone and while other lanes are busy."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import cached_property, partial
from itertools import combinations, cycle

import numpy as np
import torch

from real.checks import most_cpu_threads
from real.decode import Machine
from real.device import Work
from real.fit import RESOURCES
from real.kernels import Kernel, kernel_for
from real.models.load import LoadedModel
from real.routing import lookahead
from real.store import DeviceSlots
from sim.plan import CPU, GPU, Operation
from sim.spec.profile import CpuThreads, Point, Slowdown

EXPERT_TOKENS = (1, 2, 4, 8, 16, 32, 64, 128)
SPAN_S, MOST_PIECES = 0.03, 256
"""Seconds of work that each lane is given at once, and the most pieces of it."""
MOST_SLOWDOWN = 10.0
BUSY_S, MOST_BUSY_TOKENS = 5e-4, 2**14
"""An expert's seconds with which the GPU stays busy, longer than submitting it takes, and the most tokens for that."""
THREADS_TOKENS = (1, 16)
"""Tokens of the CPU experts that are measured by threads."""

Submit = Callable[[], Work]
"""Submits a piece of work, and returns it."""


class Bench:
    """Single pieces of work on the lanes of an idle device, over all slots or experts in turn, so that none is warm."""

    def __init__(self, machine: Machine, repeats: int) -> None:
        spec = machine.loaded.spec
        self._machine, self._repeats = machine, repeats
        every = [(layer, expert) for expert in range(spec.experts) for layer in range(spec.moe_layers)]
        held = every[: max(2, len(every) // 4)]
        self._slots: DeviceSlots = machine.slots(len(held))
        for slot, (layer, expert) in enumerate(held):
            self._slots.load(slot, layer, expert)
        numbered = [*enumerate(every)]
        places = {"gpu": numbered[: len(held) : 2], "link": numbered[1 : len(held) : 2], "cpu": numbered}
        self._places = {resource: cycle(own) for resource, own in places.items()}

    def experts(self, resource: str) -> list[Point]:
        """Seconds of one expert, for each of :data:`EXPERT_TOKENS`."""
        return [self._alone(resource, tokens) for tokens in EXPERT_TOKENS]

    def copy(self) -> Point:
        """Seconds of one copy."""
        return self.point(self._machine.loaded.spec.expert_bytes, lambda: self._copy()())

    def lookahead_s(self) -> float:
        """Seconds of one later router on one token's hidden state."""
        loaded, device = self._machine.loaded, self._machine.device
        routers = [layer.router for layer in loaded.layers]
        if len(routers) == 1:
            return 0.0
        hidden, times, chill = self._hidden(1), [], chilling(self._machine)
        with torch.inference_mode():
            for _ in range(10 * self._repeats):
                next(chill)
                start = device.mark()
                lookahead(hidden, 0, 1, routers, loaded.spec.top_k).flatten().tolist()
                end = device.mark()
                device.settle()
                times.append(device.time_of(end) - device.time_of(start))
        return float(np.median(times))

    def slowdowns(self) -> tuple[Slowdown, ...]:
        """By how much each resource is slower while others work without a pause: every set of two and of all three.

        Each gets as much work as takes about :data:`SPAN_S`, submitted at once; what it does from when all have begun
        until the first has ended is held against the same work alone, the quickest turn of each. So pieces that take
        turns on a core count as both slowed down.
        """
        alone_s = {name: min(self._busy([name])[name] for _ in range(self._repeats)) for name in RESOURCES}
        found = []
        for together in (chosen for count in (2, 3) for chosen in combinations(RESOURCES, count)):
            turns = [self._busy(together) for _ in range(self._repeats)]
            quickest = min(turns, key=lambda turn: sum(turn[name] / alone_s[name] for name in turn))
            for one in together:
                factor = min(max(1.0, quickest[one] / alone_s[one]), MOST_SLOWDOWN)
                others = tuple(name for name in together if name != one)
                found.append(Slowdown(resource=one, others=others, factor=factor))
        return tuple(found)

    def cpu_by_threads(self) -> tuple[CpuThreads, ...]:
        """Seconds of one CPU expert for each of :data:`THREADS_TOKENS`, by threads: 1, 2, 4... and all there are."""
        device, found = self._machine.device, []
        most, given = most_cpu_threads(device.name), device.cpu_threads
        try:
            for threads in sorted({*(2**power for power in range(most.bit_length())), most}):
                device.use_cpu_threads(threads)
                points = [self._alone("cpu", tokens) for tokens in THREADS_TOKENS]
                found.append(CpuThreads(threads=threads, points=tuple(points)))
        finally:
            device.use_cpu_threads(given)
        return tuple(found)

    def busy(self) -> tuple[Submit, float]:
        """What submits a piece of GPU work of :data:`BUSY_S` or more, if that many tokens take so long, and its
        seconds. Nothing in it waits for the GPU."""
        tokens = 1
        while True:
            submit = partial(self._busy_piece, self._hidden(tokens))
            seconds = self.point(tokens, submit).median_s
            if seconds >= BUSY_S or tokens >= MOST_BUSY_TOKENS:
                return submit, seconds
            tokens *= 4

    def _busy_piece(self, hidden: torch.Tensor) -> Work:
        slot, (layer, expert) = next(self._places["gpu"])
        operation = Operation(0, GPU, layer, expert, slot, len(hidden), 0)

        def run() -> None:
            self._compute(operation, hidden)

        return self._machine.device.gpu(run, ())

    def _busy(self, resources: Sequence[str]) -> dict[str, float]:
        """Seconds of a piece of work on each of ``resources``, while all of them have work.

        All are made before the first is submitted, because to make one takes a wait for a GPU. Who has the fewest,
        longest pieces gets them first: some devices begin while others are still being submitted.
        """
        device, works = self._machine.device, dict[str, list[Work]]()
        made = {name: [self._piece(name) for _ in range(self._pieces[name])] for name in resources}
        device.settle()
        for name in sorted(resources, key=self._pieces.__getitem__):
            works[name] = [submit() for submit in made[name]]
        device.wait([work for own in works.values() for work in own])
        device.settle()
        begun_s = max(own[0].start_s for own in works.values())
        ended_s = min(own[-1].end_s for own in works.values())
        if ended_s <= begun_s:  # one after the other: then each took all the time
            begun_s = min(own[0].start_s for own in works.values())
            ended_s = max(own[-1].end_s for own in works.values())
        return {name: (ended_s - begun_s) / _done(own, begun_s, ended_s) for name, own in works.items()}

    @cached_property
    def _pieces(self) -> dict[str, int]:
        """How many pieces take about :data:`SPAN_S` on each resource."""
        points = {"link": self.copy(), **{name: self._alone(name, 1) for name in RESOURCES if name != "link"}}
        seconds = {name: point.median_s for name, point in points.items()}
        return {name: min(MOST_PIECES, max(2, round(SPAN_S / max(one, 1e-9)))) for name, one in seconds.items()}

    def _piece(self, resource: str) -> Submit:
        return self._copy() if resource == "link" else self._expert(resource, 1)

    def point(self, size: int, submit: Submit) -> Point:
        """Seconds of what ``submit`` submits, over and over, each when the one before has ended; the first one is not
        counted. ``size`` names the point."""
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

    def _alone(self, resource: str, tokens: int) -> Point:
        return self.point(tokens, lambda: self._expert(resource, tokens)())

    def _expert(self, resource: str, tokens: int) -> Submit:
        slot, (layer, expert) = next(self._places[resource])
        operation = Operation(0, GPU if resource == "gpu" else CPU, layer, expert, slot, tokens, 0)
        kernel, device = self._kernel(expert, tokens), self._machine.device
        if resource == "gpu":
            return partial(device.gpu, partial(kernel.run, operation), ())
        return partial(device.cpu, kernel.on_cpu(operation))

    def _copy(self) -> Submit:
        slot, (layer, expert) = next(self._places["link"])
        return partial(self._machine.device.copy, partial(self._slots.load, slot, layer, expert), ())

    def _kernel(self, expert: int, tokens: int) -> Kernel:
        hidden = self._hidden(tokens)
        ids = torch.full((tokens, 1), expert, device=hidden.device)
        return kernel_for(self._compute, hidden, ids, torch.ones_like(ids, dtype=torch.float32))

    def _compute(self, operation: Operation, hidden: torch.Tensor) -> torch.Tensor:
        layer, expert, store = operation.layer, operation.expert, self._machine.store
        if operation.op == GPU:
            return store.form.run(self._slots.read(operation.slot, layer, expert), hidden)
        return store.form.run(store.views(store.expert(layer, expert)), hidden)

    def _hidden(self, tokens: int) -> torch.Tensor:
        loaded: LoadedModel = self._machine.loaded
        device = self._machine.device.torch_device
        return torch.ones(tokens, loaded.spec.hidden, device=device, dtype=self._machine.store.dtype)


def _done(works: Sequence[Work], begun_s: float, ended_s: float) -> float:
    """How many of ``works``, which run one after the other, were done from ``begun_s`` to ``ended_s``, with parts."""
    ends = [works[0].start_s, *(work.end_s for work in works)]
    first, last = np.interp([begun_s, ended_s], ends, range(len(ends)))
    return max(1e-9, float(last - first))


def chilling(machine: Machine) -> Iterator[None]:
    """Each turn leaves the host with cold caches, as the lanes of a device do that share them: an expert is read."""
    spec, store = machine.loaded.spec, machine.store
    hidden = torch.ones(1, spec.hidden, dtype=store.dtype)
    for expert in cycle(range(spec.experts)):
        if machine.device.joins_layers:
            with torch.inference_mode():
                store.form.run(store.views(store.expert(0, expert)), hidden)
        yield
