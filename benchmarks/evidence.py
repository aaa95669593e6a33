"""What a benchmark keeps of a run: its figures, and the machine and day that they are of."""

from __future__ import annotations

import datetime
import json
from importlib.metadata import version
from pathlib import Path
from typing import Any

from analysis.files import write_text


def keep(path: Path, packages: tuple[str, ...], *, force: bool, **figures: Any) -> None:
    """Writes ``figures`` as JSON, with the versions of ``packages`` among the facts of the machine."""
    from real.calibrate import describe_machine  # torch comes with it, which would show in what is measured

    facts = {
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "machine": {**describe_machine(), **{name: version(name) for name in packages}},
    }
    write_text(path, json.dumps({**facts, **figures}, indent=1) + "\n", force=force)
