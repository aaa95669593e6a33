"""The formats of other tools: each in a small hand-written file of its shape, and each defect by its name and row."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from traces import NOT_ROUTED, InputError, Phase, TraceError
from traces.importers import IMPORTERS, Imported, Options, import_files
from traces.importers.assemble import MOST_IDENTICAL_ROWS
from traces.stats import neighbour_overlap
from traces.workload import one_at_a_time

PREFILL, DECODE = int(Phase.PREFILL), int(Phase.DECODE)


def write(path: Path, text: str) -> Path:
    """Writes ``text``, gzipped when the name says so, and makes the folders on the way."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(gzip.compress(text.encode()) if path.suffix == ".gz" else text.encode())
    return path


def expect(rule: str, name: str, *inputs: Path | str, **options: Any) -> None:
    """Importing gives one line that matches ``rule``."""
    with pytest.raises(InputError, match=rule) as raised:
        import_files(name, inputs, Options(**options))
    assert "\n" not in str(raised.value)


# gpt-oss-json


def gpt_oss(
    first: int = 7, tokens: int = 2, ids: Any = ((1, 0), (2, 3)), probs: Any = ((0.75, 0.25), (0.5, 0.5))
) -> dict[str, Any]:
    layers = {
        f"layer_{layer}": {"selected_experts": list(ids[layer]), "selected_probs": list(probs[layer])}
        for layer in range(len(ids))
    }
    rows = [{f"token_{first + token}": layers} for token in range(tokens)]
    return {"category": "c", "generated_only": ["a", "b", "c"], "router_data": rows}


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


# esft


def esft(folder: Path, lines: dict[int, list[str]]) -> Path:
    for layer, texts in lines.items():
        write(folder / f"expert_weights_{layer}.txt.gz", "".join(f"{text}\n" for text in texts))
    return folder


ESFT = {
    2: ["3\t2\t1\t0\t\t0.5\t0.25\t0.5\t0.125", "0\t1\t\t0.25\t0.5"],
    10: ["0\t3\t1\t2\t\t0.5\t0.5\t0.5\t0.5", "2\t3\t\t0.5\t0.5"],
    3: ["1\t0\t2\t3\t\t0.5\t0.5\t0.5\t0.5", "3\t0\t\t0.5\t0.5"],
}


def without(lines: dict[int, list[str]], *layers: int) -> dict[int, list[str]]:
    return {layer: texts for layer, texts in lines.items() if layer not in layers}


def test_esft(tmp_path: Path) -> None:
    lines = without(ESFT, 10) | {4: ESFT[10]}
    trace = import_files("esft", [esft(tmp_path / "law", lines)], Options(top_k=2)).trace
    assert trace.expert_ids.tolist() == [[[3, 2], [1, 0], [0, 3]], [[1, 0], [2, 3], [1, 2]], [[0, 1], [3, 0], [2, 3]]]
    assert trace.gates is not None
    assert trace.gates[:, 0].tolist() == [[0.5, 0.25], [0.5, 0.125], [0.25, 0.5]]
    assert trace.phase.tolist() == [PREFILL] * 3
    assert trace.sequence.tolist() == [0, 0, 1]
    assert trace.position.tolist() == [0, 1, 0]
    assert trace.step.tolist() == [0, 1, 2], "one token a step"
    assert trace.header.domains == ("law", "law")


def test_layers_are_sorted_as_numbers(tmp_path: Path) -> None:
    lines = {9: ESFT[2], 10: ESFT[3], 11: ESFT[10]}
    trace = import_files("esft", [esft(tmp_path, lines)], Options(top_k=2)).trace
    assert trace.expert_ids[2].tolist() == [[0, 1], [3, 0], [2, 3]]


def test_a_prompt_may_be_one_batch(tmp_path: Path) -> None:
    folder = esft(tmp_path / "law", without(ESFT, 10))
    trace = import_files("esft", [folder], Options(top_k=2, prefill_as_batch=True)).trace
    assert trace.step.tolist() == [0, 0, 1]
    assert [len(step.rows) for step in one_at_a_time(trace)] == [2, 1]


def test_folders_of_esft_are_domains(tmp_path: Path) -> None:
    for name in ("law", "intent"):
        esft(tmp_path / name, without(ESFT, 10))
    imported = import_files("esft", [str(tmp_path / "*"), tmp_path / "law"], Options(top_k=2))
    assert imported.trace.header.domains == ("intent", "intent", "law", "law")
    assert len(imported.trace) == 6


