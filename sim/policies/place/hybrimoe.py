"""HybriMoE's schedule of one layer: three timelines, of which the one that would end first acts."""

from __future__ import annotations

from collections.abc import Mapping
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
        alone = min(self._alone(view), key=lambda one: makespan_s(view, one))
        return alone._replace(fallback=True) if makespan_s(view, alone) < makespan_s(view, own) else own

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
    """The clocks and queues of one layer while it is being scheduled."""

    def __init__(self, view: LayerView, in_order: bool, takes_transfers: bool) -> None:
        self._view, self._in_order, self._takes_transfers = view, in_order, takes_transfers
        self._clock = {GPU: view.gpu_free_s, CPU: view.cpu_free_s, LINK: view.link_free_s}
        self._tokens = dict([*view.hits, *view.late, *view.misses])
        self._there_s = {expert: s for (expert, _), s in zip(view.late, view.arrivals_s, strict=True)}
        self._on_gpu = self._by_load([expert for expert, _ in (*view.hits, *view.late)])
        self._on_cpu = sorted([expert for expert, _ in view.misses], key=lambda expert: (self._tokens[expert], expert))
        self._cpu_idle, self._refused = True, False

    def run(self) -> list[Move]:
        """Takes operation after operation, until nothing is left."""
        moves = []
        while self._on_gpu or self._on_cpu:
            offers = [offer for offer in (self._gpu(), self._cpu(), self._link()) if offer is not None]
            move = min(offers, key=lambda offer: offer.end_s)
            if move.timeline == LINK and not self._pays(move):
                self._refused = True
                continue
            self._take(move)
            moves.append(move)
        return moves

    def _gpu(self) -> Move | None:
        if not self._on_gpu:
            return None
        expert = self._head()
        start_s = max(self._clock[GPU], self._there_s.get(expert, 0.0))
        return Move(GPU, expert, start_s + self._view.gpu_expert_s(self._tokens[expert]))

    def _cpu(self) -> Move | None:
        if self._on_cpu:
            return Move(CPU, self._on_cpu[0], self._clock[CPU] + self._cpu_s(self._on_cpu[0], self._cpu_idle))
        free = [expert for expert in self._on_gpu if self._takes_transfers or expert not in self._there_s]
        if not free:
            return None
        expert = min(free, key=lambda expert: (self._tokens[expert], expert))
        return Move(CPU, expert, self._clock[CPU] + self._cpu_s(expert, self._cpu_idle))

    def _link(self) -> Move | None:
        if self._refused or not self._on_cpu:
            return None
        return Move(LINK, self._by_load(self._on_cpu)[0], self._clock[LINK] + self._view.copy_s)

    def _pays(self, transfer: Move) -> bool:
        """Whether the GPU could end with the expert before the CPU would end its whole queue."""
        left = enumerate(self._on_cpu)
        cpu_s = self._clock[CPU] + sum(self._cpu_s(expert, self._cpu_idle and not place) for place, expert in left)
        gpu_s = max(self._clock[GPU], transfer.end_s) + self._view.gpu_expert_s(self._tokens[transfer.expert])
        return gpu_s < cpu_s

    def _take(self, move: Move) -> None:
        timeline, expert, self._clock[timeline] = move
        if timeline == LINK:
            self._on_cpu.remove(expert)
            self._there_s[expert] = move.end_s
            self._on_gpu = self._by_load([*self._on_gpu, expert])
            return
        (self._on_cpu if expert in self._on_cpu else self._on_gpu).remove(expert)
        self._cpu_idle = self._cpu_idle and timeline == GPU

    def _head(self) -> int:
        """What the GPU takes next from its queue, which is in order of load."""
        now_s = self._clock[GPU]
        if self._in_order:
            return self._on_gpu[0]
        return min(self._on_gpu, key=lambda expert: max(now_s, self._there_s.get(expert, now_s)))

    def _cpu_s(self, expert: int, first: bool) -> float:
        return self._view.cpu_expert_s(self._tokens[expert], first)

    def _by_load(self, experts: list[int]) -> list[int]:
        return sorted(experts, key=lambda expert: (-self._tokens[expert], expert))
