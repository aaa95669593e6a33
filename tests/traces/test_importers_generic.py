"""The generic CSV and JSONL: golden rows, what is inferred, a round trip with the exporter, and each defect by line."""

from __future__ import annotations

import gzip
import json
import re
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from traces import NOT_ROUTED, Phase, Trace, TraceError, TraceHeader
from traces.export import export
from traces.importers import Options, import_files
from traces.importers.generic import COLUMNS

N = NOT_ROUTED
TITLE = ",".join(COLUMNS)
HEADER = {"model": "m", "layers": 2, "experts": 9, "top_k": 2, "expert_bytes": [5, 6], "domains": ["a", "b"]}
ROWS = """\
1,4,0,prefill,7,50,3 2,0.75 0.25
1,4,1,prefill,7,50,8,1
1,5,0,prefill,7,51,2 0,0.5 0.5
1,5,1,prefill,7,51,,
1,6,0,decode,9,52,1 3,1 0
1,6,1,decode,9,52,8 1,0.5 0.25
"""


def as_jsonl(rows: str, title: str = TITLE) -> str:
    """The same rows, as JSON Lines."""
    lists = {"expert_ids": int, "gates": float}
    lines = []
    for row in rows.splitlines():
        values: dict[str, Any] = dict(zip(title.split(","), row.split(","), strict=True))
        for name, text in values.items():
            if name in lists:
                values[name] = [lists[name](entry) for entry in text.split()]
            elif name != "phase":
                values[name] = int(text)
        lines.append(json.dumps(values))
    return "".join(f"{line}\n" for line in lines)


def csv_file(folder: Path, rows: str = ROWS, *, title: str = TITLE, header: Any = None, name: str = "a.csv") -> Path:
    first = "" if header is None else f"# {json.dumps(header)}\n"
    path = folder / name
    path.write_text(f"{first}{title}\n{rows}", encoding="utf-8")
    return path


def jsonl_file(folder: Path, rows: str = ROWS, *, title: str = TITLE, header: Any = None) -> Path:
    first = "" if header is None else json.dumps({"header": header}) + "\n"
    path = folder / "a.jsonl"
    path.write_text(first + as_jsonl(rows, title), encoding="utf-8")
    return path


WRITERS = {"csv": csv_file, "jsonl": jsonl_file}
EITHER = pytest.mark.parametrize("name", sorted(WRITERS))


@EITHER
@pytest.mark.parametrize("with_header", [True, False])
def test_golden(tmp_path: Path, name: str, with_header: bool) -> None:
    imported = import_files(name, [WRITERS[name](tmp_path, header=HEADER if with_header else None)])
    trace = imported.trace
    assert trace.expert_ids.tolist() == [[[3, 2], [8, N]], [[2, 0], [N, N]], [[1, 3], [8, 1]]]
    assert trace.gates is not None
    assert trace.gates.tolist() == [[[0.75, 0.25], [1, 0]], [[0.5, 0.5], [0, 0]], [[1, 0], [0.5, 0.25]]]
    assert trace.sequence.tolist() == [1, 1, 1]
    assert trace.position.tolist() == [4, 5, 6]
    assert trace.phase.tolist() == [Phase.PREFILL, Phase.PREFILL, Phase.DECODE]
    assert trace.step.tolist() == [7, 7, 9]
    assert trace.token_ids.tolist() == [50, 51, 52]
    assert trace.header.experts == 9
    assert trace.header.expert_bytes == ((5, 6) if with_header else (1, 1))
    assert trace.header.model == ("m" if with_header else name)
    assert trace.header.domains == (("a", "b") if with_header else ())
    assert len(imported.notes) == (0 if with_header else 2)


@EITHER
def test_columns_may_be_missing(tmp_path: Path, name: str) -> None:
    title = "layer,sequence,position,expert_ids"
    file = WRITERS[name](tmp_path, "0,5,0,3\n0,2,0,1\n0,5,1,2\n0,2,1,0\n", title=title)
    trace = import_files(name, [file]).trace
    assert trace.sequence.tolist() == [5, 5, 2, 2], "sequence by sequence, in order of first appearance"
    assert trace.expert_ids[:, 0, 0].tolist() == [3, 2, 1, 0]
    assert trace.step.tolist() == [0, 1, 2, 3]
    assert trace.phase.tolist() == [Phase.DECODE] * 4
    assert trace.token_ids.tolist() == [0] * 4
    assert trace.gates is None


