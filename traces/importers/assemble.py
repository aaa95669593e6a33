"""Parts of an import, put together: one trace with its header, and what had to be assumed.

Shapes: T tokens, L MoE layers, K experts a token.
"""

from __future__ import annotations

import shlex
from collections.abc import Iterable
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import numpy as np

from traces.importers.base import Job, Part
from traces.importers.files import digest_of
from traces.known import KnownModel
from traces.schema import NOT_ROUTED, Array, Trace, TraceError, TraceHeader

MOST_IDENTICAL_ROWS = 256
"""Leading tokens with the same experts in every layer, from which on they count as dummies (chosen here)."""


def assemble(job: Job, name: str, parts: Iterable[Part]) -> tuple[Trace, dict[str, Array]]:
    """The trace that ``parts`` of format ``name`` make, and the residency that came with them, by column.

    A part's steps and sequences follow those of the part before. Notes are added to ``job``. Raises
    :class:`TraceError` when the trace breaks a rule of the schema.
    """
    read = list(parts)
    if not read:
        raise TraceError(f"{job.files[0]}: must hold a token, got none")
    columns, residency = _columns(read)
    domains = _domains(read)
    _gates_note(job, read)
    del read
    _dummies(job, columns, residency)
    try:
        return Trace.of(_header(job, name, columns["expert_ids"], domains), **columns), residency
    except TraceError as error:
        more = f" and {len(job.files) - 1} more" if len(job.files) > 1 else ""
        raise TraceError(f"{job.files[0]}{more}: {error}") from error


def _columns(parts: list[Part]) -> tuple[dict[str, Any], dict[str, Array]]:
    """The arrays of all parts end to end: those of the schema, and the residency."""
    steps, sequences, residency = [], [], []
    next_step = next_sequence = tokens = 0
    for number, part in enumerate(parts):
        shift = next_step - int(part.step.min()) if number else 0
        steps.append(part.step + shift)
        sequences.append(part.sequence + next_sequence)
        next_step = int(part.step.max()) + shift + 1
        if part.residency is not None:
            moved = {"token": part.residency["token"] + tokens, "sequence": part.residency["sequence"] + next_sequence}
            residency.append(part.residency | moved)
        next_sequence += part.sequences
        tokens += len(part.step)
    columns: dict[str, Any] = {"step": np.concatenate(steps), "sequence": np.concatenate(sequences)}
    columns |= {name: _joined(parts, name) for name in ("position", "phase", "gates", "scores", "token_ids")}
    columns["expert_ids"] = _padded([part.expert_ids for part in parts])
    if columns["token_ids"] is None:
        columns["token_ids"] = np.zeros(tokens, dtype=np.int32)
    joined = {name: np.concatenate([table[name] for table in residency]) for name in residency[0]} if residency else {}
    return columns, joined


def _joined(parts: list[Part], name: str) -> Array | None:
    """One array of all parts; None when some part has none."""
    pieces = [getattr(part, name) for part in parts]
    if any(piece is None for piece in pieces):
        return None
    return _padded(pieces, 0) if name == "gates" else np.concatenate(pieces)


def _padded(pieces: list[Array], fill: int = NOT_ROUTED) -> Array:
    """Joins [n, L, K] arrays; narrower ones are filled up to the widest K."""
    width = max(piece.shape[2] for piece in pieces)

    def widened(piece: Array) -> Array:
        missing = width - piece.shape[2]
        return np.pad(piece, ((0, 0), (0, 0), (0, missing)), constant_values=fill) if missing else piece

    return np.concatenate([widened(piece) for piece in pieces])


def _gates_note(job: Job, parts: list[Part]) -> None:
    without = sum(part.gates is None for part in parts)
    if 0 < without < len(parts):
        job.notes.append(f"warning: {without} of {len(parts)} parts have no gates, so the trace has none")


def _domains(parts: list[Part]) -> tuple[str, ...]:
    """The domain of every sequence, when every part knows those of its own."""
    if any(len(part.domains) < part.sequences for part in parts):
        return ()
    return tuple(domain for part in parts for domain in part.domains)


def _dummies(job: Job, columns: dict[str, Any], residency: dict[str, Array]) -> None:
    """Warns of leading identical tokens, which engines make while they profile their memory, or drops them."""
    ids = columns["expert_ids"]
    count = leading_identical(ids)
    if count < MOST_IDENTICAL_ROWS:
        return
    if not job.options.drop_identical_rows:
        job.notes.append(
            f"warning: the first {count} tokens have the same experts in every layer, like the dummies of a memory "
            "profiler (--drop-identical-rows leaves them out)"
        )
        return
    if count == len(ids):
        raise TraceError(f"{job.files[0]}: must hold other tokens than identical ones, got {count} identical")
    for name, column in columns.items():
        columns[name] = None if column is None else column[count:]
    kept = residency["token"] >= count if residency else None
    for name, column in list(residency.items()):
        residency[name] = column[kept] - count if name == "token" else column[kept]
    job.notes.append(f"note: the first {count} tokens, all with the same experts, were left out")


