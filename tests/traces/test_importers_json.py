"""The formats in JSON, gpt-oss-json and router-trace-v2: what is read, and each defect by its name and row."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.traces.importing import DECODE, PREFILL, expect, gpt_oss, router_trace, write
from traces.importers import Options, import_files
from traces.known import KnownModel

# gpt-oss-json


def test_gpt_oss_json(tmp_path: Path) -> None:
    write(tmp_path / "b" / "x.json", json.dumps(gpt_oss(3, 1, ids=((3, 2), (1, 0)))))
    write(tmp_path / "a" / "y.json.gz", json.dumps(gpt_oss()))
    trace = import_files("gpt-oss-json", [tmp_path]).trace
    assert trace.expert_ids.tolist() == [[[1, 0], [2, 3]], [[1, 0], [2, 3]], [[3, 2], [1, 0]]]
    assert trace.gates is not None
    assert trace.gates.dtype == np.float16
    assert trace.gates[0].tolist() == [[0.75, 0.25], [0.5, 0.5]]
    assert trace.position.tolist() == [7, 8, 3]
    assert trace.sequence.tolist() == [0, 0, 1]
    assert trace.step.tolist() == [0, 1, 2]
    assert trace.phase.tolist() == [DECODE] * 3
    assert trace.token_ids.tolist() == [0] * 3
    assert trace.header.domains == ("a", "b")
    assert (trace.header.layers, trace.header.experts, trace.header.top_k) == (2, 4, 2)


def change_token(change: Callable[[dict[str, Any]], Any]) -> str:
    """A recording whose second token was changed."""
    content = gpt_oss()
    content["router_data"][1] = json.loads(json.dumps(content["router_data"][1]))
    change(content["router_data"][1]["token_8"])
    return json.dumps(content)


@pytest.mark.parametrize(
    ("text", "rule"),
    [
        ("", "p.json: must hold a trace, got an empty file"),
        ('{"router_data": []}', "must be an object with a list router_data, got an empty router_data"),
        ('{"selections": []}', "must be an object with a list router_data, got the keys selections"),
        ("[1, 2]", "must be an object with a list router_data, got a list"),
        ("turn,phase,step", r"p.json, line 1, column 1: must be JSON"),
        (json.dumps(gpt_oss())[:-40], r"p.json, line 1, column \d+: must be complete JSON"),
        (json.dumps(gpt_oss(ids=((1, 9), (2, 3)))), "p.json, token_7, layer_0: expert ids must be from 0 to 3, got 9"),
        (json.dumps(gpt_oss(ids=((1, 0), (2, 2)))), "token_7, layer_1: expert ids must be distinct.* got 2 twice"),
        (json.dumps(gpt_oss(ids=((1, -1), (2, 3)))), "token_7, layer_0: expert ids must be from 0 to 3, got -1"),
        (json.dumps(gpt_oss(ids=((1, "0"), (2, 3)))), "token_7, layer_0: expert ids must be whole numbers.* got '0'"),
        (json.dumps(gpt_oss(ids=((1, 0.5), (2, 3)))), "token_7, layer_0: expert ids must be whole numbers.* got 0.5"),
        (json.dumps(gpt_oss(ids=((1, [0]), (2, 3)))), r"p.json, token_7, layer_0: expert ids must be .* got \[0\]"),
        (json.dumps(gpt_oss(ids=(([1], [0]), (2, 3)))), r"token_7, layer_0: expert ids must be whole .* got \[1\]"),
        (json.dumps(gpt_oss(ids=((1, 0), (2, True)))), "token_7, layer_1: expert ids must be whole .* got True"),
        (json.dumps(gpt_oss(ids=((1, 2**70), (2, 3)))), "token_7, layer_0: expert ids must be whole .* got 118059"),
        (json.dumps(gpt_oss(probs=((1, 0), (0.5, [1])))), r"token_7, layer_1: gates must be numbers, got \[1\]"),
        (json.dumps(gpt_oss(probs=((1, 0), (0.5, True)))), "token_7, layer_1: gates must be numbers, got True"),
        (json.dumps(gpt_oss(probs=((1, 0), (0.5, 10**400)))), r"token_7, layer_1: gates must be numbers, got 10{59}$"),
        (json.dumps(gpt_oss(probs=((1, 0), (float("nan"), 0)))), "token_7, layer_1: gates must be finite.* got nan"),
        (json.dumps(gpt_oss(probs=((1, -0.5), (1, 0)))), "token_7, layer_0: gates must be finite.* got -0.5"),
        (json.dumps(gpt_oss(probs=((1, "x"), (1, 0)))), "token_7, layer_0: gates must be numbers, got 'x'"),
        (change_token(lambda token: token.pop("layer_1")), "p.json, token_8: must have the layers layer_0 to layer_1"),
        (change_token(lambda token: token["layer_1"].pop("selected_probs")), "p.json, router_data row 1: must be"),
        (
            change_token(lambda token: token["layer_1"]["selected_experts"].pop()),
            "p.json, token_8: must have 2 experts and probabilities in every layer",
        ),
        (json.dumps({"router_data": [7]}), "p.json, router_data row 0: must be"),
        (
            json.dumps({"router_data": gpt_oss()["router_data"][:1] * 2}),
            "p.json, row 1: tokens must count up by one, got token_7 after token_7",
        ),
        (json.dumps(gpt_oss()).replace("token_8", "word"), "tokens must be named token_N, got 'word'"),
    ],
)
def test_a_malformed_gpt_oss_file_is_named(tmp_path: Path, text: str, rule: str) -> None:
    expect(rule, "gpt-oss-json", write(tmp_path / "p.json", text), experts=4)


def test_files_of_other_dimensions_are_refused(tmp_path: Path) -> None:
    write(tmp_path / "a.json", json.dumps(gpt_oss()))
    write(tmp_path / "b.json", json.dumps(gpt_oss(ids=((1, 0),), probs=((1, 0),))))
    expect(r"b.json: layers must be 2, as in .*a.json, got 1", "gpt-oss-json", tmp_path)


LAYERS, TOP_K = 3, 2
CATALOGUE = {
    "gpt-oss-3": KnownModel(LAYERS, 8, TOP_K, 700, 4.25, "bf16"),
    "gpt-oss-4": KnownModel(LAYERS + 1, 8, TOP_K, 800, 4.25, "bf16"),
    "other": KnownModel(LAYERS, 8, TOP_K, 900, 16.0, "fp16"),
}


@pytest.mark.parametrize(
    ("options", "model", "experts", "sizes", "notes"),
    [
        (
            Options(),
            "gpt-oss-3",
            8,
            700,
            ["model is gpt-oss-3, the one with 3 layers and top-2", "expert_bytes is 700"],
        ),
        (Options(expert_bytes=(5,)), "gpt-oss-3", 8, 5, ["model is gpt-oss-3"]),
        (Options(model="other"), "other", 8, 900, ["expert_bytes is 900, that of other in the catalogue, at 16 bits"]),
        (Options(model="other", experts=9), "other", 9, 1, ["expert_bytes is 1, so"]),
        (Options(model="gpt-oss-4"), "gpt-oss-4", 4, 1, ["experts is 4, as far", "expert_bytes is 1, so"]),
        (Options(model="mine"), "mine", 4, 1, ["experts is 4, as far", "expert_bytes is 1, so"]),
        (Options(experts=9), "gpt-oss-json", 9, 1, ["expert_bytes is 1, so"]),
    ],
)
def test_experts_and_their_bytes_are_those_of_the_catalogue(
    options: Options, model: str, experts: int, sizes: int, notes: list[str], tmp_path: Path
) -> None:
    file = write(tmp_path / "p.json", json.dumps(gpt_oss(ids=((1, 0), (2, 3), (0, 1)), probs=((1, 0),) * 3)))
    found = import_files("gpt-oss-json", [file], options, catalogue=CATALOGUE)
    header = found.trace.header
    assert (header.model, header.experts, header.expert_bytes) == (model, experts, (sizes,) * LAYERS)
    told = zip(found.notes, notes, strict=True)
    assert [note.startswith(f"note: {begin}") for note, begin in told] == [True] * len(notes)
    assert header.dtype == {"gpt-oss-3": "bf16", "other": "fp16" if experts == 8 else "float32"}.get(model, "float32")


def test_a_format_is_recognised_by_one_model_of_its_family_alone(tmp_path: Path) -> None:
    file = write(tmp_path / "p.json", json.dumps(gpt_oss(ids=((1, 0), (2, 9), (0, 1)), probs=((1, 0),) * 3)))
    assert import_files("gpt-oss-json", [file], catalogue=CATALOGUE).trace.header.experts == 10  # more than either has
    twice = CATALOGUE | {"gpt-oss-3b": KnownModel(LAYERS, 16, TOP_K, 700, 4.25, "bf16")}
    assert import_files("gpt-oss-json", [file], catalogue=twice).trace.header.model == "gpt-oss-3b"
    small = write(tmp_path / "q.json", json.dumps(gpt_oss(ids=((1, 0), (2, 3), (0, 1)), probs=((1, 0),) * 3)))
    assert import_files("gpt-oss-json", [small], catalogue=twice).trace.header.model == "gpt-oss-json"  # which one?


# router-trace-v2


def test_router_trace_v2(tmp_path: Path) -> None:
    trace = import_files("router-trace-v2", [write(tmp_path / "a.json", router_trace())]).trace
    assert trace.expert_ids.tolist() == [[[1], [0]], [[1], [2]], [[2], [2]]]
    assert trace.gates is None
    assert trace.phase.tolist() == [PREFILL] * 3
    assert trace.step.tolist() == [0, 1, 2]
    header = trace.header
    assert (header.model, header.revision, header.prompts_digest) == ("m", "r", "abc")
    assert header.software["foo"] == "1.2"
    assert not header.synthetic


@pytest.mark.parametrize(
    ("changed", "rule"),
    [
        ({"version": 1}, "a.json: version must be 2, got 1"),
        ({"topK": 0}, "a.json: topK must be a whole number from 1, got 0"),
        ({"layers": 3}, "a.json, token 0: must have a list of 3 layers, got 2"),
        ({"tokens": 4}, "a.json: selections must have the 4 tokens, got 3"),
        ({"selections": [[[1], [3]]], "tokens": 1}, "token 0, layer 1: expert ids must be from 0 to 2, got 3"),
        ({"selections": [[[1], [1, 2]]], "tokens": 1}, "token 0, layer 1: must have a list of 1 experts, got 2"),
        ({"selections": []}, "selections must be a list with a token"),
    ],
)
def test_a_malformed_router_trace_is_named(tmp_path: Path, changed: dict[str, Any], rule: str) -> None:
    expect(rule, "router-trace-v2", write(tmp_path / "a.json", router_trace(**changed)))


def test_what_the_file_says_cannot_be_said_otherwise(tmp_path: Path) -> None:
    file = write(tmp_path / "a.json", router_trace())
    expect("experts must be 3, as .*a.json has it, or be left out, got 4", "router-trace-v2", file, experts=4)
    assert import_files("router-trace-v2", [file], Options(experts=3, layers=2)).trace.header.experts == 3
