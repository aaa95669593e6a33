"""What preparing a model of a validation will take, so that nothing is begun that a time limit would cut.

What was measured in the validation's folder before stands in ``took.json`` there; a model that has no figure yet gets
those of the others, scaled with its bytes, and the first of all a rough rate.
"""

from __future__ import annotations

import json
from contextlib import suppress
from pathlib import Path

from sim.spec import ModelSpec
from traces.paths import whole_file

FILE = "took.json"
LOAD_S, LOAD_BYTES_PER_S = 3.0, 1e9
"""Loading where nothing was measured: opening the device, and weights at the rate at which they are made or read."""
REPEAT_S, PASSES = 2.0, 75
RATES = {"cpu": 5e9, "cuda": 2e10}
"""Calibrating where nothing was measured: in each repeat single pieces of work and decisions, and so many forward
passes, each of which copies a token's experts at this rate (bytes/s)."""


class Took:
    """Seconds that loading, calibrating and the longest run of each model took, by the names ``load``, ``calibrate``
    and ``run``, kept in ``out``."""

    def __init__(self, out: Path, device: str, repeats: int) -> None:
        self._path, self._device, self._repeats = out / FILE, device, repeats
        self._kept: dict[str, dict[str, float]] = {}
        with suppress(OSError, ValueError, TypeError):  # without the record there are rough rates
            self._kept = dict(json.loads(self._path.read_text(encoding="utf-8")))

    def keep(self, spec: ModelSpec, **seconds: float) -> None:
        """Takes down what was measured with the model; of several runs the longest."""
        entry = self._kept.setdefault(spec.name, {"bytes": float(_bytes(spec))})
        if "run" in seconds and seconds["run"] <= entry.get("run", -1.0):
            return
        entry |= seconds
        with whole_file(self._path) as draft:
            draft.write_text(json.dumps(self._kept, indent=1) + "\n", encoding="utf-8")

    def estimate(self, spec: ModelSpec, what: str) -> float:
        """Seconds that ``what`` will take: as before; else as for other models, longer for a larger one; else rough."""
        own = self._kept.get(spec.name, {})
        if what in own:
            return own[what]
        others = [one[what] * max(1.0, _bytes(spec) / one["bytes"]) for one in self._kept.values() if what in one]
        return max(others) if others else self._rough_s(spec, what)

    def _rough_s(self, spec: ModelSpec, what: str) -> float:
        if what == "load":
            return LOAD_S + _bytes(spec) / LOAD_BYTES_PER_S
        token_bytes = spec.moe_layers * spec.top_k * spec.expert_bytes
        if what == "calibrate":
            return self._repeats * (REPEAT_S + PASSES * token_bytes / RATES[self._device])
        return 0.0  # a run, which loses little


def _bytes(spec: ModelSpec) -> int:
    return int(spec.moe_layers * spec.experts * spec.expert_bytes + spec.dense_bytes)