def leading_identical(ids: Array) -> int:
    """How many tokens, from the first on, have the experts of the first one in every layer; ids [T, L, K]."""
    other = np.flatnonzero((ids != ids[0]).any(axis=(1, 2)))
    return int(other[0]) if other.size else len(ids)


def _header(job: Job, name: str, ids: Array, domains: tuple[str, ...]) -> TraceHeader:
    options, facts = job.options, dict(job.facts)
    _, layers, top_k = ids.shape
    for field, found in (("layers", layers), ("top_k", top_k)):
        wanted = job.dimension(field)
        if wanted is not None and wanted != found:
            raise TraceError(f"{field} must be {found}, as {job.files[0]} has it, or be left out, got {wanted}")
    if domains:
        facts["domains"] = domains
    facts |= {key: value for key, value in asdict(options).items() if key in OVERRIDES and value is not None}
    known = _recognised(job, ids)
    if known is not None:
        facts |= {"model": known[0], "experts": known[1].experts}
        facts.setdefault("dtype", known[1].dtype)
    facts |= {"layers": layers, "top_k": top_k}
    facts["experts"] = facts.get("experts") or job.dimension("experts") or _experts_seen(job, ids)
    facts["expert_bytes"] = _expert_bytes(job, layers, known)
    facts.setdefault("model", name)
    facts["made_by"] = "; ".join(part for part in (facts.get("made_by"), _made_by(job, name)) if part)
    facts["software"] = facts.get("software", {}) | {"moetwin": _own_version()}
    return TraceHeader.of(facts)


OVERRIDES = ("model", "dtype", "licence")
"""Fields of the header in which the user's word counts more than the file's."""


def _recognised(job: Job, ids: Array) -> tuple[str, KnownModel] | None:
    """The model of the catalogue that was recorded, with its name: the one that is named, or the only one of the
    format's family, if it has the dimensions of the trace."""
    _, layers, top_k = ids.shape
    named, experts, least = job.options.model or job.facts.get("model"), job.dimension("experts"), _least_experts(ids)
    fitting = {
        name: one
        for name, one in job.catalogue.items()
        if (one.layers, one.top_k) == (layers, top_k) and (one.experts == experts if experts else one.experts >= least)
        if (name == named if named else job.family and name.startswith(job.family))
    }
    if len(fitting) != 1:
        return None
    (found,) = fitting.items()
    if not named:
        why = f"the one with {layers} layers and top-{top_k} that the format was made for"
        job.notes.append(f"note: model is {found[0]}, {why} (--model tells otherwise)")
    return found


def _least_experts(ids: Array) -> int:
    seen = ids[ids != NOT_ROUTED]
    return max(int(seen.max()) + 1 if seen.size else 1, int(ids.shape[2]))


def _experts_seen(job: Job, ids: Array) -> int:
    experts = _least_experts(ids)
    job.notes.append(f"note: experts is {experts}, as far as the ids tell (--experts tells more)")
    return experts


def _expert_bytes(job: Job, layers: int, known: tuple[str, KnownModel] | None) -> tuple[int, ...]:
    """Bytes of an expert by layer: as the user says, else as the files say, else the catalogue, else 1."""
    told: tuple[int, ...] | None = job.options.expert_bytes or job.facts.get("expert_bytes")
    if told is None and known is not None:
        name, model = known
        where = f"that of {name} in the catalogue, at {model.expert_bits:g} bits a weight"
        job.notes.append(f"note: expert_bytes is {model.expert_bytes}, {where} (--expert-bytes tells otherwise)")
        return (model.expert_bytes,) * layers
    if told is None:
        job.notes.append("note: expert_bytes is 1, so that bytes are counts of experts (--expert-bytes tells more)")
        return (1,) * layers
    if len(told) not in (1, layers):
        raise TraceError(f"expert_bytes must have one entry or {layers} entries, got {len(told)}")
    return told * layers if len(told) == 1 else told


def _made_by(job: Job, name: str) -> str:
    """The command, without the paths of the machine, and a digest that tells whether files are the same."""
    words = ["moetwin", "trace", "import", "--format", name]
    for field, value in asdict(job.options).items():
        words += _words(field, value)
    files = f"{len(job.files)} file{'' if len(job.files) == 1 else 's'}"
    return f"{shlex.join(words)} ({files}, sha256 of names and contents {digest_of(job.files)})"


def _words(field: str, value: Any) -> list[str]:
    option = "--" + field.replace("_", "-")
    if value is None or value is False:
        return []
    if value is True:
        return [option]
    return [option, ",".join(map(str, value)) if isinstance(value, tuple) else str(value)]


def _own_version() -> str:
    try:
        return version("moetwin")
    except PackageNotFoundError:
        return "not installed"
