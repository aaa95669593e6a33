"""Prefetch what will be used, as well as one cares to know it: a bound, and never a baseline."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from sim.policies.base import PolicyContext, PrefetchPolicy, PrefetchView
from sim.policies.evict.random import mixed
from sim.policies.prefetch.checks import check_count, check_share

KEPT, LATE, COUNT, WRONG = range(4)
"""What is drawn for an event: whether a block is named, how late, how many wrong ones there are, and which."""


class Oracle(PrefetchPolicy):
    """Copies the experts that the next ``horizon`` layers will use, nearest layer first, then the lowest expert.

    The horizon crosses into the next forward pass (unless ``crosses`` is false), and is one pass long at most. With the
    defaults the oracle is perfect. Else each use is named with probability ``recall``; unused experts are named beside
    them, so many that a share ``precision`` of all that is named will be used (as far as the layer has as many); and
    what is said of a layer becomes known 0 to ``lateness`` layers after it came within the horizon, drawn uniformly for
    each expert, yet no later than in the layer just before. All is drawn from the seed by event and block, whatever is
    asked when.
    """

    name: ClassVar[str] = "oracle"
    needs: ClassVar[frozenset[str]] = frozenset({"future"})
    defaults: ClassVar[Mapping[str, Any]] = {
        "horizon": 3,
        "recall": 1.0,
        "precision": 1.0,
        "lateness": 0,
        "crosses": True,
    }

    def __init__(self, context: PolicyContext) -> None:
        super().__init__(context)
        if context.future is None:
            raise ValueError("oracle must be given the future routing, got none")
        check_count("horizon", self.options["horizon"], least=1)
        check_count("lateness", self.options["lateness"], least=0)
        check_share("recall", self.options["recall"])
        check_share("precision", self.options["precision"])
        self._future = context.future
        self._horizon: int = min(self.options["horizon"], context.layers)
        self._event = -1
        self._due: dict[int, list[int]] = {}  # blocks by the event of their next use after ``_event``
        self._named: dict[int, list[tuple[int, int]]] = {}  # by event: (block, distance from which it is known)

    def candidates(self, view: PrefetchView) -> Sequence[int]:
        self._go_to(view.event)
        last = self._horizon if self.options["crosses"] else min(self._horizon, self.context.layers - 1 - view.layer)
        ahead = range(1, last + 1)
        return [block for d in ahead for block, known in self._said_of(view.event + d) if d <= known]

    def _go_to(self, event: int) -> None:
        """Moves the calendar on; a block returns to it within one pass at the earliest, which bounds the horizon."""
        if not self._due or event < self._event:
            self._event, self._due = event, {}
            self._enter(range(self.context.blocks))
        while self._event < event:
            self._event += 1
            self._named.pop(self._event, None)
            self._enter(self._due.pop(self._event, ()))

    def _enter(self, blocks: Sequence[int]) -> None:
        for block in blocks:
            self._due.setdefault(self._future.next_use(block, self._event), []).append(block)

    def _said_of(self, event: int) -> list[tuple[int, int]]:
        if event not in self._named:
            blocks = sorted(self._said(event, self._due.get(event, [])))
            self._named[event] = [(block, self._known_from(event, block)) for block in blocks]
        return self._named[event]

    def _said(self, event: int, used: list[int]) -> list[int]:
        """What is said to be used in ``event``: of ``used``, and beside it."""
        recall, precision = self.options["recall"], self.options["precision"]
        named = used if recall == 1 else [block for block in used if self._drawn(event, KEPT, block) < recall]
        if precision == 1:
            return named
        amount = recall * len(used) * (1 / precision - 1) + self._drawn(event, COUNT, 0)  # its fraction: by chance
        return [*named, *self._wrong(event, used, int(amount))]

    def _wrong(self, event: int, used: list[int], amount: int) -> list[int]:
        """So many experts of the layer that ``event`` does not use; all of them, where there are fewer."""
        experts = self.context.experts
        first = event % self.context.layers * experts
        taken, draw = {*used}, 0
        amount = min(amount, experts - len(taken))
        while len(taken) < len(used) + amount:
            taken.add(first + int(self._drawn(event, WRONG, draw) * experts))
            draw += 1
        return sorted(taken.difference(used))

    def _known_from(self, event: int, block: int) -> int:
        """The distance in layers from which on it is known."""
        most = self.options["lateness"]
        late = int(self._drawn(event, LATE, block) * (most + 1)) if most else 0
        return max(1, self._horizon - late)

    def _drawn(self, event: int, what: int, which: int) -> float:
        """A number from 0 to below 1."""
        return mixed(self.context.seed, event * 4 + what, which) / 2.0**53