@pytest.mark.parametrize(
    ("lines", "rule"),
    [
        (ESFT, "files must number its layers without a gap, each once, got 10 after 3"),
        ({1: ESFT[2], 2: ESFT[3][:1]}, "expert_weights_2.txt.gz: must have as many lines as .* got 1"),
        ({1: ESFT[2], 2: ["1\t0\t\t0.5\t0.5"] * 2}, "_2.txt.gz, line 1: must have 2 tokens, as .*_1.txt.gz, got 1"),
        ({1: ["1\t0\t2\t3"]}, "_1.txt.gz, line 1: must be ids, two tabs, and scores"),
        ({1: ["1\t0\t2\t3\t\t0.5\t0.5"]}, "line 1: must have a score for each of 4 ids, got 2"),
        ({1: ["1\t0\t2\t\t0.5\t0.5\t0.5"]}, r"line 1: must have a multiple of 2 ids \(top_k\), got 3"),
        ({1: ["1\t0\t\t0.5\t0.5", "1\tx\t\t0.5\t0.5"]}, "line 2: must hold tab-separated numbers"),
        ({1: ["1\t0\t2\t2\t\t0.5\t0.5\t0.5\t0.5"]}, "line 1, token 1: expert ids must be distinct"),
        ({1: ["1\t4\t\t0.5\t0.5"]}, "line 1, token 0: expert ids must be from 0 to 3, got 4"),
        ({1: ["1\t0\t\t0.5\tnan"]}, "line 1, token 0: gates must be finite and at least 0, got nan"),
        ({1: ["1\t0\t\t0.5\t-1"]}, "line 1, token 0: gates must be finite and at least 0, got -1"),
        ({1: []}, "_1.txt.gz: must hold a trace, got an empty file"),
    ],
)
def test_a_malformed_esft_folder_is_named(tmp_path: Path, lines: dict[int, list[str]], rule: str) -> None:
    expect(rule, "esft", esft(tmp_path / "law", lines), top_k=2, experts=4)


def test_a_layer_in_two_files_is_refused(tmp_path: Path) -> None:
    folder = esft(tmp_path, without(ESFT, 10))
    write(folder / "expert_weights_3.txt", "1\t0\t\t0.5\t0.5\n")
    expect("files must number its layers without a gap, each once, got 3 after 3", "esft", folder, top_k=2)


def test_a_file_without_its_layer_is_named(tmp_path: Path) -> None:
    expect("must have the number of its layer in its name, got x.txt", "esft", write(tmp_path / "x.txt", "1\t\t0.5"))


# router-trace-v2


def router_trace(**changed: Any) -> str:
    source = {
        "kind": "captured",
        "model": {"id": "m", "revision": "r"},
        "software": {"fooVersion": "1.2"},
        "workload": {"sha256": "abc"},
    }
    selections = [[[1], [0]], [[1], [2]], [[2], [2]]]
    sizes = {"version": 2, "tokens": 3, "layers": 2, "expertsPerLayer": 3, "topK": 1}
    return json.dumps(sizes | {"selections": selections, "source": source} | changed)


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


# route-csv

ROUTE = """\
# route_trace v1
# model=/home/someone/m.gguf arch=x n_layer=3 n_expert=4 n_expert_used=2
# layer=0 expert_bytes=0 dense_bytes=5
# layer=1 expert_bytes=100 dense_bytes=5
# layer=2 expert_bytes=300 dense_bytes=5
turn,phase,step,layer,slot,expert,weight,residency,expert_bytes,dropped
0,0,0,1,0,3,0.75,0,100,0
0,0,0,1,1,1,0.25,0,100,0
0,0,1,1,0,2,0.5,0,100,0
0,0,1,1,1,3,0.5,0,0,0
0,0,1,2,0,0,0.5,0,300,0
0,0,1,2,1,1,0.5,1,0,0
0,1,2,1,0,1,0.5,1,0,0
0,1,2,1,1,0,0.5,0,100,0
0,1,2,2,0,3,0.5,0,300,0
0,1,2,2,1,1,0.5,2,0,0
1,1,9,1,0,1,0.5,1,0,0
1,1,9,1,1,2,0.5,0,100,0
1,1,9,2,0,3,0.5,0,300,0
1,1,9,2,1,0,0.5,2,0,0
# summary tokens=4
"""
N = NOT_ROUTED


