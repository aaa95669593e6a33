"""A user's own policy: a class in a Python file, read when the command runs.

What is no policy is told in one line that names the file. What goes wrong while one decides is seen to by
:mod:`sim.watched`.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Mapping
from functools import cache
from math import isfinite
from pathlib import Path
from types import ModuleType
from typing import Any

from sim.policies.base import Policy, check_depth
from sim.watched import BASES, FIELD, told, watched
from traces.errors import InputError, unknown_name

GIVEN = {
    "evict": ("scores", "future", "calibration"),
    "prefetch": ("scores", "future", "calibration", "lookahead", "residuals"),
    "place": ("future", "calibration"),
}
"""What a run can give to a policy of each kind that needs it."""

FLAGS = ("bypass", "misses_first", "by_recency", "weighs_time", "uses_cpu", "takes_hits")

DEAF = (("by_recency", False, ("key", "keys")), ("uses_cpu", True, ("place",)))
"""A flag, what it has to be where a class defines one of the methods, and these: else they would not be asked."""


def load_policy(text: str, kind: str = "evict") -> type[Any]:
    """The policy class that ``text`` names as ``my.py:MyPolicy``, ready to run; ``kind`` is a key of
    :data:`sim.watched.BASES`.

    A class without a ``name`` of its own goes by its class name. Raises :class:`InputError` when the file is missing,
    is not Python, or raises; when it has no such class; and when that is no complete policy of that kind. The class
    that is returned raises it too: when a method raises, and when the policy decides what cannot be done.
    """
    return _loaded(text, kind, _content(_named(text)[0]))


def kind_of(text: str) -> str:
    """The kind, a key of :data:`sim.watched.BASES`, of the policy that ``text`` names as ``my.py:MyPolicy``.

    Raises :class:`InputError` as :func:`load_policy` does, and for a class that is no policy of any kind.
    """
    path, name = _named(text)
    found = _class_in(_defined(path, _content(path)), path, name, (*BASES.values(),))
    return next(kind for kind, base in BASES.items() if issubclass(found, base))


def _named(text: str) -> tuple[Path, str]:
    """The file and the class that ``text`` names."""
    file, colon, name = text.rpartition(":")
    if not colon or not file or not name.isidentifier():
        raise InputError(f"{FIELD} must name a file and a class in it, as my.py:MyPolicy, got {text!r}")
    return Path(file), name


@cache
def _loaded(text: str, kind: str, content: bytes) -> type[Any]:
    path, name = _named(text)
    found = _class_in(_defined(path, content), path, name, (BASES[kind],))
    _check_class(found, text, kind)
    return watched(found, kind, _name(found), text)


def _content(path: Path) -> bytes:
    if not path.is_file():
        raise InputError(f"{FIELD} must be an existing file, got {path}")
    try:
        return path.read_bytes()
    except OSError as error:
        raise InputError(f"{FIELD} must be a readable file, got {path}: {error.strerror}") from error


@cache
def _defined(path: Path, content: bytes) -> dict[str, Any]:
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
        raise InputError(f"{FIELD} must run without errors, got {told(error, path)}") from error
    return vars(module)


def _class_in(namespace: dict[str, Any], path: Path, name: str, bases: tuple[type[Policy], ...]) -> type[Any]:
    """The class of that name, which must be derived from one of ``bases``."""
    wanted = " or ".join(base.__name__ for base in bases)
    if name not in namespace:
        own = [key for key, value in namespace.items() if _is_policy(value, bases) and value not in bases]
        if not own:
            raise InputError(f"{FIELD} must have a class derived from {wanted}, got none in {path}")
        raise unknown_name(f"class in {path}", name, own)
    found: Any = namespace[name]
    if not _is_policy(found, bases):
        what = f"class {name}" if isinstance(found, type) else f"{name}, a {type(found).__name__}"
        raise InputError(f"{FIELD} must name a class derived from {wanted}, got {what} in {path}")
    own_kind: type[Any] = found
    return own_kind


def _is_policy(value: Any, bases: tuple[type[Policy], ...]) -> bool:
    return isinstance(value, type) and issubclass(value, bases)


def _check_class(found: type[Any], text: str, kind: str) -> None:
    """Raises :class:`InputError` unless the class is complete, and what it says of itself is what a run reads."""
    if inspect.isabstract(found):
        missing = ", ".join(sorted(found.__abstractmethods__))
        raise InputError(f"{FIELD} must name a complete policy, got {text} without {missing}")
    name: Any = _name(found)
    if not isinstance(name, str) or not name.strip() or not name.isprintable():
        raise InputError(f"{FIELD} must have a name that is text, in one line, got {name!r} in {text}")
    _check_constants(found, text)
    _check_needs(found, text, kind)
    for flag in FLAGS:
        if not isinstance(value := getattr(found, flag, False), bool):
            raise InputError(f"{FIELD} must have True or False as {flag}, got {value!r} in {text}")
    for flag, heard, methods in DEAF:
        if hasattr(found, flag) and getattr(found, flag) is not heard and _owner(found, *methods) < _owner(found, flag):
            raise InputError(
                f"{FIELD} must set {flag} = {heard} where it defines {methods[0]}, got {text}, whose {methods[0]} is "
                "not asked"
            )


def _check_needs(found: type[Any], text: str, kind: str) -> None:
    needs: Any = found.needs
    if not isinstance(needs, (set, frozenset)):
        raise InputError(f"{FIELD} must have needs that are a set, got {needs!r} in {text}")
    for need in sorted(needs.difference(GIVEN[kind]), key=repr):
        raise InputError(f"{FIELD} must need nothing but {', '.join(GIVEN[kind])}, got {need!r} in {text}")
    if "lookahead" in needs:
        try:
            check_depth(found.defaults.get("depth"))
        except ValueError as error:
            rule = "have a depth in defaults where it needs lookahead"
            raise InputError(f"{FIELD} must {rule}: {error} in {text}") from error


def _check_constants(found: type[Any], text: str) -> None:
    defaults: Any = found.defaults
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
