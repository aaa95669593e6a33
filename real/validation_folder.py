"""The folder of a validation: whose it is, and whether what stands in it belongs together."""

from __future__ import annotations

import datetime
import json
from itertools import chain
from pathlib import Path
from typing import Any

from real.calibrate import describe_machine
from sim.profile import ProfileCosts
from sim.results import RunResult, check_folder
from sim.spec.profile import Profile
from traces.errors import InputError
from traces.paths import whole_file

PROFILE_FILE = "profile.toml"
RUNS, CONSTANTS = "runs", "constants"


def is_there(folder: Path) -> bool:
    """Whether a run was written into ``folder``, which is then complete."""
    return (folder / "run.json").exists()


def check_weighed(folder: Path) -> None:
    """Raises :class:`InputError` where the runs in a model's ``folder`` weighed another profile than the one there.

    Theirs has then been removed or replaced: what they decided, and what is simulated on the profile, do not belong
    together.
    """
    path = folder / PROFILE_FILE
    known = ProfileCosts(Profile.load(path)).name if path.exists() else "none"
    for run in chain.from_iterable((folder / name).rglob("run.json") for name in (RUNS, CONSTANTS)):
        if any(part.startswith(".") for part in run.relative_to(folder).parts):  # half-written
            continue
        info = RunResult.load_info(run.parent)
        if info.cpu_threads is None:
            raise InputError(f"{run.parent} must tell what newer runs do, got one of an older version: measure anew")
        weighed = info.costs
        if weighed != known:
            raise InputError(
                f"{path} must be the one that the runs beside it were measured with ({weighed}), got {known}: put it "
                f"back, or remove {folder / RUNS} and {folder / CONSTANTS} to measure them again"
            )


def claim(out: Path, settings: dict[str, Any]) -> None:
    """Writes the settings and the machine into a new folder; raises :class:`InputError` where others stand there."""
    about = json.loads(json.dumps(settings))
    environment = {"date": datetime.datetime.now(datetime.UTC).date().isoformat(), **describe_machine()}
    if not (out / "settings.json").exists():
        check_folder(out, force=False)
        _write(out / "environment.json", environment)  # first: a folder with settings is complete
        _write(out / "settings.json", about)
        return
    _compare(out / "settings.json", about, "of the same validation")
    _compare(out / "environment.json", environment, "of this machine and these versions")


def _compare(path: Path, wanted: dict[str, Any], rule: str) -> None:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"out must be a folder of a validation, got {path} ({error})") from error
    if not isinstance(found, dict):
        raise InputError(f"out must be a folder of a validation, got {path} (no object)")
    for field, value in wanted.items():
        if field not in ("digest", "date") and found.get(field) != value:
            told = f"{field} {_short(found.get(field))} in place of {_short(value)}"
            if field == "content":  # all else is equal: what is named has been edited
                edited = [one.rpartition(": ")[0] for one in value if one not in found.get(field, [])]
                told = f"another {', '.join(edited)}"
            raise InputError(f"out must be a new folder, or one {rule}, got {path.parent} with {told}")


def _short(value: Any) -> str:
    return ",".join(map(str, value)) if isinstance(value, list) else str(value)[:60]


def _write(path: Path, content: dict[str, Any]) -> None:
    with whole_file(path) as draft:
        draft.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