def route(path: Path, *changes: tuple[str, str]) -> Path:
    text = ROUTE
    for old, new in changes:
        assert old in text
        text = text.replace(old, new)
    return write(path / "run.csv", text)


def test_route_csv(tmp_path: Path) -> None:
    trace = import_files("route-csv", [route(tmp_path)]).trace
    assert trace.expert_ids.tolist() == [[[3, 1], [N, N]], [[2, 3], [0, 1]], [[1, 0], [3, 1]], [[1, 2], [3, 0]]]
    assert trace.gates is not None
    assert trace.gates[0].tolist() == [[0.75, 0.25], [0, 0]]
    assert trace.sequence.tolist() == [0, 0, 0, 1]
    assert trace.position.tolist() == [0, 1, 2, 9]
    assert trace.phase.tolist() == [PREFILL, PREFILL, DECODE, DECODE]
    assert trace.step.tolist() == [0, 0, 1, 2], "a prompt is one batch"
    assert trace.header.expert_bytes == (100, 300)
    assert trace.header.experts == 4
    assert trace.header.model == "m.gguf", "without the folders of the machine"


def test_route_csv_keeps_the_residency(tmp_path: Path) -> None:
    imported = import_files("route-csv", [route(tmp_path)])
    table = imported.residency
    assert list(table) == ["token", "sequence", "position", "layer", "rank", "expert", "residency", "expert_bytes"]
    assert table["residency"].tolist() == [0, 0, 0, 0, 0, 1, 1, 0, 0, 2, 1, 0, 0, 2]
    assert table["expert_bytes"].tolist() == [100, 100, 100, 0, 300, 0, 0, 100, 300, 0, 0, 100, 300, 0]
    place = (table["token"], table["layer"], table["rank"])
    assert imported.trace.expert_ids[place].tolist() == table["expert"].tolist()
    assert imported.trace.sequence[table["token"]].tolist() == table["sequence"].tolist()


def test_rows_of_a_second_file_follow_in_the_residency(tmp_path: Path) -> None:
    route(tmp_path / "a")
    route(tmp_path / "b")
    imported = import_files("route-csv", [tmp_path])
    assert imported.residency["token"].tolist()[14:] == [4 + token for token in imported.residency["token"][:14]]
    assert imported.trace.sequence.tolist() == [0, 0, 0, 1, 2, 2, 2, 3]
    assert imported.trace.step.tolist() == [0, 0, 1, 2, 3, 3, 4, 5]


def test_weights_that_nobody_knows_are_no_gates(tmp_path: Path) -> None:
    rows = [row.split(",") for row in ROUTE.splitlines()]
    text = "\n".join(",".join([*row[:6], "nan", *row[7:]] if row[0].isdecimal() else row) for row in rows)
    imported = import_files("route-csv", [write(tmp_path / "run.csv", text)])
    assert imported.trace.gates is None
    assert "note: run.csv has no weights, so the trace has no gates" in imported.notes