@EITHER
def test_without_steps_a_prompt_is_one(tmp_path: Path, name: str) -> None:
    title = "sequence,position,layer,phase,expert_ids"
    rows = "0,0,0,prefill,3\n1,0,0,prefill,3\n0,1,0,prefill,1\n0,2,0,decode,2\n0,3,0,decode,2\n1,1,0,prefill,0\n"
    trace = import_files(name, [WRITERS[name](tmp_path, rows, title=title)]).trace
    assert trace.sequence.tolist() == [0, 0, 0, 0, 1, 1]
    assert trace.step.tolist() == [0, 0, 1, 2, 3, 3]


@EITHER
def test_rows_may_stand_layer_after_layer(tmp_path: Path, name: str) -> None:
    rows = ROWS.splitlines(keepends=True)
    whole = import_files(name, [WRITERS[name](tmp_path, header=HEADER)]).trace
    shuffled = import_files(name, [WRITERS[name](tmp_path, "".join(rows[::2] + rows[1::2]), header=HEADER)]).trace
    assert shuffled.digest == whole.digest


def test_sequences_of_several_files_are_numbered_anew(tmp_path: Path) -> None:
    for number in range(2):
        csv_file(tmp_path, header=HEADER, name=f"{number}.csv")
    trace = import_files("csv", [tmp_path]).trace
    assert trace.sequence.tolist() == [0, 0, 0, 1, 1, 1]
    assert trace.step.tolist() == [7, 7, 9, 10, 10, 12]
    assert trace.header.domains == ("b", "b")


def test_narrow_files_are_filled_up(tmp_path: Path) -> None:
    csv_file(tmp_path, "0,0,0,3 1\n", title="sequence,position,layer,expert_ids", name="a.csv")
    csv_file(tmp_path, "0,0,0,2\n", title="sequence,position,layer,expert_ids", name="b.csv")
    assert import_files("csv", [tmp_path]).trace.expert_ids.tolist() == [[[3, 1]], [[2, N]]]


def test_gates_in_some_files_alone_are_left_out_and_told(tmp_path: Path) -> None:
    csv_file(tmp_path, "0,0,0,3,1\n", title="sequence,position,layer,expert_ids,gates", name="a.csv")
    csv_file(tmp_path, "0,0,0,2\n", title="sequence,position,layer,expert_ids", name="b.csv")
    imported = import_files("csv", [tmp_path])
    assert imported.trace.gates is None
    assert "warning: 1 of 2 parts have no gates, so the trace has none" in imported.notes


def test_the_provenance_of_a_header_is_kept(tmp_path: Path) -> None:
    file = csv_file(tmp_path, header=HEADER | {"made_by": "hand", "software": {"x": "1"}, "licence": "MIT"})
    header = import_files("csv", [file], Options(licence="CC0-1.0")).trace.header
    assert header.made_by.startswith("hand; moetwin trace import --format csv --licence CC0-1.0 (1 file, sha256")
    assert header.software.keys() == {"x", "moetwin"}
    assert header.licence == "CC0-1.0"


@st.composite
def traces(draw: st.DrawFn) -> Trace:
    """Small traces with places that are not routed, gaps before positions, steps and sequences, and all float16s."""
    layers, top_k = draw(st.integers(1, 3)), draw(st.integers(1, 3))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    experts = top_k + int(rng.integers(0, 4))
    lengths = rng.integers(1, 4, size=draw(st.integers(1, 3)))
    tokens = int(lengths.sum())
    ids = rng.permuted(np.tile(np.arange(experts), (tokens, layers, 1)), axis=-1)[..., :top_k]
    ids[np.arange(top_k) >= rng.integers(0, top_k + 1, size=(tokens, layers, 1))] = N
    ids[0, 0, 0] = 0 if ids[0, 0, 0] == N else ids[0, 0, 0]  # gates of no expert at all cannot come back
    gates = np.where(ids == N, 0, np.abs(rng.integers(0, 31744, size=ids.shape).astype(np.uint16).view(np.float16)))
    prompts = [int(rng.integers(0, length + 1)) for length in lengths]
    header = TraceHeader(
        model="m", layers=layers, experts=experts, top_k=top_k, expert_bytes=tuple(rng.integers(0, 99, size=layers))
    )
    return Trace.of(
        header,
        expert_ids=ids,
        gates=gates if draw(st.booleans()) else None,
        token_ids=rng.integers(0, 2**31, size=tokens),
        sequence=np.repeat(rng.permutation(9)[: len(lengths)], lengths),
        position=np.concatenate([np.arange(length) + int(rng.integers(0, 5)) for length in lengths]),
        step=np.cumsum(rng.integers(0, 3, size=tokens)),
        phase=np.concatenate([np.arange(length) >= prompt for length, prompt in zip(lengths, prompts, strict=True)]),
    )


