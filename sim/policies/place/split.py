"""What placements share: the usual order of an assignment, how long one takes, and deciding every case but once."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from functools import lru_cache
from typing import Any, ClassVar, TypeAlias

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
    _, hits, misses, _, gpu_expert_s, cpu_expert_s, copy_s, late, arrivals_s, gpu_s, copied_s, cpu_s = view
    tokens = dict([*hits, *late, *misses])
    there_s = {expert: arrival_s for (expert, _), arrival_s in zip(late, arrivals_s, strict=True)}
    for expert in assignment.copies:
        copied_s += copy_s
        there_s[expert] = copied_s
    for expert in assignment.gpu:
        if expert in there_s and there_s[expert] > gpu_s:
            gpu_s = there_s[expert]
        gpu_s += gpu_expert_s(tokens[expert])
    first = True
    for expert in assignment.cpu:
        cpu_s += cpu_expert_s(tokens[expert], first)
        first = False
    return max(cpu_s, gpu_s)


Case: TypeAlias = tuple[tuple[int, ...], tuple[int, ...], tuple[float, ...], tuple[Any, ...]]
"""By rank in order of load: minus the tokens, and the part (0 hit, 1 late, 2 miss); when the late ones arrive; costs
and clocks."""


def ranked(view: LayerView) -> tuple[Case, Sequence[int]]:
    """What a schedule of ``view`` follows from, experts being ranks in order of load, and the experts by rank.

    Two layers that differ in nothing but the names of their experts become the same.
    """
    _, hits, misses, _, gpu_s, cpu_s, copy_s, late, arrivals_s, *free_s = view
    loads = [(-tokens, expert, 0) for expert, tokens in hits]
    loads += [(-tokens, expert, 2) for expert, tokens in misses]
    if late:
        loads += [(-tokens, expert, 1) for expert, tokens in late]
        arriving = sorted([(-tokens, expert, s) for (expert, tokens), s in zip(late, arrivals_s, strict=True)])
        arrivals_s = tuple([arrival_s for *_, arrival_s in arriving])
    loads.sort()
    tokens, experts, parts = zip(*loads, strict=True) if loads else ((), (), ())
    return (tokens, parts, tuple(arrivals_s), (gpu_s, cpu_s, copy_s, *free_s)), experts


def view_of(case: Case) -> LayerView:
    """The layer of a case, as ranks."""
    tokens, parts, arrivals_s, (gpu_s, cpu_s, copy_s, *free_s) = case
    loads = [(part, (rank, -negative)) for rank, (negative, part) in enumerate(zip(tokens, parts, strict=True))]
    hits, late, misses = (tuple([load for part, load in loads if part == wanted]) for wanted in range(3))
    return LayerView(0, hits, misses, 0, gpu_s, cpu_s, copy_s, late, arrivals_s, *free_s)


class Scheduled(PlacementPolicy):
    """A placement that follows from loads, residency and predicted seconds alone, so that a case is decided once.

    A case is :func:`ranked`: :meth:`schedule` must not look at the layer or its free slots, and may compare experts by
    their ids only where their loads are equal.
    """

    takes_hits: ClassVar[bool] = True

    def __init__(self, context: PolicyContext) -> None:
        super().__init__(context)
        self._decided = lru_cache(maxsize=CASES)(self._decide)

    def place(self, view: LayerView) -> Assignment:
        return self.place_timed(view)[0]

    def place_timed(self, view: LayerView) -> tuple[Assignment, float]:
        """:meth:`place`, and the makespan of it."""
        case, experts = ranked(view)
        (cpu, gpu, copies, fallback), seconds = self._decided(case)
        cpu, gpu, copies = [[experts[rank] for rank in ranks] for ranks in (cpu, gpu, copies)]
        return Assignment(cpu, gpu, copies, fallback), seconds

    def _decide(self, case: Case) -> tuple[Assignment, float]:
        return self.schedule(view_of(case))

    @abstractmethod
    def schedule(self, view: LayerView) -> tuple[Assignment, float]:
        """The assignment for a case, or for a view that was not ranked, and its makespan."""


def place_timed(policy: PlacementPolicy, view: LayerView) -> tuple[Assignment, float]:
    """What ``policy`` says of ``view``, and the makespan of that, which is remembered where the policy is."""
    if isinstance(policy, Scheduled) and type(policy).place is Scheduled.place:
        return policy.place_timed(view)
    assignment = policy.place(view) if policy.uses_cpu else split(view, ())
    return assignment, makespan_s(view, assignment)


def schedule_s(policy: PlacementPolicy, view: LayerView) -> float:
    """The makespan of what ``policy`` says of ``view``, which the caller remembers, and the policy does not."""
    if isinstance(policy, Scheduled) and type(policy).place is Scheduled.place:
        return policy.schedule(view)[1]
    return place_timed(policy, view)[1]
