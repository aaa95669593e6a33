"""HybriMoE's schedule of one layer: three timelines, of which the one that would end first acts."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Mapping
from itertools import accumulate
from math import inf
from typing import Any, ClassVar, NamedTuple, TypeAlias

from sim.policies.base import Assignment, LayerView
from sim.policies.place.split import Scheduled, makespan_s, split

CPU, GPU, LINK = "cpu", "gpu", "link"


class Move(NamedTuple):
    """What one timeline does next: an expert computed (or copied, on the link) until ``end_s``."""

    timeline: str
    expert: int
    end_s: float


Offer: TypeAlias = tuple[float, int, int]
"""When a timeline's next operation would end, its expert, and that one's tokens."""

NEVER: Offer = (inf, -1, 0)


class HybriMoe(Scheduled):
    """Minimises max(CPU time, GPU time) of one layer by a greedy walk along three timelines.

    The GPU's queue holds the resident experts, most tokens first; the CPU's queue the missing ones, fewest tokens
    first. Whichever timeline would end its next operation first does it: the GPU the head of its queue; the CPU the
    head of its own, or, when that is empty, the lowest load of the GPU's; the link brings the highest load of the CPU's
    queue, which joins the GPU's by load. Source: Zhong et al., *HybriMoE* (arXiv 2504.05897), section IV-B.

    Chosen here, where the paper is silent. Ties go GPU, CPU, link; equal loads by the lowest id. An expert in transfer,
    whether demanded or prefetched, is not for the CPU (option ``cpu_takes_transfers``: it is, and a demanded copy is
    then not made). The GPU waits for the head of its queue (option ``gpu_order`` = "ready-first": it takes the highest
    load that is there, or else what comes first). A transfer is begun only if the GPU could end with it before the CPU
    would end with all that is left in its queue, and once refused none is begun in that layer. (The CPU needs no such
    guard: what it takes from the GPU's queue it ends before the GPU ends anything more.) Where one device alone is
    quicker than the walk, that is used, and told as ``fallback``.
    """

    name: ClassVar[str] = "hybrimoe"
    defaults: ClassVar[Mapping[str, Any]] = {"gpu_order": "head", "cpu_takes_transfers": False}

    def __init__(self, context: Any) -> None:
        super().__init__(context)
        if self.options["gpu_order"] not in ("head", "ready-first"):
            raise ValueError(f"gpu_order must be head or ready-first, got {self.options['gpu_order']!r}")

    def schedule(self, view: LayerView) -> Assignment:
        own = assignment_of(self.moves(view))
        alone = [(makespan_s(view, one), one) for one in self._alone(view)]
        quickest_s, quickest = min(alone, key=lambda timed: timed[0])
        return quickest._replace(fallback=True) if quickest_s < makespan_s(view, own) else own

    def moves(self, view: LayerView) -> list[Move]:
        """The walk itself, in its order, without the fallback to one device."""
        return _Walk(view, self.options["gpu_order"] == "head", self.options["cpu_takes_transfers"]).run()

    def _alone(self, view: LayerView) -> list[Assignment]:
        """All on the GPU; all on the CPU, unless something is in transfer that it may not take."""
        loads = sorted([*view.hits, *view.late, *view.misses], key=lambda load: (load[1], load[0]))
        on_cpu = [split(view, [expert for expert, _ in loads])]
        return [split(view, ()), *(on_cpu if self.options["cpu_takes_transfers"] or not view.late else ())]


def assignment_of(moves: list[Move]) -> Assignment:
    """The assignment that a walk amounts to; a copy of what the CPU took after all is left out."""
    cpu, gpu, copies = ([move.expert for move in moves if move.timeline == name] for name in (CPU, GPU, LINK))
    return Assignment(cpu, gpu, [expert for expert in copies if expert in gpu])


class _Walk:
    """The clocks and queues of one layer while it is being scheduled.

    Each queue is kept in order by bisection, so that a prompt's layer costs little more than its experts' number.
    """

    def __init__(self, view: LayerView, in_order: bool, takes_transfers: bool) -> None:
        self._copy_s, self._in_order, self._takes_transfers = view.copy_s, in_order, takes_transfers
        self._clock = {GPU: view.gpu_free_s, CPU: view.cpu_free_s, LINK: view.link_free_s}
        self._there_s = {expert: s for (expert, _), s in zip(view.late, view.arrivals_s, strict=True)}
        here = [*view.hits, *view.late]
        self._on_gpu = sorted([(-tokens, expert) for expert, tokens in here])  # the GPU's queue, from its head on
        self._on_cpu = sorted([(tokens, expert) for expert, tokens in view.misses])  # the CPU's, likewise
        takes = here if takes_transfers else view.hits
        self._spare = sorted([(tokens, expert) for expert, tokens in takes])  # of the GPU's, what the CPU may take
        loads = {tokens for part in (here, view.misses) for _, tokens in part}
        self._gpu_s = {tokens: view.gpu_expert_s(tokens) for tokens in loads}
        self._cpu_s = {tokens: view.cpu_expert_s(tokens, False) for tokens in loads}
        self._first_s = {tokens: view.cpu_expert_s(tokens, True) for tokens in loads}
        self._sums_s = [0.0, *accumulate(self._cpu_s[tokens] for tokens, _ in self._on_cpu)]
        self._begun = 0  # experts that the CPU has taken from its own queue, lowest loads first
        self._cpu_idle, self._refused = True, False

    def run(self) -> list[Move]:
        """Takes operation after operation, until nothing is left."""
        moves = []
        while self._on_gpu or self._on_cpu:
            timeline, offer = GPU, self._gpu()
            for other, made in ((CPU, self._cpu()), (LINK, self._link())):
                if made[0] < offer[0]:
                    timeline, offer = other, made
            if timeline == LINK and not self._pays(offer):
                self._refused = True
                continue
            self._take(timeline, offer)
            moves.append(Move(timeline, offer[1], offer[0]))
        return moves

    def _gpu(self) -> Offer:
        if not self._on_gpu:
            return NEVER
        load, expert = self._on_gpu[0] if self._in_order else self._ready_first()
        start_s = max(self._clock[GPU], self._there_s.get(expert, 0.0))
        return start_s + self._gpu_s[-load], expert, -load

    def _ready_first(self) -> tuple[int, int]:
        now_s, there_s = self._clock[GPU], self._there_s
        return min(self._on_gpu, key=lambda item: max(now_s, there_s.get(item[1], now_s)))

    def _cpu(self) -> Offer:
        queue = self._on_cpu or self._spare
        if not queue:
            return NEVER
        tokens, expert = queue[0]
        seconds = self._first_s if self._cpu_idle else self._cpu_s
        return self._clock[CPU] + seconds[tokens], expert, tokens

    def _link(self) -> Offer:
        queue = self._on_cpu
        if self._refused or not queue:
            return NEVER
        most = queue[-1][0]
        return self._clock[LINK] + self._copy_s, queue[bisect_left(queue, (most, -1))][1], most

    def _pays(self, transfer: Offer) -> bool:
        """Whether the GPU could end with the expert before the CPU would end its whole queue."""
        lowest = self._on_cpu[0][0]
        extra_s = self._first_s[lowest] - self._cpu_s[lowest] if self._cpu_idle else 0.0
        left_s = self._sums_s[self._begun + len(self._on_cpu)] - self._sums_s[self._begun]
        gpu_s = max(self._clock[GPU], transfer[0]) + self._gpu_s[transfer[2]]
        return gpu_s < self._clock[CPU] + extra_s + left_s

    def _take(self, timeline: str, offer: Offer) -> None:
        end_s, expert, tokens = offer
        self._clock[timeline] = end_s
        if timeline == LINK:
            _remove(self._on_cpu, (tokens, expert))
            self._there_s[expert] = end_s
            insort(self._on_gpu, (-tokens, expert))
            if self._takes_transfers:
                insort(self._spare, (tokens, expert))
            return
        self._cpu_idle = self._cpu_idle and timeline == GPU
        if timeline == CPU and self._on_cpu:
            del self._on_cpu[0]
            self._begun += 1
            return
        _remove(self._on_gpu, (-tokens, expert))
        if self._takes_transfers or expert not in self._there_s:
            _remove(self._spare, (tokens, expert))


def _remove(queue: list[tuple[int, int]], item: tuple[int, int]) -> None:
    """Takes ``item`` out of a sorted queue that has it."""
    del queue[bisect_left(queue, item)]
