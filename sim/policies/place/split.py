"""What placements share: the usual order of an assignment, how long one takes, and deciding every case but once."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable, Sequence
from functools import lru_cache
from typing import ClassVar

from sim.policies.base import Assignment, LayerView, PlacementPolicy, PolicyContext

CASES = 8192
"""Decisions that a :class:`Scheduled` placement remembers; the least recently used is forgotten first."""


def split(view: LayerView, cpu: Sequence[int]) -> Assignment:
    """The assignment that leaves all but ``cpu`` to the GPU, in an order than which none ends sooner.

    The GPU takes what is resident, then what is being prefetched as it arrives, then what is missing as it is copied,
    most tokens first: copies take equally long, and experts with more tokens no less than those with fewer.
    """
    on_cpu = set(cpu)
    arriving = sorted(zip(view.arrivals_s, range(len(view.late)), view.late, strict=True))
    ready = [*view.hits, *[load for _, _, load in arriving]]
    copies = [expert for expert, _ in view.misses if expert not in on_cpu]
    return Assignment([*cpu], [*[expert for expert, _ in ready if expert not in on_cpu], *copies], copies)


def makespan_s(view: LayerView, assignment: Assignment) -> float:
    """Seconds from now until both sides have ended ``assignment`` and what they are busy with, by the view's costs."""
    cpu_s, gpu_s, copied_s = view.cpu_free_s, view.gpu_free_s, view.link_free_s
    tokens = dict([*view.hits, *view.late, *view.misses])
    there_s = {expert: arrival_s for (expert, _), arrival_s in zip(view.late, view.arrivals_s, strict=True)}
    for expert in assignment.copies:
        copied_s += view.copy_s
        there_s[expert] = copied_s
    for expert in assignment.gpu:
        gpu_s = max(gpu_s, there_s.get(expert, 0.0)) + view.gpu_expert_s(tokens[expert])
    first = True
    for expert in assignment.cpu:
        cpu_s += view.cpu_expert_s(tokens[expert], first)
        first = False
    return max(cpu_s, gpu_s)


def ranked(view: LayerView) -> tuple[LayerView, list[int]]:
    """``view`` with every expert replaced by its rank in order of load, and the experts by rank.

    Two layers that differ in nothing but the names of their experts become the same.
    """
    loads = sorted([(-tokens, expert) for part in (view.hits, view.late, view.misses) for expert, tokens in part])
    experts = [expert for _, expert in loads]
    rank = {expert: place for place, expert in enumerate(experts)}

    def renamed(part: Iterable[tuple[int, int]]) -> tuple[tuple[int, int], ...]:
        return tuple([(rank[expert], tokens) for expert, tokens in part])

    hits, late, misses = map(renamed, (view.hits, view.late, view.misses))
    case = view._replace(layer=0, hits=hits, late=late, misses=misses, free_slots=0, arrivals_s=tuple(view.arrivals_s))
    return case, experts


class Scheduled(PlacementPolicy):
    """A placement that follows from loads, residency and predicted seconds alone, so that a case is decided once.

    A case is :func:`ranked`: :meth:`schedule` must not look at the layer or its free slots, and may compare experts by
    their ids only where their loads are equal.
    """

    takes_hits: ClassVar[bool] = True

    def __init__(self, context: PolicyContext) -> None:
        super().__init__(context)
        self._decided = lru_cache(maxsize=CASES)(self.schedule)

    def place(self, view: LayerView) -> Assignment:
        case, experts = ranked(view)
        cpu, gpu, copies, fallback = self._decided(case)
        name = experts.__getitem__
        return Assignment([*map(name, cpu)], [*map(name, gpu)], [*map(name, copies)], fallback)

    @abstractmethod
    def schedule(self, view: LayerView) -> Assignment:
        """The assignment for a case, or for a view that was not ranked."""