@pytest.mark.parametrize(
    ("changes", "rule"),
    [
        ([("0,1,2,1,1,0,0.5,0,100,0\n", "")], "run.csv: must have 2 rows for turn 0, step 2, layer 1, got 1"),
        (
            [("0,1,2,2,0,3,0.5,0,300,0\n0,1,2,2,1,1,0.5,2,0,0\n", "")],
            "run.csv: must have 2 rows for turn 0, step 2, layer 2, got 0",
        ),
        (
            [("0,0,1,2,0,0,0.5,0,300,0\n0,0,1,2,1,1,0.5,1,0,0\n", "")],
            "run.csv: must have 2 rows for turn 0, step 1, layer 2, got 0",
        ),
        ([("0,1,2,1,1,0,", "0,1,2,1,1,7,")], "run.csv, line 14: expert ids must be from 0 to 3, got 7"),
        ([("0,1,2,1,1,0,", "0,1,2,1,1,1,")], "run.csv, line 13: expert ids must be distinct .* got 1 twice"),
        ([("0,1,2,1,1,0,", "0,1,2,1,0,0,")], "run.csv, line 14: must be the only row of its turn, step, layer"),
        ([("0,1,2,1,1,0,", "0,1,2,1,2,0,")], "run.csv, line 14: slot must be from 0 to 1, got 2"),
        ([("0,1,2,1,1,0,", "0,0,2,1,1,0,")], "run.csv, line 14: phase must be that of the step's other rows"),
        ([("0,1,2,1,1,0,", "0,1,2,1,1,x,")], "run.csv, line 14: expert must be a whole number from 0 .* got x"),
        ([("0,1,2,1,1,0,", "0,1,-2,1,1,0,")], "run.csv, line 14: step must be a whole number from 0 .* got -2"),
        ([("0,1,2,1,1,0,0.5", "0,1,2,1,1,0,")], "run.csv, line 14: gates must be finite and at least 0, got nan"),
        ([("0,1,2,1,1,0,0.5", "0,1,2,1,1,0,-1")], "run.csv, line 14: gates must be finite and at least 0, got -1"),
        ([("0,1,2,1,1,0,0.5", "0,1,2,1,1,0,half")], "run.csv, line 14: weight must be a number or nan, got half"),
        ([("0,1,2,1,1,0,0.5,0,100,0", "0,1,2,1,1,0")], "run.csv, line 14: residency must be a whole number"),
        ([("0,1,2,1,1,0,0.5,0,100,0", "0,1,2,1,1,0,0.5,0,100,0,9")], "run.csv: must be rows of the same fields"),
        ([("0,1,2,", "0,1,4,")], "run.csv, line 13: step must count up by one within a turn, got 4 after 1"),
        (
            [("slot", "place")],
            "run.csv: must have the columns turn,.* got 'turn,phase,step,layer,place,.*' without slot",
        ),
    ],
)
def test_a_malformed_route_file_is_named(tmp_path: Path, changes: list[tuple[str, str]], rule: str) -> None:
    expect(rule, "route-csv", route(tmp_path, *changes))


@pytest.mark.parametrize(
    ("text", "rule"),
    [
        ("", "must have the columns turn,.* got an empty file"),
        ("# route_trace v1\n", "must have the columns turn,.* got an empty file"),
        ("turn,phase,step,layer,slot,expert,weight,residency,expert_bytes\n", "must have a row below"),
    ],
)
def test_an_empty_route_file_is_named(tmp_path: Path, text: str, rule: str) -> None:
    expect(f"run.csv: {rule}", "route-csv", write(tmp_path / "run.csv", text))


# layer-csv

LAYER = """\
Layer ID,Batch Number,Token,Activated Expert IDs
1,0,"Hello, ","[3, 1]"
1,0,you,"[0, 2]"
1,1,.,"[2, 1]"
2,0,"Hello, ","[1, 0]"
2,0,you,"[2, 3]"
2,1,.,"[0, 3]"
"""


def test_layer_csv(tmp_path: Path) -> None:
    trace = import_files("layer-csv", [write(tmp_path / "d" / "p.csv", LAYER)]).trace
    assert trace.expert_ids.tolist() == [[[3, 1], [1, 0]], [[0, 2], [2, 3]], [[2, 1], [0, 3]]]
    assert trace.phase.tolist() == [PREFILL, PREFILL, DECODE]
    assert trace.step.tolist() == [0, 1, 2]
    assert trace.header.domains == ("d",)
    assert trace.gates is None


def test_layer_csv_may_keep_its_batches(tmp_path: Path) -> None:
    file = write(tmp_path / "p.csv", LAYER)
    assert import_files("layer-csv", [file], Options(prefill_as_batch=True)).trace.step.tolist() == [0, 0, 1]


@pytest.mark.parametrize(
    ("old", "new", "rule"),
    [
        ('2,1,.,"[0, 3]"\n', "", "p.csv: layer 2 must have 3 rows, as the first layer, got 2"),
        ("2,0,you", "2,0,me", "p.csv, line 6: must be batch 0, token 'you' as line 3, got batch 0, token 'me'"),
        ("[2, 3]", "[2, 4]", "p.csv, line 6: expert ids must be from 0 to 3, got 4"),
        ("[2, 3]", "[2, 2]", "p.csv, line 6: expert ids must be distinct"),
        ("[2, 3]", "[2]", "p.csv, line 6: must have 2 expert ids, got 1"),
        ("[2, 3]", "[2, x]", "p.csv, line 6: must be layer,batch,token"),
        ('2,1,.,"[0, 3]"\n', "2,1", 'p.csv, line 7: must be layer,batch,token,"'),
        ('2,1,.,"[0, 3]"\n', '2,1,.,"[0, 3]', 'p.csv, line 7: must be layer,batch,token,"'),
        ("2,", "3,", "p.csv must number its layers without a gap"),
        ("Batch Number", "Batch", "p.csv, line 1: must be Layer ID,Batch Number,Token,Activated Expert IDs, got Layer"),
    ],
)
def test_a_malformed_layer_file_is_named(tmp_path: Path, old: str, new: str, rule: str) -> None:
    assert old in LAYER
    expect(rule, "layer-csv", write(tmp_path / "p.csv", LAYER.replace(old, new)), experts=4)


