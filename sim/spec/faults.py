"""Files of a user's own, and what is wrong with them, in one line."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from traces.errors import InputError


class CatalogueError(InputError):
    """A file cannot be read as a model, a machine or a part; the message names the file, the field and the rule."""


def read_toml(path: Path, kind: str) -> dict[str, Any]:
    """The tables of a user's file that describes a ``kind`` of thing; raises :class:`CatalogueError` that names it."""
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise CatalogueError(f"{kind} file must be readable, got {path} ({error.strerror})") from error
    except ValueError as error:
        raise CatalogueError(f"{kind} file must be TOML, got {path} ({error})") from error


def first_fault(error: ValidationError) -> str:
    """The first fault that pydantic found, as one line of the form ``FIELD must RULE, got VALUE``."""
    fault = error.errors(include_url=False)[0]
    where = ".".join(str(part) for part in fault["loc"])
    field, message, value = where or error.title, fault["msg"], fault["input"]
    if fault["type"] == "value_error":
        own = message.removeprefix("Value error, ")
        return own if " must " in own else f"{field} must be valid ({own}), got {_short(value)}"
    if fault["type"] == "missing":
        return f"{field} must be given, got nothing"
    if fault["type"] == "extra_forbidden":
        return f"{field} must be left out (no such field), got {_short(value)}"
    _, _, rule = message.partition(" should ")
    return f"{field} must {rule or f'be valid ({message})'}, got {_short(value)}"


def _short(value: object, limit: int = 60) -> str:
    text = " ".join(repr(value).split())
    return text if len(text) <= limit else text[: limit - 3] + "..."
