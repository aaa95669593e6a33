"""The catalogues: models and machines by name, and a user's own from files, alone or among the catalogue's parts."""

from __future__ import annotations

import re
import tomllib
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError

from sim.spec.faults import CatalogueError, first_fault, read_toml
from sim.spec.hardware import HardwareSpec
from sim.spec.model import ModelSpec
from sim.spec.overrides import PARTS, Spec, marked, overridden, overridden_model, settings_of
from traces.errors import InputError, unknown_name

__all__ = [
    "PART_KINDS",
    "REFERENCE_MACHINE",
    "CatalogueError",
    "find_hardware",
    "find_model",
    "find_parts",
    "first_fault",
    "hardware",
    "hardware_names",
    "load_hardware_file",
    "model",
    "model_names",
    "overridden",
    "overridden_model",
    "part_names",
    "settings_of",
]

DEFAULT_HOST = "python"
REFERENCE_MACHINE = "rtx4090-epyc9374f"
"""The machine that is meant where a user names none."""
_SEVERAL = r"^\d+ ?[x*][ -]?[a-z]|^(dual|two|twin|triple|three|quad|four|eight|multi)\b|[\d-]x\d{1,2}\b|dgx|hgx"
_UNIFIED = r"gh200|gb10|gb[23]00|grace|apple|\bm\d-(pro|max|ultra)|mi300a|strix|ryzen-ai|jetson|\borin|tegra|\bthor\b"
_NOT_MODELLED = re.compile(f"{_SEVERAL}|{_UNIFIED}", re.IGNORECASE)
"""Names of several GPUs, as 4xh100, dual-h100 and h100-x8, and of machines in which GPU and CPU share one memory."""
_LANES = re.compile(r"pcie[\d.]*-?x\d+", re.IGNORECASE)
"""What looks like several of something in the name of a link."""
PART_KINDS = tuple(PARTS)
"""The parts of a machine, in the order in which a composed name gives them."""


def model_names() -> list[str]:
    """Names of the catalogue's models, in the order of the file."""
    return list(_table("models.toml"))


def model(name: str) -> ModelSpec:
    """The catalogue's model called ``name``; raises an :class:`InputError` with the near names when unknown."""
    return ModelSpec(name=name, **_model_fields(name))


def find_model(name: str) -> ModelSpec:
    """The catalogue's model called ``name``, or, when it ends in ``.toml``, the one that this file describes.

    The file holds the fields of :class:`ModelSpec` at its top level. With ``like = "NAME"`` it takes over those that it
    leaves out from the catalogue's model NAME. Raises :class:`InputError`.
    """
    if not name.endswith(".toml"):
        return model(name)
    fields = read_toml(Path(name), "model")
    like = fields.pop("like", None)
    if like is not None:
        if like not in model_names():
            raise CatalogueError(f"{name}: {unknown_name('like', str(like), model_names())}")
        own = [field for field in fields if field not in ("name", "source")]
        base = _model_fields(like)
        fields = {**base, "source": marked(f"as {like}: {base['source']}", own), **fields}
    return _validated(ModelSpec, fields, Path(name))


def hardware_names() -> list[str]:
    """Names of the catalogue's machines, in the order of the file."""
    return list(_table("hardware.toml")["machine"])


def part_names(kind: str) -> list[str]:
    """Names of the catalogue's parts of one ``kind``, of :data:`PART_KINDS`."""
    if kind not in PART_KINDS:
        raise unknown_name("part", kind, PART_KINDS)
    return list(_table("hardware.toml")[kind])


def find_parts(name: str) -> dict[str, BaseModel]:
    """The catalogue's parts of that name, by kind: mostly one, or none."""
    return {kind: _part(kind, name, Path()) for kind in PART_KINDS if name in part_names(kind)}


def find_hardware(name: str, *, parts: bool = False) -> HardwareSpec:
    """The machine that a user names: one of the catalogue, one composed of parts, or, with ``.toml``, a file of theirs.

    ``parts`` says that a part's name would do as well where this is asked for, so that the near ones are offered, too.
    Raises :class:`InputError` as :func:`hardware` and :func:`load_hardware_file` do.
    """
    if _not_modelled(name):
        raise InputError(
            "hardware must have one GPU with memory of its own: several GPUs and unified memory are not modelled "
            f"(docs/limitations.md), got {name!r}"
        )
    if parts and not ("+" in name or name.endswith(".toml") or name in hardware_names()):
        known = [hardware_names(), *(part_names(kind) for kind in PART_KINDS)]
        raise unknown_name("hardware", name, {one for names in known for one in names})
    whole = name.endswith(".toml") and ("+" not in name or Path(name).exists())
    return load_hardware_file(Path(name)) if whole else hardware(name)