@settings(max_examples=60)
@given(trace=traces(), ending=st.sampled_from(["csv", "jsonl", "csv.gz", "jsonl.gz"]))
def test_what_is_exported_comes_back(trace: Trace, ending: str) -> None:
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / f"t.{ending}"
        export(trace, file)
        back = import_files(ending.removesuffix(".gz"), [file]).trace
    kept = {"made_by", "software"}
    assert back.header.model_dump(exclude=kept) == trace.header.model_dump(exclude=kept)
    for name, array in trace.arrays():
        np.testing.assert_array_equal(getattr(back, name), array, strict=True, err_msg=name)
    assert back.digest == trace.digest


@EITHER
@pytest.mark.parametrize(
    ("old", "new", "rule"),
    [
        ("1,5,1,prefill,7,51,,\n", "", "layer 1 must have a row for each of 3 tokens, got 2: none for sequence 1, pos"),
        (
            "1,5,1,",
            "1,5,0,",
            "line 5: must be the only row of its token and layer, got sequence 1, pos",
        ),
        ("1,5,1,", "1,5,2,", "line 5: layer must be from 0 to 1, got 2"),
        ("2 0,0.5 0.5", "2 9,0.5 0.5", "line 4: expert ids must be from 0 to 8, got 9"),
        ("2 0,0.5 0.5", "2 -1,0.5 0.5", "line 4: expert ids must be from 0 to 8, got -1"),
        ("2 0,0.5 0.5", "2 2,0.5 0.5", "line 4: expert ids must be distinct within a token, got 2 twice"),
        ("2 0,0.5 0.5", "2 0 1,0.5 0.5 0", r"line 4: must have at most 2 expert ids \(top_k\), got 3"),
        ("2 0,0.5 0.5", "2 0,0.5", "line 4: must have 2 gates, as other rows do, got 1"),
        ("2 0,0.5 0.5", "2 0,", "line 4: must have 2 gates, as other rows do, got 0"),
        ("2 0,0.5 0.5", "2 0,0.5 nan", "line 4: gates must be finite and at least 0, got nan"),
        ("2 0,0.5 0.5", "2 0,0.5 -0.5", "line 4: gates must be finite and at least 0, got -0.5"),
        ("2 0,0.5 0.5", "2 0,0.5 99999", "line 4: gates must be finite and at least 0, got 99999"),
        (
            "1,5,1,prefill,7,51",
            "1,5,1,prefill,7,52",
            "line 5: token_id must be 51, as in the token's other rows, got 52",
        ),
        ("1,5,1,prefill,7,51", "1,5,1,prefill,8,51", "line 5: step must be 7, as in the token's other rows, got 8"),
        ("1,5,1,prefill", "1,5,1,decode", "line 5: phase must be prefill, as in the token's other rows, got decode"),
        ("1,5,1,prefill", "1,5,1,pre", "line 5: phase must be prefill or decode, got"),
        ("decode,9", "decode,6", "line 6: step must not decrease from token to token .7 before., got 6"),
        ("1,6,", "1,7,", "line 6: position must count up by one within sequence 1, got 7 after 5"),
        ("1,6,", "1,-6,", "line 6: position must be from 0 to 2147483647, got -6"),
        ("1,6,", "1,6000000000,", "line 6: position must be from 0 to 2147483647, got 6000000000"),
        ("1,6,", "1,60000000000000000000,", "line 6: numbers must be at most 2147483647, got more"),
        ("1,6,", "4,0,", "sequence must be below the 2 domains of the header, got 4"),
    ],
)
def test_a_malformed_row_is_named(tmp_path: Path, name: str, old: str, new: str, rule: str) -> None:
    assert old in ROWS
    file = WRITERS[name](tmp_path, ROWS.replace(old, new), header=HEADER)
    if name == "csv":  # it has a line more at the top, the names of the columns
        rule = re.sub(r"line (\d):", lambda found: f"line {int(found[1]) + 1}:", rule)
    with pytest.raises(TraceError, match=rule) as raised:
        import_files(name, [file])
    assert str(raised.value).startswith(str(file))


