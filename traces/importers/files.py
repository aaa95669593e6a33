"""Finding and reading the files of an import; whatever is wrong with one becomes one line that names it."""

from __future__ import annotations

import csv
import glob
import gzip
import hashlib
import io
import json
import os
import re
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import groupby, pairwise
from pathlib import Path
from typing import IO, Any

from traces.errors import InputError
from traces.importers.base import Advance, Importer
from traces.schema import TraceError

GZIP_MAGIC = b"\x1f\x8b"
LINES_A_REPORT = 4096


def collect(inputs: Sequence[str | Path], importer: Importer) -> list[Path]:
    """The files that ``inputs`` name, in sorted path order, each once.

    An input is a file, a folder (its files whose names match the importer's patterns, and those in folders below it
    where the format comes in folders), or a glob for either. Raises :class:`InputError` for one that gives no file.
    """
    found: dict[str, Path] = {}
    for entry in inputs:
        for path in _matches(str(entry), importer):
            found.setdefault(os.path.abspath(path), path)
    if not found:
        raise InputError("files must be at least one, got none")
    return sorted(found.values())


def _matches(entry: str, importer: Importer) -> list[Path]:
    path = Path(entry)
    if path.is_dir():
        patterns, find = importer.patterns, path.rglob if importer.in_folders else path.glob
        below = [file for pattern in patterns for file in find(pattern) if file.is_file()]
        if not below:
            raise InputError(f"files must be named {' or '.join(patterns)} in a folder, got {entry}, which has none")
        return below
    if path.exists():
        return [path]
    if not glob.has_magic(entry):
        raise InputError(f"files must exist, got {entry}")
    matched = sorted(glob.glob(entry, recursive=True))
    if not matched:
        raise InputError(f"files must match a pattern that is given, got {entry!r}, which matches none")
    return [file for name in matched for file in _matches(name, importer)]


def root_of(files: Sequence[Path]) -> Path:
    """The deepest folder that holds all of ``files``."""
    return Path(os.path.commonpath([os.path.abspath(file.parent) for file in files]))


def domain_of(file: Path, root: Path) -> str:
    """The folder of ``file`` below ``root``, or the name of ``root`` itself."""
    below = Path(os.path.abspath(file.parent)).relative_to(root).as_posix()
    return root.name if below == "." else below


def digest_of(files: Sequence[Path]) -> str:
    """SHA-256 over names (below their common folder) and contents of ``files``, in their order."""
    sha, root = hashlib.sha256(), root_of(files)
    for file in files:
        with reading(file), file.open("rb") as raw:
            content = hashlib.file_digest(raw, "sha256").hexdigest()
        name = Path(os.path.abspath(file)).relative_to(root).as_posix()
        sha.update(f"{content}  {name}\n".encode("utf-8", "surrogateescape"))
    return sha.hexdigest()


@contextmanager
def reading(file: Path) -> Iterator[None]:
    """Turns what reading ``file`` may raise into a :class:`TraceError` that names it."""
    try:
        yield
    except EOFError as error:
        raise TraceError(f"{file}: must be a complete gzip file, got a truncated one") from error
    except (gzip.BadGzipFile, zlib.error) as error:
        raise TraceError(f"{file}: must be a sound gzip file, got: {error}") from error
    except UnicodeDecodeError as error:
        wrong = error.object[error.start]
        raise TraceError(f"{file}: must be UTF-8 text, got byte 0x{wrong:02x}") from error
    except OSError as error:
        raise TraceError(f"{file}: must be a readable file, got: {error.strerror or error}") from error


@contextmanager
def open_text(file: Path) -> Iterator[tuple[IO[bytes], io.TextIOWrapper]]:
    """The raw file, whose ``tell`` gives bytes on disk, and its text, unpacked when it is gzipped."""
    with reading(file), file.open("rb") as raw:
        packed = raw.peek(2)[:2] == GZIP_MAGIC
        stream = gzip.GzipFile(fileobj=raw) if packed else raw
        with io.TextIOWrapper(stream, encoding="utf-8-sig") as text:
            yield raw, text


def numbered_lines(file: Path, advance: Advance) -> Iterator[tuple[int, str]]:
    """Yields (number from 1, line without its end) for every line of ``file`` that is not blank."""
    done, number, any_text = 0, 0, False
    with open_text(file) as (raw, text):
        for number, line in enumerate(text, 1):
            if not number % LINES_A_REPORT:
                advance(raw.tell() - done)
                done = raw.tell()
            stripped = line.rstrip("\r\n")
            if stripped and not stripped.isspace():
                any_text = True
                yield number, stripped
    advance(file.stat().st_size - done)
    if not any_text:
        raise TraceError(f"{file}: must hold a trace, got an empty file")


def fields_of(line: str) -> list[str]:
    """The fields of a line of CSV; raises :class:`csv.Error` for one that ends inside its quotes."""
    return next(csv.reader([line], strict=True)) if '"' in line else line.split(",")


def read_json(file: Path, advance: Advance) -> Any:
    """The JSON content of ``file``, which may be gzipped."""
    with reading(file):
        packed = file.read_bytes()
        text = (gzip.decompress(packed) if packed.startswith(GZIP_MAGIC) else packed).decode("utf-8-sig")
    advance(len(packed))
    if not text or text.isspace():
        raise TraceError(f"{file}: must hold a trace, got an empty file")
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        whole = "complete JSON" if error.pos >= len(text.rstrip()) or "Unterminated" in error.msg else "JSON"
        place = f"line {error.lineno}, column {error.colno}"
        raise TraceError(f"{file}, {place}: must be {whole}, got: {error.msg}") from error
    except (ValueError, RecursionError) as error:
        raise TraceError(f"{file}: must be JSON of plain numbers and lists, got: {error}") from error


def layers_by_folder(files: Sequence[Path], pattern: str) -> Iterator[list[Path]]:
    """Yields the files of each folder by layer, whose number is the one group of ``pattern`` in a file's name.

    Raises :class:`TraceError` for a name without a number, and unless the numbers of a folder count up by one.
    """
    for folder, inside in groupby(sorted(files, key=lambda file: (file.parent, file.name)), lambda file: file.parent):
        numbered = []
        for file in inside:
            found = re.search(pattern, file.name)
            if found is None:
                raise TraceError(f"{file}: must have the number of its layer in its name, got {file.name}")
            numbered.append((int(found[1]), file))
        without_gap([number for number, _ in numbered], f"{folder}: files")
        yield [file for _, file in sorted(numbered)]


def without_gap(numbers: Sequence[int], what: str) -> list[int]:
    """``numbers``, ascending; raises :class:`TraceError` unless they count up by one, each once."""
    ordered = sorted(numbers)
    for before, after in pairwise(ordered):
        if after != before + 1:
            raise TraceError(f"{what} must number its layers without a gap, each once, got {after} after {before}")
    return ordered
