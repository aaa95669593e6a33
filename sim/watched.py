"""A user's own policy, watched while it decides.

What it does wrong is told in one line that names the file: it must end neither in a traceback nor in figures that only
look right. The registered policies are not watched, and lose no time.
"""

from __future__ import annotations

import traceback
from collections import Counter
from collections.abc import Callable, Collection, Hashable, Iterable, Mapping, Sequence
from functools import wraps
from numbers import Real
from operator import index
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np

from sim.policies.base import (
    Assignment,
    EvictionPolicy,
    LayerView,
    PlacementPolicy,
    Policy,
    PolicyContext,
    PrefetchPolicy,
    PrefetchView,
    check_depth,
)
from traces.errors import InputError

FIELD = "policy_file"
"""What errors call it."""

BASES: dict[str, type[Policy]] = {"evict": EvictionPolicy, "prefetch": PrefetchPolicy, "place": PlacementPolicy}
"""What a policy of each kind is derived from."""

Method: TypeAlias = Callable[..., Any]


def watched(found: type[Any], kind: str, name: str, text: str) -> type[Any]:
    """A subclass of ``found``, a policy of ``kind`` that ``text`` names, which goes by ``name`` and is watched.

    Its methods raise :class:`InputError` where those of ``found`` raise anything, or answer what cannot be done. What
    ``found`` leaves as its base has it stays so, and costs nothing.
    """
    base = BASES[kind]
    methods: dict[str, Method] = {hook: watch(found) for hook, watch in WATCHES[kind].items()}
    for hook in ("begin_sequence", "observe", "observe_scores", "key", "admit", "forget", "order", "preload"):
        if getattr(found, hook, None) is getattr(base, hook, None):
            methods.pop(hook, None)
        else:
            methods.setdefault(hook, getattr(found, hook))
    body: dict[str, Any] = {hook: _guarded(method, hook, text) for hook, method in methods.items()}
    if kind == "evict" and found.keys is EvictionPolicy.keys:
        body["keys"] = _guarded(methods["keys"], "key", text)  # which is what the file has
    if "lookahead" in found.needs:
        body["depth"] = classmethod(_guarded(_depth(found), "depth", text))
    body["__init__"] = _guarded(found.__init__, "__init__", text)
    body["name"] = name
    return type(found.__name__, (found,), body)


def told(error: BaseException, path: Path) -> str:
    """The error and the line of the file that raised it."""
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == str(path)]
    place = f"{path}, line {lines[-1]}: " if lines else f"{path}: "
    words = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
    return place + " ".join(words.split())


def _guarded(method: Method, hook: str, text: str) -> Method:
    """``method``, with its errors turned into one line."""

    @wraps(method)
    def call(*args: Any, **named: Any) -> Any:
        try:
            return method(*args, **named)
        except InputError as error:
            if text in str(error):
                raise
            raise InputError(f"{error} ({text}, {hook})") from error
        except (Exception, SystemExit) as error:
            if hook in ("__init__", "depth") and isinstance(error, ValueError) and " must " in str(error):
                raise InputError(f"{error} ({text})") from error  # a constant that the class refuses, in its own words
            what = told(error, Path(text.rpartition(":")[0]))
            raise InputError(f"{FIELD} must decide without errors, got {what} ({text}, {hook})") from error

    return call


# Of every kind: the lists of the run are not the file's.


def _observe(found: type[Any]) -> Method:
    def observe(self: Any, event: int, blocks: Sequence[int], counts: Sequence[int]) -> None:
        found.observe(self, event, [*blocks], [*counts])

    return observe


def _observe_scores(found: type[Any]) -> Method:
    def observe_scores(self: Any, layer: int, scores: Any) -> None:
        found.observe_scores(self, layer, np.array(scores))

    return observe_scores


# Eviction.


def _order(found: type[Any]) -> Method:
    def order(self: Any, blocks: Collection[int], recency: Sequence[int]) -> list[int]:
        given = {block: block for block in blocks}
        ranking = list(found.order(self, [*blocks], [*recency]))
        if len(ranking) != len(given) or given.keys() != {*ranking}:
            raise InputError(
                f"{FIELD} must order the blocks that it was given, each once, got {_odd('block', ranking, given)}"
            )
        return [given[block] for block in ranking]  # whole numbers, where the file has 1.0

    return order


def _keys(found: type[Any]) -> Method:
    one_by_one = found.keys is EvictionPolicy.keys  # then key itself is asked, which need not be guarded each time

    def keys(self: Any, blocks: Iterable[int]) -> Sequence[float]:
        given = [*blocks]
        values = [found.key(self, block) for block in given] if one_by_one else list(found.keys(self, [*given]))
        _check_keys(values, len(given))
        return values

    return keys


