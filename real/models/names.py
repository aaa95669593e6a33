"""What a user calls a model, looked at without torch, so that a mistake is told at once."""

from __future__ import annotations

import json
from pathlib import Path

from sim.spec import ModelSpec, catalogue
from traces.errors import InputError, unknown_name

SMALL_NAME = "moetwin-small"
SMALL_FOLDER = Path(__file__).parent / "small"


def check_model(name_or_path: str, *, random_weights: bool = False) -> None:
    """Raises :class:`InputError` for what :func:`real.models.load.load` would not even look for."""
    if random_weights:
        random_spec(name_or_path)
    else:
        model_type_of(checkpoint_folder(name_or_path))


def random_spec(name: str) -> ModelSpec:
    """The dimensions to be built with random weights: those of a catalogue model, or of a TOML file's.

    Raises :class:`InputError` for a checkpoint, which has weights, and for a name or file that is neither.
    """
    if name == SMALL_NAME or Path(name).is_dir():
        raise InputError(f"random-weights must go with a catalogue model or a TOML file, got the checkpoint {name!r}")
    if name.endswith(".toml"):
        return catalogue.find_model(name)
    if "/" in name:
        raise InputError(f"model must be a folder that exists, got {name}")
    names = catalogue.model_names()
    if name not in names:
        raise unknown_name("model", name, {*names, SMALL_NAME})
    return catalogue.model(name)


def checkpoint_folder(name_or_path: str) -> Path:
    """The folder of the weights; raises :class:`InputError` for a name that has none."""
    if name_or_path == SMALL_NAME:
        return SMALL_FOLDER
    if Path(name_or_path).is_dir():
        return Path(name_or_path)
    random_spec(name_or_path)  # what is not even a name of dimensions has an error of its own
    kind = "TOML file" if name_or_path.endswith(".toml") else "catalogue name"
    raise InputError(
        f"model must be a local checkpoint or {SMALL_NAME} (or give --random-weights), got the {kind} {name_or_path!r}"
    )


def model_type_of(folder: Path) -> str:
    """The model_type of a checkpoint's config.json; raises :class:`InputError` where there is none."""
    path = folder / "config.json"
    if not path.is_file():
        raise InputError(f"model must be a checkpoint folder with a config.json, got {folder} without one")
    try:
        return str(json.loads(path.read_text(encoding="utf-8"))["model_type"])
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"{path} must be JSON with a model_type, got: {type(error).__name__}: {error}") from error
