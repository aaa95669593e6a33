"""The formats in CSV, route-csv and layer-csv: what is read, and each defect by its name and row."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.traces.importing import DECODE, LAYER, PREFILL, ROUTE, expect, route, write
from traces import NOT_ROUTED
from traces.importers import Options, import_files

N = NOT_ROUTED


# route-csv


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
    imported = import_files("route-csv", [tmp_path / "a", tmp_path / "b"])
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