def _check_keys(values: list[Any], count: int) -> None:
    """Raises :class:`InputError` unless ``values`` are so many numbers that can be ordered."""
    if len(values) != count:
        raise InputError(f"{FIELD} must return a key for each block, got {len(values)} for {count}")
    if not {*map(type, values)} <= {int, float}:  # else it takes a closer look, which is slow
        for value in values:
            if not isinstance(value, (Real, np.bool_)):
                raise InputError(f"{FIELD} must return keys that are numbers, got {value!r}")
    if any([value != value for value in values]):
        raise InputError(f"{FIELD} must return keys that can be compared, got nan")


def _preload(found: type[Any]) -> Method:
    def preload(self: Any) -> Sequence[int]:
        blocks = _whole("preload", found.preload(self), self.context)
        _check_room(blocks, self.context)
        return blocks

    return preload


def _check_room(blocks: Sequence[int], context: PolicyContext) -> None:
    """Raises :class:`InputError` unless ``blocks`` are distinct, and fit their pools."""
    if len({*blocks}) < len(blocks):
        raise InputError(f"{FIELD} must preload a block once, got {Counter(blocks).most_common(1)[0][0]} twice")
    used: Counter[int] = Counter()
    for block in blocks:
        layer = block // context.experts
        used[0 if context.shared else layer] += context.weights[layer]
    if used and max(used.values()) > context.capacity:
        raise InputError(f"{FIELD} must preload at most {context.capacity} a pool, got {max(used.values())}")


# Prefetch.


def _candidates(found: type[Any]) -> Method:
    def candidates(self: Any, view: PrefetchView) -> Sequence[int]:
        own = view._replace(expected=[[*named] for named in view.expected])
        return _whole("want", found.candidates(self, own), self.context)

    return candidates


def _depth(found: type[Any]) -> Method:
    def depth(cls: type[Any], options: Mapping[str, Any]) -> int:
        ahead = {**cls.defaults, **options}["depth"]
        check_depth(ahead)
        return int(ahead)

    return depth


# Placement.


def _place(found: type[Any]) -> Method:
    def place(self: Any, view: LayerView) -> Assignment:
        answer = found.place(self, view)
        if not isinstance(answer, Assignment):
            raise InputError(f"{FIELD} must return an Assignment, got {type(answer).__name__}")
        return _checked(
            Assignment(list(answer.cpu), list(answer.gpu), list(answer.copies), bool(answer.fallback)), view
        )

    return place


def _checked(answer: Assignment, view: LayerView) -> Assignment:
    """``answer`` in whole numbers; raises :class:`InputError` unless it is an assignment of what is in ``view``."""
    cpu, gpu, copies, fallback = answer
    given = {expert: expert for part in (view.hits, view.late, view.misses) for expert, _ in part}
    if len(cpu) + len(gpu) != len(given) or given.keys() != {*cpu, *gpu}:
        raise InputError(f"{FIELD} must place each expert once, got {_odd('expert', [*cpu, *gpu], given)}")
    on_gpu = {*gpu}
    missing = [expert for expert, _ in view.misses if expert in on_gpu]
    if len(copies) != len(missing) or {*copies} != {*missing}:
        odd = _odd("expert", copies, missing)
        raise InputError(f"{FIELD} must copy the missing experts that the GPU takes, each once, got {odd}")
    name = given.__getitem__
    return Assignment([*map(name, cpu)], [*map(name, gpu)], [*map(name, copies)], fallback)


WATCHES: dict[str, dict[str, Callable[[type[Any]], Method]]] = {
    "evict": {
        "observe": _observe,
        "observe_scores": _observe_scores,
        "order": _order,
        "keys": _keys,
        "preload": _preload,
    },
    "prefetch": {"observe": _observe, "observe_scores": _observe_scores, "candidates": _candidates},
    "place": {"place": _place},
}
"""What is more than guarded against errors, by kind."""


def _odd(what: str, answer: Sequence[Hashable], given: Iterable[int]) -> str:
    """What is wrong with an answer: the first that is not one of those given, is there twice, or is left out."""
    wanted, count = {*given}, Counter(answer)
    for one in answer:
        if one not in wanted:
            return f"{what} {one!r}, which is not one of them"
        if count[one] > 1:
            return f"{what} {one} {count[one]} times"
    return f"no {what} {min(wanted - count.keys())}"


def _whole(verb: str, answer: Iterable[Any], context: PolicyContext) -> list[int]:
    """``answer`` as blocks; raises :class:`InputError` unless they are blocks of the model."""
    values = list(answer)
    for value in values:
        if not hasattr(value, "__index__"):
            raise InputError(f"{FIELD} must {verb} blocks that are whole numbers, got {value!r}")
    blocks = [*map(index, values)]
    if blocks and not (min(blocks) >= 0 and max(blocks) < context.blocks):
        odd = next(block for block in blocks if not 0 <= block < context.blocks)
        raise InputError(f"{FIELD} must {verb} blocks from 0 to {context.blocks - 1}, got {odd}")
    return blocks
