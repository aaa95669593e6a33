"""The one kind of error that a user's input can cause, and its wording: ``FIELD must RULE, got VALUE``."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class InputError(ValueError):
    """Something that a user gave is wrong. The command line prints the message as one line and exits with 2."""


def unknown_name(field: str, value: str, valid: Iterable[str]) -> InputError:
    """The error for a name that is not in ``valid``: it offers the near ones, or else all of them."""
    names = sorted(valid)
    near = difflib.get_close_matches(value, names, n=3, cutoff=0.5)
    hint = f"did you mean {' or '.join(near)}?" if near else f"one of {', '.join(names)}"
    return InputError(f"{field} must be a known name, got {value!r} ({hint})")
