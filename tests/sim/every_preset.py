"""All presets on a short piece of a recorded trace, with look-ahead and a calibration trace, under one budget."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from sim.presets import preset, preset_names
from sim.scenario import Prepared, Scenario, alongside
from traces.edit import slice_trace
from traces.shipped import find_trace
from traces.store import load, save


def every_preset(folder: Path, **fields: Any) -> dict[str, Prepared]:
    """The presets by name, ready to run; ``fields`` of the scenario may be replaced. Its trace is put in ``folder``."""
    path = folder / "piece.safetensors"
    if not path.exists():
        save(slice_trace(load(find_trace("mixed")), sequences="0:4", tokens=56), path)
    given = {"trace": str(path), "cache": "25%", "calibration": "code", "hardware": "a6000-xeon5220r", **fields}
    systems = [preset(name) for name in preset_names()]
    return {one.system.name: one.prepare() for one in alongside(Scenario(**given), systems)}
