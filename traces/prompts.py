"""Prompts from a file: JSON lines with a domain each, or one plain text."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from traces.errors import InputError

SHIPPED_PROMPTS = Path(__file__).parent / "data" / "prompts.jsonl"
"""Thirty prompts of the project over six domains."""


@dataclass(frozen=True, slots=True)
class Prompt:
    """A text to go on from, and the domain that it belongs to."""

    domain: str
    text: str


def load_prompts(path: Path) -> list[Prompt]:
    """Reads ``.jsonl`` (a line: ``{"domain": ..., "text": ...}``) or ``.txt`` (one prompt, its domain the file's name).

    Other fields of a JSON line (such as ``source``) are left aside, and so are empty lines. Raises
    :class:`InputError` naming the file, and the line, of what is not such a file.
    """
    if path.suffix not in (".jsonl", ".txt"):
        raise InputError(f"prompts must be a .jsonl or a .txt file, got {path}")
    text = _read_text(path)
    if path.suffix == ".txt":
        return [Prompt(domain=path.stem, text=text.strip())]
    return [_parse_line(path, number, line) for number, line in enumerate(text.split("\n"), 1) if line.strip()]


def digest(prompts: Iterable[Prompt]) -> str:
    """SHA-256 over domains and texts in order, wherever they were read from."""
    sha = hashlib.sha256()
    for prompt in prompts:
        sha.update(json.dumps([prompt.domain, prompt.text]).encode() + b"\n")
    return sha.hexdigest()


def check_characters(text: str, field: str) -> None:
    """Raises :class:`InputError` when ``text`` has half a surrogate pair in it, which no encoding can write."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise InputError(f"{field} must hold whole characters, got {text[error.start]!r} at {error.start}") from error


def _read_text(path: Path) -> str:
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except OSError as error:
        raise InputError(f"prompts must be a readable file, got {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        wrong = error.object[error.start]
        raise InputError(f"{path}: must be UTF-8 text, got byte 0x{wrong:02x} at offset {error.start}") from error
    if "\0" in text:
        raise InputError(f"{path}: must be text, got a zero byte at character {text.index(chr(0))}")
    if not text.strip():
        raise InputError(f"{path}: must hold a prompt, got an empty file")
    return text


def _parse_line(path: Path, number: int, line: str) -> Prompt:
    place = f"{path}, line {number}:"
    try:
        values = json.loads(line)
    except ValueError as error:
        raise InputError(f"{place} must be a JSON object, got {line.strip()[:40]!r}") from error
    if not isinstance(values, dict):
        raise InputError(f"{place} must be a JSON object, got {type(values).__name__}")
    for field in ("domain", "text"):
        value = values.get(field)
        if not isinstance(value, str) or not value.strip():
            raise InputError(f"{place} {field} must be a text that is not empty, got {value!r}")
        check_characters(value, f"{place} {field}")
    return Prompt(domain=values["domain"], text=values["text"])
