"""The faces of the policies. A policy decides and remembers; it sees identifiers, counts, scores and predicted costs.

A *block* is one expert of one layer, the integer ``layer * experts + expert``. An *event* is one MoE layer of one
forward pass, numbered ``step * layers + layer`` over the run.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from typing import Any, ClassVar, NamedTuple, Protocol

MOST_AHEAD = 3
"""Layers ahead for which traces hold what the routers would choose."""
NEVER = 2**62
"""Event index of a use that does not come."""


class Future(Protocol):
    """Knowledge of the routing to come; only clairvoyant policies ask for it."""

    def next_use(self, block: int, event: int) -> int:
        """First event after ``event`` in which ``block`` is used, at least :data:`NEVER` when there is none."""


class Calibration(Protocol):
    """A trace that was recorded apart from the one that is judged; only policies that are fitted ask for it."""

    def uses(self) -> Sequence[int]:
        """By block: the events in which it was used."""

    def events(self) -> Iterator[tuple[int, Sequence[int]]]:
        """Every event in order: its number, and the distinct blocks that it used."""

    def requests(self) -> Iterator[Any]:
        """Of every request (or batch of them) in order: the tokens of each expert, int64 [layers, experts]."""


@dataclass(frozen=True)
class PolicyContext:
    """What a policy is told once, before the run.

    ``capacity`` is what one pool holds, in the unit of ``weights``: slots (every weight is 1) or bytes. A pool is a
    layer's, or the whole cache when ``shared``; ``by_layer`` tells each layer's where they differ, and ``capacity`` is
    then their mean. ``seed`` is for what a policy draws at random.
    """

    layers: int
    experts: int
    top_k: int
    future: Future | None = None
    calibration: Calibration | None = None
    capacity: int = 1
    weights: Sequence[int] = ()  # of a block, by layer
    shared: bool = False
    seed: int = 0
    options: Mapping[str, Any] = field(default_factory=dict)
    by_layer: Sequence[int] = ()

    def capacity_of(self, layer: int) -> int:
        """What the pool of a layer holds."""
        return self.by_layer[layer] if self.by_layer else self.capacity

    @property
    def blocks(self) -> int:
        """Blocks of the model."""
        return self.layers * self.experts


_KINDS: dict[type, str] = {bool: "True or False", int: "a whole number", float: "a number", str: "text"}


def check_constants(given: Mapping[str, Any], defaults: Mapping[str, Any]) -> None:
    """Raises ValueError for a constant that is not among ``defaults``, or of another kind than its default."""
    for name, value in given.items():
        if name not in defaults:
            near = get_close_matches(name, defaults, n=3, cutoff=0.5)
            hint = f"did you mean {' or '.join(near)}?" if near else f"one of {', '.join(defaults) or 'none'}"
            raise ValueError(f"option must be a known name, got {name!r} ({hint})")
        kind = type(defaults[name])
        if type(value) is not kind and not (kind is float and type(value) is int):
            raise ValueError(f"{name} must be {_KINDS.get(kind, kind.__name__)}, got {value!r}")


def check_whole(constants: Mapping[str, Any], **most: int) -> None:
    """Raises ValueError unless each constant that is named is from 1 to what is given with it."""
    for name, limit in most.items():
        if not 1 <= constants[name] <= limit:
            raise ValueError(f"{name} must be from 1 to {limit}, got {constants[name]}")


def check_depth(depth: Any) -> None:
    """Raises ValueError for a depth of look-ahead that no trace has."""
    if depth not in range(1, MOST_AHEAD + 1):
        raise ValueError(f"depth must be from 1 to {MOST_AHEAD}, got {depth}")


class Policy:
    """What all policies share: a name for the registry, the inputs that have to be provided, and what they may be told.

    ``needs`` is a subset of {"scores", "lookahead", "future", "calibration"}; a run whose trace or clock cannot give
    one is refused. ``defaults`` are the constants that may be changed by ``options``, with the values that hold else.
    """

    name: ClassVar[str]
    needs: ClassVar[frozenset[str]] = frozenset()
    defaults: ClassVar[Mapping[str, Any]] = {}

    def __init__(self, context: PolicyContext) -> None:
        """Raises ValueError for constants that the policy does not have, or of another kind; its own ones do for others
        that it cannot use."""
        check_constants(context.options, self.defaults)
        self.context = context
        self.options: dict[str, Any] = {**self.defaults, **context.options}

    def begin_sequence(self) -> None:
        """A new request (or a new batch of them) begins."""

    def observe_scores(self, layer: int, scores: Any) -> None:
        """Takes in the router's softmax over all experts of ``layer``, float [tokens, experts], before the decision of
        an event; called only where ``needs`` has "scores"."""

    def observe(self, event: int, blocks: Sequence[int], counts: Sequence[int]) -> None:
        """Takes in the distinct blocks of one decision, ascending, with the tokens each one got."""


class EvictionPolicy(Policy, ABC):
    """Ranks blocks by how much they are worth keeping.

    A *decision* is one event under the atomic contract, and one expert of it under the serial one. For each decision
    the caller says, in this order: :meth:`observe`; :meth:`order`, when room is needed; :meth:`forget` for each block
    that leaves or is not kept; :meth:`admit` for each that is kept and was not there, lowest block first. The blocks
    with the smallest :meth:`key` leave first; equal keys leave in the order least recently used, lowest layer, lowest
    expert. A ``bypass`` policy ranks the event's own experts together with the residents, so that a missed expert may
    be served without being kept.
    """

    bypass: ClassVar[bool] = False
    misses_first: ClassVar[bool] = False
    """True: when not all of an event's experts fit, those that had to be loaded are kept before those that hit."""
    by_recency: ClassVar[bool] = False
    """True: keys are in the order of the last use, so that the cache, which knows it, need not ask for them."""

    def preload(self) -> Sequence[int]:
        """Blocks that are loaded before the first event; they must fit."""
        return ()

    @abstractmethod
    def key(self, block: int) -> float:
        """Worth of keeping ``block`` as of the last decision; called only for residents and the decision's own."""

    def keys(self, blocks: Iterable[int]) -> Sequence[float]:
        """:meth:`key` of each of ``blocks``; to be overridden where one pass over all of them is quicker."""
        return [self.key(block) for block in blocks]

    def order(self, blocks: Collection[int], recency: Sequence[int]) -> list[int]:
        """``blocks`` in the order in which they leave; ``recency[block]`` grows with the last use and is distinct."""
        if self.by_recency:
            return sorted(blocks, key=recency.__getitem__)
        places = map(recency.__getitem__, blocks)
        return [block for _, _, block in sorted(zip(self.keys(blocks), places, blocks, strict=True))]

    def admit(self, block: int) -> None:
        """``block`` has come into the cache."""

    def forget(self, block: int) -> None:
        """``block`` has left the cache, or was used without being kept."""