# logits-safetensors


def save(path: Path, values: Any, name: str = "c4", dtype: str = "F32") -> Path:
    """A safetensors file, byte by byte: its layout as JSON after its length, then one tensor."""
    array = np.array(values, dtype=np.float16 if dtype == "F16" else np.float32)
    raw = (array.view(np.uint32) >> 16).astype(np.uint16).tobytes() if dtype == "BF16" else array.tobytes()
    layout = json.dumps({name: {"dtype": dtype, "shape": array.shape, "data_offsets": [0, len(raw)]}}).encode()
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(len(layout).to_bytes(8, "little") + layout + raw)
    return path


def logits(folder: Path, dtype: str = "F32") -> Path:
    """Two layers, one sequence of two tokens, three experts; in the second token of layer 1 two experts are equal."""
    save(folder / "router_9.safetensors", [[[2, 1, 0], [0, 2, 1]]], dtype=dtype)
    save(folder / "router_10.safetensors", [[[0, 1, 2], [1, 0, 1]]], dtype=dtype)
    return folder


@pytest.mark.parametrize("dtype", ["F32", "F16", "BF16"])
def test_logits_safetensors(tmp_path: Path, dtype: str) -> None:
    trace = import_files("logits-safetensors", [logits(tmp_path, dtype)], Options(top_k=2)).trace
    assert trace.expert_ids.tolist() == [[[0, 1], [2, 1]], [[1, 2], [0, 2]]]
    softmax = np.exp([2, 1, 0]) / np.exp([2, 1, 0]).sum()
    assert trace.scores is not None
    assert trace.gates is not None
    np.testing.assert_allclose(trace.scores[0, 0], softmax, atol=1e-3)
    np.testing.assert_allclose(trace.gates[0, 0], softmax[:2], atol=1e-3)
    assert trace.header.domains == ("c4",)
    assert trace.header.experts == 3
    assert trace.phase.tolist() == [PREFILL] * 2
    assert trace.step.tolist() == [0, 1]


def test_malformed_logits_are_named(tmp_path: Path) -> None:
    folder, name = logits(tmp_path), "logits-safetensors"
    expect("top_k must be given for logits-safetensors", name, folder)
    expect(r"top_k must be at most 3, as .*router_9.safetensors has experts, got 4", name, folder, top_k=4)
    file = folder / "router_10.safetensors"
    save(file, [[[0, 1, float("nan")], [1, 0, 1]]])
    expect("router_10.safetensors, c4, sequence 0, token 0: logits must be finite, got nan", name, folder, top_k=1)
    save(file, np.zeros((1, 3, 3)))
    expect(r"router_10.*, c4: must have shape \[1, 2, 3\], as .*router_9.*, got \[1, 3, 3\]", name, folder, top_k=1)
    save(file, np.zeros((1, 2, 3)), name="c5")
    expect(r"must have the datasets of .*router_9.safetensors \(c4\), got c5", name, folder, top_k=1)
    save(file, np.zeros((2, 3)))
    expect(r"must be floats of \[sequences, tokens, experts\], got F32 \[2, 3\]", name, folder, top_k=1)
    file.write_bytes(file.read_bytes()[:-1])
    expect("router_10.safetensors: must be a complete safetensors file", name, folder, top_k=1)


# all formats


