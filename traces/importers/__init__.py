"""Other people's routing traces, one file a format."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from traces.errors import InputError, unknown_name
from traces.importers import (
    esft,
    generic_csv,
    generic_jsonl,
    gpt_oss_json,
    layer_csv,
    logits_safetensors,
    route_csv,
    router_trace_v2,
)
from traces.importers.assemble import assemble
from traces.importers.base import Advance, Importer, Job, Options
from traces.importers.files import collect
from traces.known import KnownModel
from traces.schema import Array, Trace

__all__ = ["IMPORTERS", "Imported", "Options", "collect", "import_files"]

CSV = ("*.csv", "*.csv.gz")

IMPORTERS: dict[str, Importer] = {
    "gpt-oss-json": Importer(
        gpt_oss_json.read,
        ("*.json", "*.json.gz"),
        "JSON, a file a prompt, decode with gates",
        in_folders=True,
        family="gpt-oss",
    ),
    "esft": Importer(
        esft.read,
        ("expert_weights_*.txt", "expert_weights_*.txt.gz"),
        "a text file a layer, a line a sequence, with scores",
        prompts_only=True,
        in_folders=True,
    ),
    "router-trace-v2": Importer(
        router_trace_v2.read,
        ("*router-trace*.json", "*router-trace*.json.gz"),
        "JSON, selections[token][layer][rank]",
        prompts_only=True,
    ),
    "route-csv": Importer(route_csv.read, CSV, "a row a routed expert, with another engine's hits and misses"),
    "layer-csv": Importer(
        layer_csv.read, CSV, "a row a layer and token, a file a prompt", prompts_only=True, in_folders=True
    ),
    "logits-safetensors": Importer(
        logits_safetensors.read, ("*.safetensors",), "router logits, a file a layer (--top-k)", prompts_only=True
    ),
    "csv": Importer(generic_csv.read, CSV, "generic: a row a sequence, position and layer"),
    "jsonl": Importer(generic_jsonl.read, ("*.jsonl", "*.jsonl.gz"), "generic: the same, a JSON object a row"),
}
"""Every format by the name that ``--format`` takes."""


@dataclass(frozen=True, eq=False)
class Imported:
    """A trace, what was assumed or found odd on the way, and another engine's residency when the format has it."""

    trace: Trace
    notes: list[str]  # each begins with "note: " or "warning: "
    residency: dict[str, Array] = field(default_factory=dict)  # by column, a row a routed expert


def import_files(
    name: str,
    inputs: Sequence[str | Path],
    options: Options | None = None,
    *,
    advance: Advance = lambda _: None,
    catalogue: Mapping[str, KnownModel] | None = None,
) -> Imported:
    """Reads ``inputs`` (files, folders, globs) of the format ``name``, in sorted path order, into one trace.

    ``advance`` is told the bytes that were read. The ``catalogue`` gives the experts of a model that is in it, where
    the files and the options do not. Raises :class:`InputError` for an unknown name or an option that the format does
    not have, and :class:`TraceError` naming file and row for what is malformed.
    """
    if name not in IMPORTERS:
        raise unknown_name("format", name, IMPORTERS)
    importer, chosen = IMPORTERS[name], options or Options()
    if chosen.prefill_as_batch and not importer.prompts_only:
        raise InputError(f"prefill_as_batch must be left out for {name}, which says what ran together, got True")
    job = Job(collect(inputs, importer), chosen, advance, catalogue or {}, importer.family)
    trace, residency = assemble(job, name, importer.read(job))
    return Imported(trace, job.notes, residency)
