"""HybriMoE's schedule of one layer: three timelines, of which the one that would end first acts."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Iterable, Mapping
from itertools import accumulate
from math import inf
from typing import Any, ClassVar, NamedTuple

from sim.policies.base import Assignment, LayerView
from sim.policies.place.split import Scheduled, makespan_s, split

CPU, GPU, LINK = "cpu", "gpu", "link"


class Move(NamedTuple):
    """What one timeline does next: an expert computed (or copied, on the link) until ``end_s``."""

    timeline: str
    expert: int
    end_s: float


class HybriMoe(Scheduled):
    """Minimises max(CPU time, GPU time) of one layer by a greedy walk along three timelines.

    The GPU's queue holds the resident experts, most tokens first; the CPU's queue the missing ones, fewest tokens
    first. Whichever timeline would end its next operation first does it: the GPU the head of its queue; the CPU the
    head of its own, or, when that is empty, the lowest load of the GPU's; the link brings the highest load of the CPU's
    queue, which joins the GPU's by load. Source: Zhong et al., *HybriMoE* (arXiv 2504.05897), section IV-B.

    Chosen here, where the paper is silent. Ties go GPU, CPU, link; equal loads by the lowest id. An expert in transfer,
    whether demanded or prefetched, is not for the CPU until it has come (option ``cpu_takes_transfers``: it is at
    once); a demanded copy that the CPU makes useless is not made. The GPU waits for the head of its queue (option
    ``gpu_order`` = "ready-first": it takes the highest load that is there, or else what comes first). A transfer is
    begun only if the GPU could end with it before the CPU would end with all that is left in its queue, and once
    refused none is begun in that layer. (The CPU needs no such guard: what it takes from the GPU's queue it ends before
    the GPU ends anything more.) Where one device alone is quicker than the walk, that is used, and told as
    ``fallback``; the CPU alone then takes what is in transfer, too.
    """

    name: ClassVar[str] = "hybrimoe"
    defaults: ClassVar[Mapping[str, Any]] = {"gpu_order": "head", "cpu_takes_transfers": False}

    def __init__(self, context: Any) -> None:
        super().__init__(context)
        if self.options["gpu_order"] not in ("head", "ready-first"):
            raise ValueError(f"gpu_order must be head or ready-first, got {self.options['gpu_order']!r}")

    def schedule(self, view: LayerView) -> tuple[Assignment, float]:
        walk = self._walk(view)
        own = assignment_of(walk.run())
        own_s = walk.end_s if walk.copies == len(own.copies) else makespan_s(view, own)
        gpu_s, cpu_s = walk.gpu_alone_s(view), walk.cpu_alone_s(view)
        if own_s <= min(gpu_s, cpu_s):
            return own, own_s
        on_cpu = [] if gpu_s <= cpu_s else [expert for _, expert in _lowest_first(view)]
        return split(view, on_cpu)._replace(fallback=True), min(gpu_s, cpu_s)

    def moves(self, view: LayerView) -> list[Move]:
        """The walk itself, in its order, without the fallback to one device."""
        return [Move(*move) for move in self._walk(view).run()]

    def _walk(self, view: LayerView) -> _Walk:
        return _Walk(view, self.options["gpu_order"] == "head", self.options["cpu_takes_transfers"])


def assignment_of(moves: Iterable[tuple[str, int, float]]) -> Assignment:
    """Who computes what; of the copies, those that the GPU came to use."""
    took: dict[str, list[int]] = {CPU: [], GPU: [], LINK: []}
    for timeline, expert, _ in moves:
        took[timeline].append(expert)
    on_gpu = {*took[GPU]}
    return Assignment(took[CPU], took[GPU], [expert for expert in took[LINK] if expert in on_gpu])


def _lowest_first(view: LayerView) -> list[tuple[int, int]]:
    """(tokens, expert) of the whole layer, fewest tokens first, then the lowest id."""
    return sorted([(tokens, expert) for part in (view.hits, view.late, view.misses) for expert, tokens in part])


class _Walk:
    """The clocks and queues of one layer while it is being scheduled.

    As long as the CPU has a queue of its own, the GPU changes nothing for CPU and link: it is brought forward to each
    of their operations. Every queue is kept in order, so that a prompt's layer costs little more than its experts'
    number.
    """

    def __init__(self, view: LayerView, in_order: bool, takes_transfers: bool) -> None:
        self._copy_s, self._in_order, self._takes_transfers = view.copy_s, in_order, takes_transfers
        self._gpu_now_s, self._cpu_now_s, self._link_now_s = view.gpu_free_s, view.cpu_free_s, view.link_free_s
        self._there_s = {expert: s for (expert, _), s in zip(view.late, view.arrivals_s, strict=True)}
        self._late = len(self._there_s)
        here = [*view.hits, *view.late]
        self._on_gpu = sorted([(-tokens, expert) for expert, tokens in here])  # the GPU's queue, from its head on
        self._on_cpu = sorted([(tokens, expert) for expert, tokens in view.misses])  # the CPU's, likewise
        self._spare = sorted([(tokens, expert) for expert, tokens in here])  # the same, lowest loads first
        loads = {tokens for part in (here, view.misses) for _, tokens in part}
        self._gpu_s = {tokens: view.gpu_expert_s(tokens) for tokens in loads}
        self._cpu_s = {tokens: view.cpu_expert_s(tokens, False) for tokens in loads}
        self._first_s = {tokens: view.cpu_expert_s(tokens, True) for tokens in loads}
        self._sums_s = [0.0, *accumulate([self._cpu_s[tokens] for tokens, _ in self._on_cpu])]
        self._begun = 0  # experts that the CPU has taken from its own queue, lowest loads first
        self._cpu_idle, self._refused = True, False
        self._moves: list[tuple[str, int, float]] = []  # fields of Move
        self._computed = set[int]()  # by the GPU: no longer spare
        self._look()

    @property
    def end_s(self) -> float:
        """When GPU and CPU have ended what they took so far."""
        return max(self._gpu_now_s, self._cpu_now_s)

    @property
    def copies(self) -> int:
        """Experts that the link brought so far."""
        return len(self._there_s) - self._late

    def run(self) -> list[tuple[str, int, float]]:
        """Takes operation after operation, until nothing is left."""
        on_cpu = self._on_cpu
        while on_cpu:
            tokens, expert = on_cpu[0]
            cpu_end_s = self._cpu_now_s + (self._first_s if self._cpu_idle else self._cpu_s)[tokens]
            link_end_s = inf if self._refused else self._link_now_s + self._copy_s
            while self._gpu_end_s <= cpu_end_s and self._gpu_end_s <= link_end_s:
                self._compute()
            if cpu_end_s <= link_end_s:
                del on_cpu[0]
                self._begun += 1
                self._take(expert, cpu_end_s)
            else:
                self._fetch(link_end_s)
        while self._on_gpu:
            self._help()
        return self._moves

    def gpu_alone_s(self, view: LayerView) -> float:
        """When the GPU would end all of ``view``, each part as it is there."""
        now_s, copied_s, seconds = view.gpu_free_s, view.link_free_s, self._gpu_s
        for _, tokens in view.hits:
            now_s += seconds[tokens]
        for arrival_s, _, (_, tokens) in sorted(zip(view.arrivals_s, range(len(view.late)), view.late, strict=True)):
            now_s = max(now_s, arrival_s) + seconds[tokens]
        for _, tokens in view.misses:
            copied_s += view.copy_s
            now_s = max(now_s, copied_s) + seconds[tokens]
        return max(now_s, view.cpu_free_s)

    def cpu_alone_s(self, view: LayerView) -> float:
        """When the CPU would end all of ``view``, without a thought of what is in transfer."""
        now_s, seconds = view.cpu_free_s, self._first_s
        for tokens, _ in _lowest_first(view):
            now_s, seconds = now_s + seconds[tokens], self._cpu_s
        return max(now_s, view.gpu_free_s)

    def _look(self) -> None:
        """Notes what the GPU would take next, and when it would end that."""
        queue, self._next, self._gpu_end_s = self._on_gpu, 0, inf
        if queue:
            if not self._in_order:
                self._next = self._ready_first()
            load, expert = queue[self._next]
            there_s = self._there_s.get(expert, 0.0)
            start_s = there_s if there_s > self._gpu_now_s else self._gpu_now_s
            self._gpu_end_s = start_s + self._gpu_s[-load]

    def _ready_first(self) -> int:
        now_s, there_s, queue = self._gpu_now_s, self._there_s, self._on_gpu
        return min(range(len(queue)), key=lambda place: max(now_s, there_s.get(queue[place][1], now_s)))

    def _compute(self) -> None:
        """The GPU takes what is next."""
        expert = self._on_gpu.pop(self._next)[1]
        self._gpu_now_s = self._gpu_end_s
        self._computed.add(expert)
        self._moves.append((GPU, expert, self._gpu_end_s))
        self._look()

    def _take(self, expert: int, end_s: float) -> None:
        """The CPU takes ``expert``."""
        self._cpu_now_s, self._cpu_idle = end_s, False
        self._moves.append((CPU, expert, end_s))

    def _fetch(self, end_s: float) -> None:
        """The link brings the highest load of the CPU's queue, if that pays."""
        queue = self._on_cpu
        most = queue[-1][0]
        if not self._pays(most, end_s):
            self._refused = True
            return
        expert = queue.pop(bisect_left(queue, (most, -1)))[1]
        self._link_now_s = self._there_s[expert] = end_s
        self._moves.append((LINK, expert, end_s))
        insort(self._on_gpu, (-most, expert))
        insort(self._spare, (most, expert))
        self._look()

    def _pays(self, tokens: int, there_s: float) -> bool:
        """Whether the GPU could end with the expert before the CPU would end its whole queue."""
        lowest = self._on_cpu[0][0]
        extra_s = self._first_s[lowest] - self._cpu_s[lowest] if self._cpu_idle else 0.0
        left_s = self._sums_s[self._begun + len(self._on_cpu)] - self._sums_s[self._begun]
        return max(self._gpu_now_s, there_s) + self._gpu_s[tokens] < self._cpu_now_s + extra_s + left_s

    def _help(self) -> None:
        """With its own queue done, the CPU takes the lowest load of the GPU's that is there when it is free, if it
        would end before the GPU."""
        place = self._landed()
        if place is not None:
            tokens, expert = self._spare[place]
            end_s = self._cpu_now_s + (self._first_s if self._cpu_idle else self._cpu_s)[tokens]
            if end_s < self._gpu_end_s:
                del self._spare[place]
                del self._on_gpu[bisect_left(self._on_gpu, (-tokens, expert))]
                self._take(expert, end_s)
                self._look()
                return
        self._compute()

    def _landed(self) -> int | None:
        """The place of the first spare expert that the CPU may take."""
        spare, computed = self._spare, self._computed
        while spare and spare[0][1] in computed:
            del spare[0]
        for place, (_, expert) in enumerate(spare):
            is_there = self._takes_transfers or self._there_s.get(expert, 0.0) <= self._cpu_now_s
            if is_there and expert not in computed:
                return place
        return None
