"""What a validation runs: a model on this machine, routing that is judged, and routing that fitted systems learn from.

The two routings are different recordings, and neither is what calibration runs: that is synthetic, from other seeds.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from real.models.load import LoadedModel, dimensions, load, load_spec
from real.models.names import SMALL_NAME
from sim.presets import Preset
from sim.spec import ModelSpec, catalogue
from sim.systems import KINDS
from sim.target import retarget
from traces.edit import concat, slice_trace
from traces.errors import InputError
from traces.fit import fit
from traces.fitted import generate
from traces.schema import Phase, Trace
from traces.synthetic import Shape, Sizes, zipf

WIDE = "wide"
"""The model of 12.6 MB experts with random weights that stands in where no GPU makes larger ones bearable."""

DEFAULT_MODELS = {"cpu": (WIDE,), "cuda": ("olmoe-1b-7b", "deepseek-v2-lite", "qwen3-30b-a3b")}
DEFAULT_DTYPES = {"cpu": "fp32", "cuda": "bf16"}
LEARNED_SEQUENCES, LEARNED_TOKENS, PROMPT_TOKENS = 8, 64, 48
"""Sizes of routing that is generated because no recording has a model's dimensions."""
TOLD_TOKENS = 16


@dataclass(frozen=True)
class Subject:
    """One model to validate on. ``judged`` is measured and judged, ``learned`` is what fitted systems learn from."""

    name: str
    spec: ModelSpec
    judged: Trace
    learned: Trace
    load: Callable[[], LoadedModel]


def subject(
    name: str, dtype: str, recorded: Trace, learned: Trace, *, sequences: int, tokens: int, seed: int = 0
) -> Subject:
    """The model ``name`` with the first ``tokens`` decode tokens of ``sequences`` sequences of ``recorded``.

    ``name`` is :data:`WIDE`, ``moetwin-small``, a checkpoint's folder, or a catalogue name or TOML file, which gets
    random weights. Where the recordings have other dimensions than the model, routing like theirs is generated. Raises
    :class:`InputError` for a model that is unknown, cannot be had in ``dtype``, or is an encoder-decoder.
    """
    if name == WIDE:
        spec = wide_model(recorded).in_dtype(dtype)
        loading = lambda: load_spec(spec, dtype=dtype, seed=seed)  # noqa: E731 - one of two of a kind
    else:
        invented = name != SMALL_NAME and (name in catalogue.model_names() or name.endswith(".toml"))
        spec = dimensions(name, dtype=dtype, random_weights=invented)
        loading = lambda: load(name, dtype=dtype, random_weights=invented, seed=seed)  # noqa: E731
    if spec.expert_matrices != 3:
        raise InputError(f"model must be a decoder to be validated on, got the encoder-decoder {name}")
    fitted = _routing(learned, spec, (LEARNED_SEQUENCES, LEARNED_TOKENS, LEARNED_TOKENS), seed + 1)
    judged = _routing(recorded, spec, (sequences, PROMPT_TOKENS, tokens), seed)
    judged = beginnings(judged, sequences, tokens, besides=fitted)
    return Subject(spec.name, spec, judged, fitted, loading)


def wide_model(trace: Trace) -> ModelSpec:
    """A model of the trace's shape whose experts take 12.6 MB each in fp32."""
    header = trace.header
    return ModelSpec(
        name=f"random-{header.layers}x{header.experts}-12.6MB",
        source="moetwin validate",
        layers=header.layers,
        moe_layers=header.layers,
        experts=header.experts,
        top_k=header.top_k,
        hidden=1024,
        expert_width=1024,
        heads=16,
        kv_heads=4,
        head_dim=64,
        vocab=4096,
        tied_embeddings=True,
        dtype="fp32",
        expert_bits=32,
    )


