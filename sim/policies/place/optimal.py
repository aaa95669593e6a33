"""The best assignment that there is, for layers with few experts."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator
from itertools import combinations, product
from typing import ClassVar

from sim.policies.base import Assignment, LayerView
from sim.policies.place.split import Scheduled, makespan_s, split

MOST_EXPERTS = 8
"""Up to this many experts all 2^k assignments are tried."""


class Optimal(Scheduled):
    """Tries every assignment of up to eight experts, each in its best order, and takes the one that ends first.

    Ties go to the fewest copies, then to the fewest CPU experts, then to the first set in the order of
    ``itertools.combinations``. A bound for other placements, by predicted costs. Above eight experts the CPU takes the
    lowest loads of either kind, a of the misses and b of the hits, and of what is being prefetched the c that would
    come last, as the best such numbers say.
    """

    name: ClassVar[str] = "optimal"

    def schedule(self, view: LayerView) -> tuple[Assignment, float]:
        few = len(view.hits) + len(view.late) + len(view.misses) <= MOST_EXPERTS
        candidates = [split(view, cpu) for cpu in (_all_sets(view) if few else _low_loads(view))]
        timed = [(one, makespan_s(view, one)) for one in candidates]
        return min(timed, key=lambda one: (one[1], len(one[0].copies), len(one[0].cpu)))


def _all_sets(view: LayerView) -> Iterator[list[int]]:
    """Every set of experts; whichever is slowed least by being the first comes first."""
    loads = [*view.hits, *view.late, *view.misses]
    extra_s = {expert: view.cpu_expert_s(tokens, True) - view.cpu_expert_s(tokens, False) for expert, tokens in loads}
    loads.sort(key=lambda load: extra_s[load[0]])
    for size in range(len(loads) + 1):
        for chosen in combinations(loads, size):
            yield [expert for expert, _ in chosen]


def _low_loads(view: LayerView) -> Iterator[list[int]]:
    """For each number of misses and of late ones on the CPU, the numbers of hits between which the CPU becomes the
    longer side."""
    hits, misses = ([expert for expert, _ in part][::-1] for part in (view.hits, view.misses))
    coming = sorted(zip(view.arrivals_s, [expert for expert, _ in view.late], strict=True), reverse=True)
    late = [expert for _, expert in coming]
    for awaited, missed in product(range(len(late) + 1), range(len(misses) + 1)):

        def cpu_is_longer(count: int, low: list[int] = [*late[:awaited], *misses[:missed]]) -> bool:  # noqa: B006
            cpu, gpu, copies, _ = split(view, [*low, *hits[:count]])
            return makespan_s(view, Assignment(cpu, (), ())) >= makespan_s(view, Assignment((), gpu, copies))

        turn = bisect_left(range(len(hits)), True, key=cpu_is_longer)
        for count in (max(0, turn - 1), turn):
            yield [*late[:awaited], *misses[:missed], *hits[:count]]
