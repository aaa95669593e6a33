"""A user's own policy: a class in a Python file, read when the command runs and watched while it decides.

What such a class does wrong is told in one line that names the file: it must end neither in a traceback nor in figures
that only look right. The registered policies are not watched, and lose no time.
"""

from __future__ import annotations

import inspect
import sys
import traceback
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from functools import cache, wraps
from math import isfinite
from numbers import Real
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from sim.policies.base import (
    EvictionPolicy,
    PlacementPolicy,
    Policy,
    PolicyContext,
    PrefetchPolicy,
)
from traces.errors import InputError, unknown_name

FIELD = "policy_file"
BASES: dict[str, type[Policy]] = {"evict": EvictionPolicy, "prefetch": PrefetchPolicy, "place": PlacementPolicy}
"""What a policy of each kind is derived from."""
TOLD = ("begin_sequence", "observe_scores", "observe")
HOOKS = {
    "evict": (*TOLD, "key", "keys", "admit", "forget", "order", "preload"),
    "prefetch": (*TOLD, "candidates"),
    "place": ("place",),
}
"""What a run calls, by kind; an error in any of them is the file's."""

GIVEN = ("scores", "future", "calibration")
"""What a run can give to a policy that needs it; a prefetch policy gets look-ahead, too."""

FLAGS = ("bypass", "misses_first", "by_recency")


def load_policy(text: str, kind: str = "evict") -> type[Any]:
    """The policy class of a ``kind``, a key of :data:`BASES`, that ``text`` names as ``my.py:MyPolicy``, ready to run.

    A class without a ``name`` of its own goes by its class name. Raises :class:`InputError` when the file is missing,
    is not Python, or raises; when it has no such class; and when that is no complete policy of that kind. The class
    that is returned raises it too: when a method raises, and when the policy decides what cannot be done.
    """
    file, colon, name = text.rpartition(":")
    if not colon or not file or not name.isidentifier():
        raise InputError(f"{FIELD} must name a file and a class in it, as my.py:MyPolicy, got {text!r}")
    return _loaded(text, kind, _content(Path(file)))


@cache
def _loaded(text: str, kind: str, content: bytes) -> type[Any]:
    file, _, name = text.rpartition(":")
    path = Path(file)
    found = _class_in(_run(path, content), path, name, BASES[kind])
    _check_class(found, text)
    return _watched(found, text, kind)


def _content(path: Path) -> bytes:
    if not path.is_file():
        raise InputError(f"{FIELD} must be an existing file, got {path}")
    try:
        return path.read_bytes()
    except OSError as error:
        raise InputError(f"{FIELD} must be a readable file, got {path}: {error.strerror}") from error


def _run(path: Path, content: bytes) -> dict[str, Any]:
    """What the file defines; it is compiled here, and not imported, so that nothing is left beside it."""
    module = ModuleType(f"moetwin_policy_{path.stem}")
    module.__file__ = str(path)
    try:
        code = compile(content, str(path), "exec")
    except (SyntaxError, ValueError) as error:
        line = f", line {error.lineno}" if isinstance(error, SyntaxError) else ""
        raise InputError(f"{FIELD} must be Python, got {path}{line}: {getattr(error, 'msg', error)}") from error
    sys.modules[module.__name__] = module  # where dataclasses look for it
    try:
        exec(code, vars(module))
    except (Exception, SystemExit) as error:
        raise InputError(f"{FIELD} must run without errors, got {_told(error, path)}") from error
    return vars(module)


def _class_in(namespace: dict[str, Any], path: Path, name: str, base: type[Policy]) -> type[Any]:
    if name not in namespace:
        own = [key for key, value in namespace.items() if _is_policy(value, base) and value is not base]
        if not own:
            raise InputError(f"{FIELD} must have a class derived from {base.__name__}, got none in {path}")
        raise unknown_name(f"class in {path}", name, own)
    found: Any = namespace[name]
    if not _is_policy(found, base):
        what = f"class {name}" if isinstance(found, type) else f"{name}, a {type(found).__name__}"
        raise InputError(f"{FIELD} must name a class derived from {base.__name__}, got {what} in {path}")
    own_kind: type[Any] = found
    return own_kind


def _is_policy(value: Any, base: type[Policy]) -> bool:
    return isinstance(value, type) and issubclass(value, base)


def _check_class(kind: type[Any], text: str) -> None:
    if inspect.isabstract(kind):
        missing = ", ".join(sorted(kind.__abstractmethods__))
        raise InputError(f"{FIELD} must name a complete policy, got {text} without {missing}")
    _check_constants(kind, text)
    if getattr(kind, "by_recency", False) and _owner(kind, "key", "keys") < _owner(kind, "by_recency"):
        raise InputError(
            f"{FIELD} must set by_recency = False where it defines key, got {text}, whose key is not asked"
        )


