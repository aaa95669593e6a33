"""Prefetch what would shorten the next layers most: HybriMoE's impact-driven prefetching."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from math import inf
from typing import Any, ClassVar, TypeAlias

from sim.policies.base import PolicyContext, PrefetchPolicy, PrefetchView, check_depth
from sim.policies.prefetch.checks import check_count

CASES = 8192
"""Decisions that are remembered; the least recently used is forgotten first."""

MOST_DISCOUNT = 8
"""Beyond, what is not in the next layer is worth nothing."""

ROUNDING_S = 1e-12
"""A gain below this is what adding up seconds in another order leaves."""

Loads: TypeAlias = tuple[int, ...]
"""Tokens of experts, most first."""

Makespan: TypeAlias = Callable[[Loads, Loads], float]


class Impact(PrefetchPolicy):
    """Copies the experts whose presence would shorten the schedules of the next layers most, the largest gain first.

    For each expert that look-ahead names for one of the next ``depth`` layers and that is not there: gain = makespan of
    that layer without it - makespan with it, over the distance in layers (to the power of ``discount``). Taken
    greedily, ``most`` in all, each on top of those before it, as long as something is gained. Source: Zhong et al.,
    *HybriMoE* (arXiv 2504.05897), its impact-driven prefetching, with its depth of 3.

    Chosen here, where the paper is silent: the discount and ``most``; and that from a gain is taken by how much the
    copy would outlast the time until that layer's router has chosen, when demanded copies want the link: nothing, where
    the link would be idle until then. (Option ``delays`` = "nearest": until the first router after the copy's start has
    chosen, as if every layer between had copies to demand; "target" prefetches more, which pays on slow links.) Ties
    go to the nearer layer, to more tokens, to the lower expert. In a layer with many different loads, as a prompt's,
    only the ``tried`` largest are weighed: with more tokens an expert gains no less, as a rule.
    """

    name: ClassVar[str] = "impact"
    needs: ClassVar[frozenset[str]] = frozenset({"lookahead"})
    weighs_time: ClassVar[bool] = True
    defaults: ClassVar[Mapping[str, Any]] = {"depth": 3, "most": 2, "tried": 4, "discount": 1.0, "delays": "target"}

    def __init__(self, context: PolicyContext) -> None:
        super().__init__(context)
        check_depth(self.options["depth"])
        check_count("most", self.options["most"], least=1)
        check_count("tried", self.options["tried"], least=1)
        if not 0 <= self.options["discount"] <= MOST_DISCOUNT:
            raise ValueError(f"discount must be from 0 to {MOST_DISCOUNT}, got {self.options['discount']}")
        if self.options["delays"] not in ("target", "nearest"):
            raise ValueError(f"delays must be target or nearest, got {self.options['delays']!r}")
        self._chosen = lru_cache(maxsize=CASES)(self._choose)

    def candidates(self, view: PrefetchView) -> Sequence[int]:
        is_there, experts = view.is_there, self.context.experts
        first = view.layer * experts
        case: list[tuple[Loads, Loads]] = []
        absent: list[list[int]] = []
        for named in view.expected:
            first += experts
            here: list[int] = []
            missing: list[int] = []
            blocks: list[int] = []
            for expert, tokens in named:
                block = first + expert
                if is_there(block):
                    here.append(tokens)
                else:
                    missing.append(tokens)
                    blocks.append(block)
            absent.append(blocks)
            case.append((tuple(here), tuple(missing)))
        picks = self._chosen(view.makespan_s, view.copy_s, view.link_free_s, view.router_s, tuple(case))
        wanted: list[int] = []
        for place, tokens in picks:
            alike = zip(absent[place], case[place][1], strict=True)
            wanted.append(min(block for block, load in alike if load == tokens and block not in wanted))
        return wanted

    def _choose(
        self,
        makespan_s: Makespan,
        copy_s: float,
        link_free_s: float,
        router_s: float,
        case: tuple[tuple[Loads, Loads], ...],
    ) -> list[tuple[int, int]]:
        """(place, tokens) of what is wanted; ``case[place]`` are the loads that are there, and not, in each layer."""
        layers, picks = [*case], list[tuple[int, int]]()
        gains = [self._best(makespan_s, *layer) for layer in layers]
        for number in range(1, self.options["most"] + 1):
            copied_s = link_free_s + number * copy_s
            best_s, pick = ROUNDING_S, None
            first = self._first_router(copied_s - copy_s, router_s)
            for place, (gain_s, _) in enumerate(gains):
                delay_s = max(0.0, copied_s - min(place + 1, first) * router_s)
                worth_s = gain_s / (place + 1) ** self.options["discount"] - delay_s
                if worth_s > best_s:
                    best_s, pick = worth_s, place
            if pick is None:
                break
            picks.append((pick, gains[pick][1]))
            if number < self.options["most"]:
                layers[pick] = _moved(*layers[pick], gains[pick][1])
                gains[pick] = self._best(makespan_s, *layers[pick])
        return picks

    def _first_router(self, start_s: float, router_s: float) -> float:
        """Which of the routers ahead, from 1, is the first that a copy from ``start_s`` on may delay, by ``delays``."""
        return 1 + start_s // router_s if self.options["delays"] == "nearest" and router_s else inf

    def _best(self, makespan_s: Makespan, here: Loads, missing: Loads) -> tuple[float, int]:
        """The largest gain of one more expert that is there, and its tokens."""
        if not missing:
            return 0.0, 0
        without_s, best = makespan_s(here, missing), (0.0, 0)
        for tokens in [*dict.fromkeys(missing)][: self.options["tried"]]:
            gain_s = without_s - makespan_s(*_moved(here, missing, tokens))
            best = (gain_s, tokens) if gain_s > best[0] else best
        return best


def _moved(here: Loads, missing: Loads, tokens: int) -> tuple[Loads, Loads]:
    """The loads of a layer once one of ``tokens``, which is missing, has come."""
    place = missing.index(tokens)
    return tuple(sorted((*here, tokens), reverse=True)), missing[:place] + missing[place + 1 :]