@pytest.mark.parametrize(
    ("text", "rule"),
    [
        (f"{TITLE}\n", "must have a row, got none"),
        (f"# {{}}\n{TITLE}\n{ROWS}", "header: model must be given, got nothing"),
        (f"# about\n{TITLE}\n{ROWS}", "line 1: must be '# ' and the header as JSON, got '# about'"),
        (f"{TITLE}s\n{ROWS}", r"line 1: column must be a known name, got 'gatess' \(did you mean gates"),
        ("sequence,position,expert_ids\n0,0,1\n", "line 1: must name each column once, sequence, position, layer"),
        (f"{TITLE}\n{ROWS}1,7,0,decode\n", f"line 8: must have the 8 fields {TITLE}, got '1,7,0,decode'"),
        (f'{TITLE}\n0,0,0,decode,0,0,1,"1', "line 2: must be a line of CSV, with quotes that are closed .* got '0,0,0"),
        (f'{TITLE[:-5]}"gates\n{ROWS}', "line 1: must be a line of CSV, with quotes that are closed"),
        (f"{TITLE}\n0,0,0,decode,0,0,1 x,1 1\n", "line 2: must hold whole numbers, and gates as numbers"),
        (f"{TITLE}\n0,0,0,decode,,0,1,1\n0,1,0,decode,1,0,1,1\n", "line 2: step must be given in every row or in none"),
    ],
)
def test_a_malformed_csv_is_named(tmp_path: Path, text: str, rule: str) -> None:
    file = tmp_path / "a.csv"
    file.write_text(text, encoding="utf-8")
    with pytest.raises(TraceError, match=f"a.csv.* {rule}|a.csv: {rule}"):
        import_files("csv", [file])


@pytest.mark.parametrize(
    ("line", "rule"),
    [
        ('{"sequence": 0', "line 1: must be a JSON object, got"),
        ("[1]", r"line 1: must be a JSON object, got '\[1\]'"),
        ('{"sequence": 0, "position": 0, "layer": 0}', "line 1: must have the keys .* got none named expert_ids"),
        ('{"sequence": 0, "position": 0, "layr": 0}', r"key must be a known name, got 'layr' \(did you mean layer"),
        ('{"sequence": 0, "position": 0.5, "layer": 0, "expert_ids": []}', "position must be a whole number, got 0.5"),
        (
            '{"sequence": true, "position": 0, "layer": 0, "expert_ids": []}',
            "sequence must be a whole number, got True",
        ),
        ('{"sequence": 0, "position": 0, "layer": 0, "expert_ids": 1}', "expert_ids and gates must be lists, got 1"),
        ('{"sequence": 0, "position": 0, "layer": 0, "expert_ids": ["1"]}', "line 1: expert ids must be whole numbers"),
        ('{"sequence": 0, "position": 0, "layer": 0, "expert_ids": [[1]]}', "line 1: expert ids must be whole numbers"),
        ('{"header": {"model": "m"}}', "header: layers must be given, got nothing"),
        ('{"header": {"model": "m"}, "more": 1}', "line 1: key must be a known name, got 'header'"),
    ],
)
def test_a_malformed_jsonl_is_named(tmp_path: Path, line: str, rule: str) -> None:
    file = tmp_path / "a.jsonl"
    file.write_text(f"{line}\n", encoding="utf-8")
    with pytest.raises(TraceError, match=rule):
        import_files("jsonl", [file])


def test_a_spreadsheet_may_quote_lists_and_leave_blank_lines(tmp_path: Path) -> None:
    file = tmp_path / "a.csv"
    file.write_bytes(b'\xef\xbb\xbfsequence,position,layer,expert_ids\r\n0,0,0,"3 1"\r\n\r\n0,1,0,"2 0"\r\n')
    assert import_files("csv", [file]).trace.expert_ids.tolist() == [[[3, 1]], [[2, 0]]]


def test_what_is_gzipped_is_unpacked_whatever_its_name(tmp_path: Path) -> None:
    file = csv_file(tmp_path)
    file.write_bytes(gzip.compress(file.read_bytes()))
    assert len(import_files("csv", [file]).trace) == 3


def test_rows_beyond_one_piece_are_gathered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = import_files("csv", [csv_file(tmp_path)]).trace.digest
    monkeypatch.setattr("traces.importers.generic.CHUNK_ROWS", 4)
    assert import_files("csv", [csv_file(tmp_path)]).trace.digest == whole


PAGE = Path(__file__).parents[2] / "docs" / "trace-format.md"


@pytest.mark.parametrize(("name", "fence", "tokens"), [("csv", "csv", 2), ("jsonl", "json", 1)])
def test_the_examples_of_the_format_page_are_read(tmp_path: Path, name: str, fence: str, tokens: int) -> None:
    (example,) = re.findall(rf"```{fence}\n(.*?)```", PAGE.read_text(encoding="utf-8"), flags=re.DOTALL)
    file = tmp_path / f"a.{name}"
    file.write_text(example, encoding="utf-8")
    trace = import_files(name, [file]).trace
    assert len(trace) == tokens
    assert trace.expert_ids[0].tolist() == [[0, 1], [2, 3]]
    assert trace.header.expert_bytes == (4096, 4096)
