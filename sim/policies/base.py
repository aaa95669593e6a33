"""The faces of the policies. A policy decides and remembers; it sees identifiers, counts, scores and predicted costs.

A *block* is one expert of one layer, the integer ``layer * experts + expert``. An *event* is one MoE layer of one
forward pass, numbered ``step * layers + layer`` over the run.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Protocol

NEVER = 2**62
"""Event index of a use that does not come."""


class Future(Protocol):
    """Knowledge of the routing to come; only clairvoyant policies ask for it."""

    def next_use(self, block: int, event: int) -> int:
        """First event after ``event`` in which ``block`` is used, at least :data:`NEVER` when there is none."""


@dataclass(frozen=True)
class PolicyContext:
    """What a policy is told once, before the run."""

    layers: int
    experts: int
    top_k: int
    future: Future | None = None
    options: Mapping[str, Any] = field(default_factory=dict)


class Policy(ABC):
    """What all policies share: a name for the registry, and the inputs that have to be provided.

    ``needs`` is a subset of {"lookahead", "future"}; a run whose trace or clock cannot give one is refused.
    """

    name: ClassVar[str]
    needs: ClassVar[frozenset[str]] = frozenset()

    def __init__(self, context: PolicyContext) -> None:
        self.context = context


class EvictionPolicy(Policy):
    """Ranks blocks by how much they are worth keeping.

    The cache asks for :meth:`key` and lets the smallest leave first; equal keys leave in the order least recently
    used, lowest layer, lowest expert. A ``bypass`` policy ranks the event's own experts together with the residents,
    so that a missed expert may be served without being kept.
    """

    bypass: ClassVar[bool] = False
    by_recency: ClassVar[bool] = False
    """True: keys are in the order of the last use, so that the cache, which knows it, need not ask for them."""

    def observe(self, event: int, blocks: Sequence[int], counts: Sequence[int]) -> None:
        """Takes in the distinct blocks of one event, with the tokens each one got. Called once an event."""

    @abstractmethod
    def key(self, block: int) -> float:
        """Worth of keeping ``block`` as of the last observed event; called only for residents and the event's own."""

    def keys(self, blocks: Iterable[int]) -> Sequence[float]:
        """:meth:`key` of each of ``blocks``; to be overridden where one pass over all of them is quicker."""
        return [self.key(block) for block in blocks]

    def forget(self, block: int) -> None:
        """``block`` has left the cache, or was used without being kept."""


@dataclass(frozen=True, slots=True)
class LayerView:
    """One layer's work at the moment it is placed: expert ids with their token counts, and predicted seconds.

    ``hits`` and ``misses`` are in order of submission: most tokens first, then the lowest id.
    """

    layer: int
    hits: Sequence[tuple[int, int]]
    misses: Sequence[tuple[int, int]]
    free_slots: int
    gpu_expert_s: Callable[[int], float]
    cpu_expert_s: Callable[[int, bool], float]
    copy_s: float


class PlacementPolicy(Policy):
    """Says which of a layer's experts run on the CPU; every other one runs on the GPU, fetched when it is missing."""

    uses_cpu: ClassVar[bool] = True
    """False: the policy sends nothing to the CPU, and is not asked."""

    @abstractmethod
    def on_cpu(self, view: LayerView) -> Sequence[int]:
        """Expert ids, from ``view.misses``, to be computed on the CPU, in the order in which it should take them."""


class PrefetchPolicy(Policy):
    """Says which experts of later layers are worth copying while the link has room."""

    depth: ClassVar[int] = 0
    """Layers ahead for which ``predictions`` are needed."""

    @abstractmethod
    def candidates(self, layer: int, predictions: Sequence[Sequence[int]]) -> Sequence[tuple[int, int]]:
        """(layer, expert) pairs, most wanted first.

        ``predictions[d]`` holds the expert ids that are predicted for layer ``layer + 1 + d``, most wanted first.
        """
