"""``gpt-oss-json``: one JSON file a prompt, the routing of every generated token in ``router_data``.

``router_data[i]["token_N"]["layer_l"]`` is ``{"selected_experts": [...], "selected_probs": [...]}``; N counts the
tokens of the prompt, too. Only decode is recorded, at batch 1, and the probabilities are renormalised over the chosen
experts. The texts of the tokens are not ids of a vocabulary, so they are left aside: token ids are 0.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from traces.importers.base import Job, Part
from traces.importers.checks import as_gates, as_ids
from traces.importers.files import domain_of, read_json, root_of
from traces.schema import Array, Phase, TraceError


def read(job: Job) -> Iterator[Part]:
    """Yields one sequence a file; its domain is the file's folder. Raises :class:`TraceError`."""
    root = root_of(job.files)
    for file in job.files:
        content = read_json(file, job.advance)
        tokens = content.get("router_data") if isinstance(content, dict) else None
        if not isinstance(tokens, list) or not tokens:
            raise TraceError(f"{file}: must be an object with a list router_data, got {_shape(content)}")
        yield _sequence(job, file, tokens, domain_of(file, root))


def _shape(content: Any) -> str:
    if not isinstance(content, dict):
        return f"a {type(content).__name__}"
    return "an empty router_data" if content.get("router_data") == [] else f"the keys {', '.join(list(content)[:6])}"


def _sequence(job: Job, file: Path, tokens: list[Any], domain: str) -> Part:
    layers, top_k = _first_row(file, tokens[0])
    job.say("layers", len(layers), file)
    job.say("top_k", top_k, file)
    names, ids, probs = _flat(file, tokens, layers, top_k)
    shape = (len(names), len(layers), top_k)

    def place(token: int, layer: int) -> str:
        return f"{file}, {names[token]}, {layers[layer]}"

    return Part.one_sequence(
        as_ids(ids, shape, place, job.dimension("experts")),
        phase=Phase.DECODE,
        position=_positions(file, names),
        gates=as_gates(probs, shape, place),
        domains=(domain,),
    )


def _flat(file: Path, tokens: list[Any], layers: list[str], top_k: int) -> tuple[list[str], list[Any], list[Any]]:
    """The tokens' names, and their experts and probabilities as they follow one another in the file."""
    names: list[str] = []
    ids: list[Any] = []
    probs: list[Any] = []
    for number, row in enumerate(tokens):
        try:
            ((name, by_layer),) = row.items()
            if list(by_layer) != layers:
                raise TraceError(f"{file}, {name}: must have the layers {_ends(layers)} in order, got {_few(by_layer)}")
            names.append(name)
            for entry in by_layer.values():
                chosen, weights = entry["selected_experts"], entry["selected_probs"]
                if not len(chosen) == len(weights) == top_k:
                    raise TraceError(f"{file}, {name}: must have {top_k} experts and probabilities in every layer")
                ids += chosen
                probs += weights
        except TraceError:
            raise
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise _malformed(file, number) from error
    return names, ids, probs


def _first_row(file: Path, row: Any) -> tuple[list[str], int]:
    """The names of the layers, and the experts of a token."""
    try:
        ((_, by_layer),) = row.items()
        layers, top_k = list(by_layer), len(by_layer["layer_0"]["selected_experts"])
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise _malformed(file, 0) from error
    expected = [f"layer_{layer}" for layer in range(len(layers))]
    if layers != expected or not top_k:
        raise TraceError(f"{file}, row 0: must have the layers {_ends(expected)} in order, got {_few(by_layer)}")
    return layers, top_k


def _malformed(file: Path, row: int) -> TraceError:
    return TraceError(
        f'{file}, router_data row {row}: must be {{"token_N": {{"layer_l": {{"selected_experts": [...], '
        '"selected_probs": [...]}}}, got another shape'
    )


def _ends(layers: list[str]) -> str:
    return f"{layers[0]} to {layers[-1]}"


def _few(by_layer: dict[str, Any]) -> str:
    return f"{len(by_layer)}: {', '.join(list(by_layer)[:4])}, ..."


def _positions(file: Path, names: list[str]) -> Array:
    """The N of every ``token_N``, which counts up by one."""
    try:
        numbers = np.array([int(name.removeprefix("token_")) for name in names])
    except ValueError as error:
        wrong = next(name for name in names if not name.removeprefix("token_").isdecimal())
        raise TraceError(f"{file}: tokens must be named token_N, got {wrong!r}") from error
    jump = np.flatnonzero(np.diff(numbers) != 1)
    if jump.size:
        row = int(jump[0])
        raise TraceError(f"{file}, row {row + 1}: tokens must count up by one, got {names[row + 1]} after {names[row]}")
    return numbers