def examples(folder: Path) -> dict[str, tuple[Path, Options]]:
    """A sound import of every format."""
    generic = "sequence,position,layer,expert_ids\n0,0,0,1\n"
    two = Options(top_k=2)
    return {
        "gpt-oss-json": (write(folder / "g" / "a.json", json.dumps(gpt_oss())), Options()),
        "esft": (esft(folder / "e", without(ESFT, 10)), two),
        "router-trace-v2": (write(folder / "r" / "router-trace.json", router_trace()), Options()),
        "route-csv": (route(folder / "o"), Options()),
        "layer-csv": (write(folder / "l" / "p.csv", LAYER), Options()),
        "logits-safetensors": (logits(folder / "s"), two),
        "csv": (write(folder / "c" / "a.csv", generic), Options()),
        "jsonl": (write(folder / "j" / "a.jsonl", json.dumps({"sequence": 0, "position": 0, "layer": 0} | IDS)), two),
    }


IDS = {"expert_ids": [1, 0]}
TEXTS = sorted(set(IMPORTERS) - {"logits-safetensors"})


def a_file(path: Path) -> Path:
    return path if path.is_file() else sorted(path.iterdir())[0]


@pytest.mark.parametrize("name", sorted(IMPORTERS))
def test_every_format_writes_down_where_it_came_from(tmp_path: Path, name: str) -> None:
    path, options = examples(tmp_path)[name]
    told = Options(top_k=options.top_k, model="M", dtype="bfloat16", licence="MIT", expert_bytes=(7,))
    seen: list[int] = []
    header = import_files(name, [path], told, advance=seen.append).trace.header
    assert (header.model, header.dtype, header.licence, header.expert_bytes) == ("M", "bfloat16", "MIT", (7,) * 2) or (
        header.layers == 1 and header.expert_bytes == (7,)
    )
    assert f"--format {name}" in header.made_by
    assert "sha256 of names and contents" in header.made_by
    assert str(tmp_path) not in header.model_dump_json()
    assert "moetwin" in header.software
    assert sum(seen) > 0
    again = import_files(name, [path], options).trace
    assert again.digest == import_files(name, [path], options).trace.digest


@pytest.mark.parametrize("name", TEXTS)
def test_a_truncated_archive_is_named(tmp_path: Path, name: str) -> None:
    path, options = examples(tmp_path)[name]
    file = a_file(path)
    content = file.read_bytes()
    packed = content if file.suffix == ".gz" else gzip.compress(content)
    cut = file if file.suffix == ".gz" else file.with_name(f"{file.name}.gz")
    cut.write_bytes(packed[: len(packed) - 9])
    target = cut.parent if name == "esft" else cut
    with pytest.raises(TraceError, match=rf"{cut.name}: must be a complete gzip file, got a truncated one"):
        import_files(name, [target], options)


@pytest.mark.parametrize("name", TEXTS)
@pytest.mark.parametrize("content", [b"", b"\xff\xfe\x00\x01\x02", b"hello\nworld\n"])
def test_a_file_of_another_kind_is_named(tmp_path: Path, name: str, content: bytes) -> None:
    path, options = examples(tmp_path)[name]
    file = a_file(path)
    file.write_bytes(content)
    with pytest.raises(TraceError, match=str(file.name)) as raised:
        import_files(name, [path], options)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("name", sorted(IMPORTERS))
def test_a_folder_without_its_files_is_named(tmp_path: Path, name: str) -> None:
    (tmp_path / "empty").mkdir()
    expect("files must be named .* in a folder, got .*empty, which has none", name, tmp_path / "empty")


@pytest.mark.parametrize("name", sorted(IMPORTERS))
def test_a_prompt_in_one_batch_is_for_formats_that_do_not_say(tmp_path: Path, name: str) -> None:
    path, options = examples(tmp_path)[name]
    together = Options(top_k=options.top_k, prefill_as_batch=True)
    if IMPORTERS[name].prompts_only:
        steps = import_files(name, [path], together).trace.step
        assert len(set(steps.tolist())) < len(import_files(name, [path], options).trace)
    else:
        with pytest.raises(InputError, match="prefill_as_batch must be left out for"):
            import_files(name, [path], together)


def test_unknown_formats_and_files_are_named(tmp_path: Path) -> None:
    expect(r"format must be a known name, got 'gptoss-json' \(did you mean gpt-oss-json", "gptoss-json", tmp_path)
    expect("files must exist, got .*none.csv", "csv", tmp_path / "none.csv")
    expect("files must match a pattern that is given, got .*which matches none", "csv", str(tmp_path / "*.csv"))
    expect("files must be at least one, got none", "csv")