def _check_constants(kind: type[Any], text: str) -> None:
    """Raises :class:`InputError` unless what the class says of itself is of the kind that a replay reads."""
    name: Any = _name(kind)
    if not isinstance(name, str) or not name.strip() or not name.isprintable():
        raise InputError(f"{FIELD} must have a name that is text, in one line, got {name!r} in {text}")
    needs: Any = kind.needs
    if not isinstance(needs, (set, frozenset)):
        raise InputError(f"{FIELD} must have needs that are a set, got {needs!r} in {text}")
    for need in sorted(needs.difference(GIVEN), key=repr):
        raise InputError(f"{FIELD} must need nothing but {', '.join(GIVEN)} in a replay, got {need!r} in {text}")
    for flag in FLAGS:
        if not isinstance(value := getattr(kind, flag, False), bool):
            raise InputError(f"{FIELD} must have True or False as {flag}, got {value!r} in {text}")
    defaults: Any = kind.defaults
    if not isinstance(defaults, Mapping) or not all(isinstance(constant, str) for constant in defaults):
        raise InputError(f"{FIELD} must have defaults that map names to values, got {defaults!r} in {text}")
    for constant, value in defaults.items():
        if not isinstance(value, (bool, int, float, str)) or (isinstance(value, float) and not isfinite(value)):
            rule = "finite numbers, text, True or False as defaults"
            raise InputError(f"{FIELD} must have {rule}, got {constant}={value!r} in {text}")


def _name(kind: type[Any]) -> str:
    """The name of the class's own, not of one of its bases, or else its class name."""
    name: str = vars(kind).get("name", kind.__name__)
    return name


def _owner(kind: type[Any], *names: str) -> int:
    """How far up the line of its bases the first class stands that defines one of ``names``."""
    return next(depth for depth, base in enumerate(kind.__mro__) if not vars(base).keys().isdisjoint(names))


def _watched(kind: type[Any], text: str, sort: str) -> type[Any]:
    """A subclass that reports what goes wrong in ``kind``, under the name that ``kind`` goes by."""

    def ranked(self: Any, blocks: Collection[int], recency: Sequence[int]) -> list[int]:
        order = list(kind.order(self, [*blocks], [*recency]))  # copies: the lists of the replay are not the file's
        if Counter(order) != Counter(blocks):
            raise InputError(f"{FIELD} must order the blocks that it was given, each once, got {_odd(order, blocks)}")
        same = {block: block for block in blocks}  # whole numbers, where the file has 1.0
        return [same[block] for block in order]

    def told(self: Any, event: int, blocks: Sequence[int], counts: Sequence[int]) -> None:
        kind.observe(self, event, [*blocks], [*counts])

    def valued(self: Any, blocks: Iterable[int]) -> Sequence[float]:
        values = [*kind.keys(self, blocks)]
        for value in values:
            if not isinstance(value, (Real, np.bool_)):
                raise InputError(f"{FIELD} must return keys that are numbers, got {value!r}")
        if any(value != value for value in values):
            raise InputError(f"{FIELD} must return keys that can be compared, got nan")
        return values

    def loaded(self: Any) -> Sequence[int]:
        blocks = [*kind.preload(self)]
        _check_preload(blocks, self.context)
        return blocks

    own: dict[str, Any] = {"order": ranked, "observe": told, "keys": valued, "preload": loaded}
    body: dict[str, Any] = {hook: _guarded(own.get(hook, getattr(kind, hook)), hook, text) for hook in HOOKS[sort]}
    body["__init__"] = _guarded(kind.__init__, "__init__", text)
    body["name"] = _name(kind)
    return type(kind.__name__, (kind,), body)


def _guarded(method: Callable[..., Any], hook: str, text: str) -> Callable[..., Any]:
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
            if hook == "__init__" and isinstance(error, ValueError) and " must " in str(error):
                raise InputError(f"{error} ({text})") from error  # a constant that the class refuses, in its own words
            told = _told(error, Path(text.rpartition(":")[0]))
            raise InputError(f"{FIELD} must decide without errors, got {told} ({text}, {hook})") from error

    return call


def _odd(order: Sequence[int], blocks: Collection[int]) -> str:
    """What is wrong with an order: the first block that is not one of those given, is there twice, or is left out."""
    given, count = set(blocks), Counter(order)
    for block in order:
        if block not in given:
            return f"block {block!r}, which is not one of them"
        if count[block] > 1:
            return f"block {block} {count[block]} times"
    return f"no block {min(given - set(order))}"


def _check_preload(blocks: Sequence[int], context: PolicyContext) -> None:
    """Raises :class:`InputError` unless ``blocks`` are distinct ones of the model, and fit their pools."""
    used: Counter[int] = Counter()
    for block in blocks:
        if not 0 <= block < context.blocks:
            raise InputError(f"{FIELD} must preload blocks from 0 to {context.blocks - 1}, got {block}")
        used[0 if context.shared else block // context.experts] += context.weights[block // context.experts]
    if len(set(blocks)) < len(blocks):
        raise InputError(f"{FIELD} must preload a block once, got {Counter(blocks).most_common(1)[0][0]} twice")
    if used and max(used.values()) > context.capacity:
        raise InputError(f"{FIELD} must preload at most {context.capacity} a pool, got {max(used.values())}")


def _told(error: BaseException, path: Path) -> str:
    """The error and the line of the file that raised it."""
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == str(path)]
    place = f"{path}, line {lines[-1]}: " if lines else f"{path}: "
    words = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
    return place + " ".join(words.split())
