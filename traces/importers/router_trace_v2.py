"""``router-trace-v2``: one JSON object with ``selections[token][layer][rank]`` and its provenance in ``source``.

The format has no gates, no sequences and no phases: a file is one sequence, read as a prompt.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from traces.importers.base import Job, Part
from traces.importers.checks import as_ids
from traces.importers.files import read_json
from traces.schema import Phase, TraceError

VERSION = 2
DIMENSIONS = {"layers": "layers", "expertsPerLayer": "experts", "topK": "top_k"}


def read(job: Job) -> Iterator[Part]:
    """Yields one sequence a file. Raises :class:`TraceError` when the numbers at the top and the lists disagree."""
    for file in job.files:
        content = read_json(file, job.advance)
        if not isinstance(content, dict) or "selections" not in content:
            raise TraceError(f"{file}: must be an object with version {VERSION} and selections, got another shape")
        if content.get("version") != VERSION:
            raise TraceError(f"{file}: version must be {VERSION}, got {content.get('version')!r}")
        for name, field in DIMENSIONS.items():
            job.say(field, _positive(file, content, name), file)
        _provenance(job, content.get("source"))
        yield _sequence(job, file, content)


def _positive(file: Path, content: dict[str, Any], name: str) -> int:
    value = content.get(name)
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise TraceError(f"{file}: {name} must be a whole number from 1, got {value!r}")
    return value


def _provenance(job: Job, source: Any) -> None:
    """Model, revision, software and digest of the prompts, as far as ``source`` has them."""
    known = source if isinstance(source, dict) else {}
    model, workload, software = (_object(known.get(name)) for name in ("model", "workload", "software"))
    facts = {"model": model.get("id"), "revision": model.get("revision"), "prompts_digest": workload.get("sha256")}
    for name, value in facts.items():
        if isinstance(value, str) and value:
            job.facts.setdefault(name, value)
    job.facts.setdefault("software", {name.removesuffix("Version"): str(value) for name, value in software.items()})
    job.facts.setdefault("synthetic", known.get("kind") == "synthetic")


def _object(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _sequence(job: Job, file: Path, content: dict[str, Any]) -> Part:
    layers, top_k, selections = int(job.facts["layers"]), int(job.facts["top_k"]), content["selections"]
    if not isinstance(selections, list) or not selections:
        raise TraceError(f"{file}: selections must be a list with a token, got {str(selections)[:20]}")
    if len(selections) != content.get("tokens", len(selections)):
        raise TraceError(f"{file}: selections must have the {content['tokens']} tokens, got {len(selections)}")
    flat: list[Any] = []
    for token, by_layer in enumerate(selections):
        if not isinstance(by_layer, list) or len(by_layer) != layers:
            raise TraceError(f"{file}, token {token}: must have a list of {layers} layers, got {_size(by_layer)}")
        for layer, chosen in enumerate(by_layer):
            if not isinstance(chosen, list) or len(chosen) != top_k:
                where = f"{file}, token {token}, layer {layer}"
                raise TraceError(f"{where}: must have a list of {top_k} experts, got {_size(chosen)}")
            flat += chosen

    def place(token: int, layer: int) -> str:
        return f"{file}, token {token}, layer {layer}"

    ids = as_ids(flat, (len(selections), layers, top_k), place, job.dimension("experts"))
    return Part.one_sequence(ids, phase=Phase.PREFILL, as_batch=job.options.prefill_as_batch)


def _size(value: Any) -> str:
    return f"{len(value)}" if isinstance(value, list) else repr(value)[:20]
