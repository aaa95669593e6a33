"""The catalogues: models and machines by name, and a user's own machine from a file."""

from __future__ import annotations

import tomllib
from collections.abc import Callable
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any, TypeVar

from pydantic import ValidationError

from sim.spec.hardware import CpuSpec, GpuSpec, HardwareSpec, HostSpec, LinkSpec
from sim.spec.model import ModelSpec
from traces.errors import InputError, unknown_name

Part = TypeVar("Part", GpuSpec, CpuSpec, LinkSpec)

DEFAULT_HOST = "python"
REFERENCE_MACHINE = "rtx4090-epyc9374f"
"""The machine that is meant where a user names none."""
PART_KINDS = ("gpu", "cpu", "link", "host")
"""The parts of a machine, in the order in which a composed name gives them."""


class CatalogueError(InputError):
    """A hardware file cannot be read as a machine; the message names the file, the field and the rule."""


def model_names() -> list[str]:
    """Names of the catalogue's models, in the order of the file."""
    return list(_table("models.toml"))


def model(name: str) -> ModelSpec:
    """The catalogue's model called ``name``; raises an :class:`InputError` with the near names when unknown."""
    table = _table("models.toml")
    if name not in table:
        raise unknown_name("model", name, table)
    return ModelSpec(name=name, **table[name])


def find_model(name: str) -> ModelSpec:
    """The catalogue's model called ``name``, or, when it ends in ``.toml``, the one that this file describes.

    The file holds the fields of :class:`ModelSpec` at its top level. Raises :class:`InputError`.
    """
    if not name.endswith(".toml"):
        return model(name)
    try:
        return ModelSpec.model_validate(_read_toml(Path(name), "model"))
    except ValidationError as error:
        raise CatalogueError(f"{name}: {first_fault(error)}") from error


def hardware_names() -> list[str]:
    """Names of the catalogue's machines, in the order of the file."""
    return list(_table("hardware.toml")["machine"])


def part_names(kind: str) -> list[str]:
    """Names of the catalogue's parts of one ``kind``, of :data:`PART_KINDS`."""
    if kind not in PART_KINDS:
        raise unknown_name("part", kind, PART_KINDS)
    return list(_table("hardware.toml")[kind])


def hardware(name: str) -> HardwareSpec:
    """A machine of the catalogue, or one composed as ``gpu+cpu+link`` or ``gpu+cpu+link+host`` of its parts.

    Raises an :class:`InputError` with the near names when the machine, or one of the parts, is unknown.
    """
    machines = _table("hardware.toml")["machine"]
    if "+" in name:
        return _composed(name)
    if name not in machines:
        raise unknown_name("hardware", name, machines)
    chosen = machines[name]
    parts = [chosen.get(kind, DEFAULT_HOST) for kind in PART_KINDS]
    return _assembled(name, parts, source=chosen["source"])


def load_hardware_file(path: Path) -> HardwareSpec:
    """Reads a whole machine from a TOML file: ``name`` and the tables ``[gpu]``, ``[cpu]``, ``[link]``, ``[host]``.

    Raises :class:`CatalogueError` that names the file and what is wrong with it.
    """
    try:
        return HardwareSpec.model_validate(_read_toml(path, "hardware"))
    except ValidationError as error:
        raise CatalogueError(f"{path}: {first_fault(error)}") from error


def _read_toml(path: Path, kind: str) -> dict[str, Any]:
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


@cache
def _table(file: str) -> dict[str, Any]:
    return tomllib.loads(files("sim.spec").joinpath(file).read_text(encoding="utf-8"))


def _composed(name: str) -> HardwareSpec:
    parts = name.split("+")
    if len(parts) not in (3, 4):
        raise InputError(f"hardware must be a machine, gpu+cpu+link or gpu+cpu+link+host, got {name!r}")
    if len(parts) == 3:
        parts = [*parts, DEFAULT_HOST]
    return _assembled(name, parts, source="composed by the user")


def _assembled(name: str, parts: list[str], source: str) -> HardwareSpec:
    gpu, cpu, link, host = parts
    return HardwareSpec(
        name=name,
        source=source,
        gpu=_part("gpu", gpu, GpuSpec),
        cpu=_part("cpu", cpu, CpuSpec),
        link=_part("link", link, LinkSpec),
        host=HostSpec(**_entry("host", host)),
    )


def _part(kind: str, name: str, build: Callable[..., Part]) -> Part:
    return build(name=name, **_entry(kind, name))


def _entry(kind: str, name: str) -> dict[str, Any]:
    known = _table("hardware.toml")[kind]
    if name not in known:
        raise unknown_name(kind, name, known)
    entry: dict[str, Any] = known[name]
    return entry