class LayerView(NamedTuple):
    """One layer's work at the moment it is placed: experts with their token counts, and predicted seconds.

    ``hits`` are resident, ``late`` are being prefetched, ``misses`` are neither; each is in order of load: most tokens
    first, then the lowest id. ``arrivals_s`` says when each of ``late`` is expected at the latest. Like the times at
    which GPU, link and CPU are free for this layer's experts, they count from now. Costs are those of undisturbed work;
    ``cpu_expert_s`` is asked for (tokens, whether it is the layer's first), and ``gpu_expert_s`` must not fall when
    tokens rise.
    """

    layer: int
    hits: Sequence[tuple[int, int]]
    misses: Sequence[tuple[int, int]]
    free_slots: int
    gpu_expert_s: Callable[[int], float]
    cpu_expert_s: Callable[[int, bool], float]
    copy_s: float
    late: Sequence[tuple[int, int]] = ()
    arrivals_s: Sequence[float] = ()
    gpu_free_s: float = 0.0
    link_free_s: float = 0.0
    cpu_free_s: float = 0.0


class Assignment(NamedTuple):
    """Who computes what: ``cpu`` and ``gpu`` split a layer's experts, each in the order in which it takes them.

    ``copies`` are the misses among ``gpu``, in the order in which the link brings them. A resident or late expert on
    the CPU stays where it is. ``fallback`` tells that one device alone was quicker than what the policy stands for.
    """

    cpu: Sequence[int]
    gpu: Sequence[int]
    copies: Sequence[int]
    fallback: bool = False


class PlacementPolicy(Policy, ABC):
    """Says which of a layer's experts run on the CPU and which on the GPU, and in which order; see
    :class:`Assignment`.

    Where the cache cannot hold all that is copied, the GPU computes what is there first, then what arrives.
    """

    uses_cpu: ClassVar[bool] = True
    """False: the policy sends nothing to the CPU, and is not asked."""
    takes_hits: ClassVar[bool] = False
    """True: the policy may send resident experts to the CPU, and is asked where nothing is missing, too."""

    @classmethod
    def defers(cls, options: Mapping[str, Any]) -> int:
        """How many of a token's experts, those with the lowest gates, may join the next layer's output where the CPU
        computes them. That changes what the model computes."""
        return 0

    @abstractmethod
    def place(self, view: LayerView) -> Assignment:
        """The assignment of every expert in ``view``, each to one side."""


class PrefetchView(NamedTuple):
    """What a prefetch policy knows once a layer has been decided: the layer, what is expected, and what is there.

    ``expected[d]`` holds (expert, tokens) for layer ``layer + 1 + d`` of the same forward pass, most tokens first; it
    is empty without look-ahead. ``is_there`` tells of a block whether it is resident or on its way. ``makespan_s``
    gives the seconds that the system's placement would take for a layer, were the link idle, from the tokens of its
    experts that are there, and of those that are not, each most first. ``link_free_s`` is when the layer's own copies
    will have ended, and ``router_s`` when the next router's choice will be known, both in predicted seconds from now.
    """

    event: int
    layer: int
    expected: Sequence[Sequence[tuple[int, int]]]
    is_there: Callable[[int], bool]
    makespan_s: Callable[[tuple[int, ...], tuple[int, ...]], float]
    copy_s: float
    link_free_s: float = 0.0
    router_s: float = 0.0


class PrefetchPolicy(Policy, ABC):
    """Says which blocks are worth copying before they are asked for, while the link has room.

    It is told of every decision as an eviction policy is (:meth:`begin_sequence`, :meth:`observe_scores`,
    :meth:`observe`), and asked after each layer. A policy with "lookahead" in ``needs`` has the option ``depth``, the
    layers ahead for which it wants to know what their routers say of the hidden state at hand.
    """

    weighs_time: ClassVar[bool] = False
    """True: ``link_free_s`` and ``router_s`` are wanted, which cost the controller a schedule of the layer."""

    @classmethod
    def depth(cls, options: Mapping[str, Any]) -> int:
        """Layers ahead for which ``expected`` is wanted; raises ValueError for more than traces hold."""
        if "lookahead" not in cls.needs:
            return 0
        depth: int = {**cls.defaults, **options}["depth"]
        check_depth(depth)
        return depth

    @abstractmethod
    def candidates(self, view: PrefetchView) -> Sequence[int]:
        """Blocks, most wanted first; those that are there already are passed over, but protected from eviction."""
