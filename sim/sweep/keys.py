"""What a run is known by: a digest of all that its outcome depends on, whatever its files are called."""

from __future__ import annotations

import hashlib
import json
from functools import cache, lru_cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

import sim
import traces
from sim.scenario import Scenario
from sim.spec import catalogue
from traces.schema import Trace
from traces.shipped import find_trace
from traces.store import load

PACKAGES = ("numpy", "pandas", "simpy")
"""Those whose versions a run's figures may depend on."""

NOT_RUN = ("cli*.py", "options.py", "printing.py", "presets.toml")
"""Files of ``sim`` and ``traces`` that no run depends on: the command line, and presets, which are read beforehand."""

WORDS = {"summary", "source", "leaves_out", "sim_only", "clairvoyant"}
"""Fields of a preset that say what it is, and not what it does; so does the name of its system."""


def key_of(scenario: Scenario) -> str:
    """The digest of a run: the scenario with the content of all files that it names, the code, and its packages.

    Raises :class:`traces.errors.InputError` when a file cannot be read. Departure: what a user's policy imports or
    reads itself is not seen, only the file that it is in.
    """
    content = {field: _content(field, value) for field, value in scenario}
    text = json.dumps({"code": code_version(), "scenario": content}, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:40]


@cache
def code_version() -> str:
    """Digest of the sources that a run executes, and of the catalogues."""
    sha = hashlib.sha256(json.dumps({name: version(name) for name in PACKAGES}).encode())
    for package in (sim, traces):
        root = Path(str(package.__file__)).parent
        for path in sorted([*root.rglob("*.py"), *root.rglob("*.toml")]):
            if not any(path.match(pattern) for pattern in NOT_RUN):
                sha.update(f"{package.__name__}/{path.relative_to(root).as_posix()}\n".encode())
                sha.update(path.read_bytes())
    return sha.hexdigest()


def trace_of(name: str, field: str = "trace") -> Trace:
    """The trace of that name, read and hashed once as long as its file does not change.

    Raises :class:`traces.errors.InputError`, which speaks of ``field``, when there is none.
    """
    path = find_trace(name, field)
    return _trace(path, _changed(path)) if path.exists() else load(path)


@lru_cache(maxsize=64)
def _trace(path: Path, changed: tuple[int, int]) -> Trace:
    return load(path)


def _changed(path: Path) -> tuple[int, int]:
    status = path.stat()
    return status.st_mtime_ns, status.st_size


def _content(field: str, value: Any) -> Any:
    if value is None:
        return None
    if field in ("trace", "calibration"):
        trace = trace_of(value, field)
        return [trace.digest, trace.header.model_dump(mode="json")]
    if field == "model":
        return catalogue.find_model(value).model_dump(mode="json")
    if field == "hardware":
        return catalogue.find_hardware(value).model_dump(mode="json")
    if field == "system":
        fields = value.model_dump(mode="json", exclude=WORDS)
        del fields["system"]["name"]
        return _files_read(fields)
    return _files_read(value)


def _files_read(value: Any) -> Any:
    """``value`` with the content in the place of whatever in it names a file, or a class in one."""
    if isinstance(value, dict):
        return {name: _files_read(one) for name, one in value.items()}
    if isinstance(value, (list, tuple)):
        return [_files_read(one) for one in value]
    if isinstance(value, str) and ".py:" in value:
        file, _, name = value.rpartition(":")
        return [name, _digest(Path(file))]
    if isinstance(value, (str, Path)) and Path(value).is_file():
        return _digest(Path(value))
    return value if not isinstance(value, Path) else str(value)


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