def dummies(tmp_path: Path, count: int, then: str = "1,0,0,2\n1,1,0,3\n") -> Path:
    rows = "".join(f"0,{position},0,1\n" for position in range(count))
    return write(tmp_path / "a.csv", f"sequence,position,layer,expert_ids\n{rows}{then}")


def test_identical_leading_rows_are_told_and_may_be_dropped(tmp_path: Path) -> None:
    file = dummies(tmp_path, MOST_IDENTICAL_ROWS)
    kept = import_files("csv", [file])
    assert len(kept.trace) == MOST_IDENTICAL_ROWS + 2
    assert any(note.startswith(f"warning: the first {MOST_IDENTICAL_ROWS} tokens have the same") for note in kept.notes)
    dropped = import_files("csv", [file], Options(drop_identical_rows=True))
    assert dropped.trace.expert_ids.tolist() == [[[2]], [[3]]]
    assert any("were left out" in note for note in dropped.notes)


def test_few_identical_rows_are_nothing_odd(tmp_path: Path) -> None:
    imported = import_files("csv", [dummies(tmp_path, MOST_IDENTICAL_ROWS - 1)], Options(drop_identical_rows=True))
    assert len(imported.trace) == MOST_IDENTICAL_ROWS + 1
    assert not any("the first" in note for note in imported.notes)


def test_nothing_but_identical_rows_is_refused(tmp_path: Path) -> None:
    file = dummies(tmp_path, MOST_IDENTICAL_ROWS, then="")
    expect("must hold other tokens than identical ones", "csv", file, drop_identical_rows=True)


def test_dropped_rows_leave_the_residency_too(tmp_path: Path) -> None:
    rows = "".join(f"0,1,{step},0,0,1,0.5,0,8\n" for step in range(MOST_IDENTICAL_ROWS))
    names = "turn,phase,step,layer,slot,expert,weight,residency,expert_bytes"
    file = write(tmp_path / "a.csv", f"{names}\n{rows}1,1,0,0,0,2,0.5,1,0\n")
    imported = import_files("route-csv", [file], Options(drop_identical_rows=True))
    assert imported.residency["token"].tolist() == [0]
    assert imported.residency["expert"].tolist() == [2]


def test_what_was_assumed_is_told(tmp_path: Path) -> None:
    path, _ = examples(tmp_path)["gpt-oss-json"]
    assert import_files("gpt-oss-json", [path]).notes == [
        "note: experts is 4, as far as the ids tell (--experts tells more)",
        "note: expert_bytes is 1, so that bytes are counts of experts (--expert-bytes tells more)",
    ]
    assert import_files("gpt-oss-json", [path], Options(experts=9, expert_bytes=(5, 6))).notes == []


def test_options_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    path, _ = examples(tmp_path)["gpt-oss-json"]
    expect("expert_bytes must have one entry or 2 entries, got 3", "gpt-oss-json", path, expert_bytes=(1, 2, 3))
    expect("dtype must be .* got 'int3'", "gpt-oss-json", path, dtype="int3")
    expect("layers must be 2, as .*a.json has it, or be left out, got 3", "gpt-oss-json", path, layers=3)


SHARED = Path(__file__).parents[3] / "shared" / "data" / "routing"


def shared(name: str, folder: str) -> Imported:
    if not (SHARED / folder).is_dir():
        pytest.skip("the shared recordings are not beside this checkout")
    return import_files(name, [SHARED / folder])


@pytest.mark.parametrize(
    ("name", "folder", "shape", "sequences", "overlap"),
    [
        ("gpt-oss-json", "gpt-oss-20b-decode", (37_304, 24, 4), 116, 0.44),
        ("esft", "deepseek-v2-lite-esft/law", (8_327, 26, 6), 33, 0.29),
        ("esft", "deepseek-v2-lite-esft/intent", (8_222, 26, 6), 127, None),
        ("router-trace-v2", "switch-base-8-encoder", (215, 6, 1), 1, None),
    ],
)
def test_shared_recordings(name: str, folder: str, shape: Any, sequences: int, overlap: float | None) -> None:
    trace = shared(name, folder).trace
    assert trace.expert_ids.shape == shape
    assert (trace.expert_ids != NOT_ROUTED).all()
    assert len(set(trace.sequence.tolist())) == sequences
    assert (np.bincount(trace.step) == 1).all()
    if overlap is not None:
        assert round(float(neighbour_overlap(trace).mean()), 2) == overlap