def beginnings(trace: Trace, sequences: int, tokens: int, *, besides: Trace) -> Trace:
    """Prompts and the first ``tokens`` decode tokens of ``sequences`` sequences, one of each domain while there is one.

    Sequences whose prompt ``besides`` has too are passed over; the others keep their order. Raises :class:`InputError`
    when the trace has fewer, or one without a prompt.
    """
    known = {_prompt(besides, sequence) for sequence in np.unique(besides.sequence).tolist()}
    domains = trace.header.domains or ("",) * int(trace.sequence.max() + 1)
    every = [one for one in np.unique(trace.sequence).tolist() if _prompt(trace, one) not in known]
    if len(every) < sequences:
        raise InputError(f"trace must have {sequences} sequences that calibration has not, got {len(every)}")
    first = {domains[one]: one for one in reversed(every)}.values()
    chosen = sorted([*sorted(first), *(one for one in every if one not in first)][:sequences])
    parts = []
    for one in chosen:
        prompt = int(((trace.sequence == one) & (trace.phase == Phase.PREFILL)).sum())
        if not prompt:
            raise InputError(f"trace must have a prompt in every sequence that is run, got none in {one}")
        parts.append(slice_trace(trace, sequences=str(one), tokens=prompt + tokens))
    return concat(parts).trace if len(parts) > 1 else parts[0]


def _prompt(trace: Trace, sequence: int) -> tuple[bytes, bytes]:
    """What tells a prompt from others, however long it was recorded: its first tokens, and the routing of the first."""
    rows = trace.sequence == sequence
    return trace.token_ids[rows][:TOLD_TOKENS].tobytes(), trace.expert_ids[rows][:1].tobytes()


def synthetic_routing(spec: ModelSpec, seed: int, **sizes: Any) -> Trace:
    """Routing of independent tokens at the dimensions of ``spec``; ``sizes`` are further fields of
    :class:`traces.synthetic.Sizes`."""
    shape = Sizes(
        layers=spec.moe_layers, experts=spec.experts, top_k=spec.top_k, expert_bytes=spec.expert_bytes, **sizes
    )
    return zipf(np.random.default_rng(seed), shape)


def _routing(trace: Trace, spec: ModelSpec, lengths: tuple[int, int, int], seed: int) -> Trace:
    """``trace`` on the model ``spec``, or, where its dimensions are others, routing like it that has them."""
    header = trace.header
    if (header.layers, header.experts, header.top_k) == (spec.moe_layers, spec.experts, spec.top_k):
        return retarget(trace, spec)
    law = fit(trace, np.random.default_rng(seed))
    sizes = dict(zip(("sequences", "prompt_tokens", "new_tokens"), lengths, strict=True))
    sizes |= {"layers": spec.moe_layers, "experts": spec.experts, "top_k": spec.top_k}
    made = generate(law, seed, Shape(**sizes, expert_bytes=spec.expert_bytes))
    return replace(made, header=made.header.model_copy(update={"model": spec.name}))


def check_different(field: str, names: Iterable[str]) -> None:
    """Raises :class:`InputError` for a name that comes twice, whatever was written to ask for it."""
    for name, count in Counter(names).items():
        if count > 1:
            raise InputError(f"{field} must have different names, got {name} {count} times")


def model_content(given: str, one: Subject) -> str:
    """The model called ``given`` in one line, with a digest of its dimensions and of the routing it is run on."""
    return f"model {given}: {_digest((one.spec.model_dump(mode='json'), one.judged.digest, one.learned.digest))}"


def system_content(given: str, chosen: Preset) -> str:
    """The system called ``given`` in one line, with a digest of it and of the files of Python with its policies."""
    policies = [str(getattr(chosen.system, kind)) for kind in KINDS]
    files = [Path(text.rpartition(":")[0]) for text in policies if ".py:" in text]
    code = [hashlib.sha256(path.read_bytes()).hexdigest() for path in files]
    return f"system {given}: {_digest((chosen.model_dump(mode='json'), code))}"


def _digest(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:12]