def _not_modelled(name: str) -> bool:
    """Whether ``name``, or a part that it is composed of, is of what the simulator does not have; a file may be called
    anything."""
    parts = [part for part in name.split("+") if not part.endswith(".toml")]
    return sum(part in part_names("gpu") for part in parts) > 1 or any(
        _NOT_MODELLED.search(_LANES.sub("pcie", part)) for part in parts
    )


def hardware(name: str) -> HardwareSpec:
    """A machine of the catalogue, or one composed of parts as ``gpu+cpu+link``, with ``+host`` or ``+disk`` after it.

    A part is a name of the catalogue, or a TOML file with the part's fields at its top level. Raises an
    :class:`InputError` with the near names when the machine, or one of the parts, is unknown.
    """
    machines = _table("hardware.toml")["machine"]
    if "+" in name:
        return _composed(name)
    if name not in machines:
        raise unknown_name("hardware", name, machines)
    return _assembled({"name": name, **machines[name]}, Path())


def load_hardware_file(path: Path) -> HardwareSpec:
    """Reads a whole machine from a TOML file: ``name`` and the tables ``[gpu]``, ``[cpu]``, ``[link]``, ``[host]``.

    In place of a table may stand the name of a part of the catalogue (``gpu = "rtx4090"``), or of a file beside this
    one. Raises :class:`CatalogueError` that names the file and what is wrong with it.
    """
    fields = read_toml(path, "hardware")
    try:
        return _assembled(fields, path)
    except CatalogueError:
        raise
    except InputError as error:
        raise CatalogueError(f"{path}: {error}") from error


def _composed(name: str) -> HardwareSpec:
    parts = name.split("+")
    if not 3 <= len(parts) <= 5:
        raise InputError(f"hardware must be a machine, or gpu+cpu+link with +host or +disk after it, got {name!r}")
    fields: dict[str, Any] = dict(zip(PART_KINDS, parts[:3], strict=False))
    for part in parts[3:]:
        kind = "disk" if _is_disk(part) else "host"
        if kind in fields:
            raise InputError(f"hardware must have one {kind}, got {fields[kind]!r} and {part!r}")
        fields[kind] = part
    return _assembled({"name": name, "source": "composed by the user", **fields}, Path())


def _is_disk(part: str) -> bool:
    """Whether a part after gpu, cpu and link is a disk: a host has no bandwidth."""
    if part.endswith(".toml"):
        return "bytes_per_s" in read_toml(Path(part), "part")
    return part in _table("hardware.toml")["disk"]


def _assembled(fields: dict[str, Any], path: Path) -> HardwareSpec:
    """The machine of ``fields``, with parts that are named, and not spelt out, put in; files are sought beside
    ``path``, which an error names unless it is empty."""
    fields = {"host": DEFAULT_HOST, **fields}
    for kind in PART_KINDS:
        if isinstance(fields.get(kind), str):
            fields[kind] = _part(kind, fields[kind], path.parent)
    return _validated(HardwareSpec, fields, path)


def _part(kind: str, name: str, folder: Path) -> Any:
    """The part that ``name`` means, a file in ``folder`` or the catalogue's."""
    named = {} if kind == "host" else {"name": Path(name).stem if name.endswith(".toml") else name}
    if name.endswith(".toml"):
        path = folder / name
        return _validated(PARTS[kind], {**named, **read_toml(path, kind)}, path)
    known = _table("hardware.toml")[kind]
    if name not in known:
        raise unknown_name(kind, name, known)
    return PARTS[kind].model_validate({**named, **known[name]})


def _validated(build: type[Spec], fields: dict[str, Any], path: Path) -> Spec:
    try:
        return build.model_validate(fields)
    except ValidationError as error:
        raise CatalogueError(f"{path}: {first_fault(error)}") from error


def _model_fields(name: str) -> dict[str, Any]:
    """The table of a model, complete: what it takes over from another is put in."""
    table = _table("models.toml")
    if name not in table:
        raise unknown_name("model", name, table)
    own = dict(table[name])
    like = own.pop("like", None)
    return own if like is None else {**table[like], **own}


@cache
def _table(file: str) -> dict[str, Any]:
    return tomllib.loads(files("sim.spec").joinpath(file).read_text(encoding="utf-8"))
