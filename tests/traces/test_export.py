"""``moetwin trace export``: the exact text, which the importers of the generic formats read back."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from traces import NOT_ROUTED, InputError, Phase, Trace, TraceError, TraceHeader, export, store
from traces.cli import app
from traces.export import FORMATS
from traces.export import export as write
from traces.importers import import_files
from traces.synthetic import Sizes, markov


def hand(gates: Any = True) -> Trace:
    """Two tokens through two layers; in two of the four rows not all places are routed."""
    weights = [[[0.75, 0.25], [1.0, 0.0]], [[0.1, 0.0], [0.0, 0.0]]]
    header = TraceHeader(model="häńd\n", layers=2, experts=9, top_k=2, expert_bytes=(5, 6), domains=("", "", "", "a,b"))
    return Trace.of(
        header,
        expert_ids=[[[8, 3], [0, 1]], [[7, NOT_ROUTED], [NOT_ROUTED, NOT_ROUTED]]],
        token_ids=[50, 60],
        sequence=[3, 3],
        position=[4, 5],
        step=[1, 2],
        phase=[Phase.PREFILL, Phase.DECODE],
        gates=weights if gates else None,
    )


def test_csv_golden(tmp_path: Path) -> None:
    path = tmp_path / "t.csv"
    assert write(hand(), path) == 4
    head, *rows = path.read_text(encoding="utf-8").splitlines()
    assert TraceHeader.of(json.loads(head.removeprefix("# "))) == hand().header
    assert rows == [
        "sequence,position,layer,phase,step,token_id,expert_ids,gates",
        "3,4,0,prefill,1,50,8 3,0.75 0.25",
        "3,4,1,prefill,1,50,0 1,1.0 0.0",
        "3,5,0,decode,2,60,7,0.1",
        "3,5,1,decode,2,60,,",
    ]


def test_jsonl_golden(tmp_path: Path) -> None:
    path = tmp_path / "t.jsonl"
    assert write(hand(), path) == 4
    head, *rows = path.read_text(encoding="utf-8").splitlines()
    assert TraceHeader.of(json.loads(head)["header"]) == hand().header
    assert list(json.loads(head)) == ["header"]
    assert rows[0] == (
        '{"sequence": 3, "position": 4, "layer": 0, "phase": "prefill", "step": 1, "token_id": 50, '
        '"expert_ids": [8, 3], "gates": [0.75, 0.25]}'
    )
    assert [json.loads(row)["gates"] for row in rows[1:]] == [[1, 0], [0.1], []]
    assert [json.loads(row)["expert_ids"] for row in rows[1:]] == [[0, 1], [7], []]


def test_without_gates_the_column_is_empty_and_the_key_is_not_there(tmp_path: Path) -> None:
    write(hand(gates=False), tmp_path / "t.csv")
    write(hand(gates=False), tmp_path / "t.jsonl")
    assert (tmp_path / "t.csv").read_text(encoding="utf-8").splitlines()[2] == "3,4,0,prefill,1,50,8 3,"
    assert "gates" not in (tmp_path / "t.jsonl").read_text(encoding="utf-8").splitlines()[1]


def read(path: Path) -> Trace:
    return import_files("jsonl" if ".jsonl" in path.name else "csv", [path]).trace


def origin(trace: Trace) -> dict[str, Any]:
    """What importing adds nothing to."""
    return trace.header.model_dump(exclude={"made_by", "software"})


@given(
    ending=st.sampled_from([".csv", ".jsonl", ".csv.gz", ".jsonl.gz"]),
    seed=st.integers(0, 100),
    chunk=st.sampled_from([1, 7, 10_000]),
)
@settings(max_examples=30, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_what_is_written_can_be_read_back(
    tmp_path: Path, ending: str, seed: int, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ids and gates of any float16 come back bit for bit, with unrouted places at the end of a row."""
    monkeypatch.setattr(export, "CHUNK_LINES", chunk)
    generator = np.random.default_rng(seed)
    trace = markov(generator, Sizes(sequences=2, prompt_tokens=2, new_tokens=3, layers=3, experts=9, top_k=3))
    routed = np.arange(3) < generator.integers(0, 4, size=(len(trace), 3, 1))
    gates = generator.integers(0, 0x7C00, size=routed.shape, dtype=np.uint16).view(np.float16)
    trace = dataclasses.replace(
        trace,
        expert_ids=np.where(routed, trace.expert_ids, np.uint16(NOT_ROUTED)),
        gates=np.where(routed, gates, np.float16(0)),
    )
    path = tmp_path / f"t{ending}"
    assert write(trace, path, force=True) == len(trace) * 3
    again = read(path)
    assert again.digest == trace.digest
    assert origin(again) == origin(trace)
    assert again.header.made_by.startswith(trace.header.made_by)


def test_places_not_routed_are_left_out_wherever_they_stand(tmp_path: Path) -> None:
    trace = hand()
    assert trace.gates is not None
    trace = dataclasses.replace(trace, expert_ids=trace.expert_ids[..., ::-1], gates=trace.gates[..., ::-1])
    write(trace, tmp_path / "t.csv")
    assert (tmp_path / "t.csv").read_text(encoding="utf-8").splitlines()[4] == "3,5,0,decode,2,60,7,0.1"


def test_equal_traces_give_equal_bytes(tmp_path: Path) -> None:
    paths = [tmp_path / "one.csv.gz", tmp_path / "two.csv.gz"]
    for path in paths:
        write(hand(), path)
    assert paths[0].read_bytes() == paths[1].read_bytes()
    assert paths[0].read_bytes()[3:8] == bytes(5), "neither name nor time"


def test_progress_is_told_to_the_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(export, "CHUNK_LINES", 2)
    told: list[tuple[int, int]] = []
    write(hand(), tmp_path / "t.csv", progress=lambda done, total: told.append((done, total)))
    assert told == [(1, 2), (2, 2)]


@pytest.mark.parametrize("name", ["t.txt", "t", "t.gz", "t.csv.zip"])
def test_another_ending_is_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(InputError, match=f"out must end in one of .csv, .csv.gz, .jsonl, .jsonl.gz, got {name}"):
        write(hand(), tmp_path / name)
    assert not list(tmp_path.iterdir())


def test_an_existing_file_is_replaced_only_by_force(tmp_path: Path) -> None:
    path = tmp_path / "t.csv"
    path.write_text("mine", encoding="utf-8")
    with pytest.raises(TraceError, match="out must be a new file"):
        write(hand(), path)
    assert path.read_text(encoding="utf-8") == "mine"
    write(hand(), path, force=True)
    assert path.read_text(encoding="utf-8") != "mine"


@pytest.mark.parametrize("name", ["t.csv", "t.csv.gz"])
def test_nothing_half_written_is_left(tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(_line: Any) -> str:
        raise OSError("no space left")

    monkeypatch.setitem(FORMATS, ".csv", (lambda _trace: "head\n", fail))
    with pytest.raises(InputError, match=r"out must be a file that can be written, got .*: no space left"):
        write(hand(), tmp_path / name)
    assert not list(tmp_path.iterdir())


# The command.


def run(*arguments: str | Path) -> Any:
    return CliRunner().invoke(app, [str(argument) for argument in arguments], catch_exceptions=False)


def test_the_export_command_says_what_has_no_place(tmp_path: Path) -> None:
    sizes = Sizes(sequences=1, prompt_tokens=2, new_tokens=2, layers=3, scores=True, lookahead=1)
    file = store.save(markov(np.random.default_rng(0), sizes), tmp_path / "t.safetensors")
    out = tmp_path / "new" / "t.jsonl.gz"
    result = run("export", file, "--out", out)
    assert result.stdout == f"{out}: 12 lines of 4 tokens in 3 layers\n"
    assert result.stderr.splitlines() == [
        f"note: {name} has no place in this format, and is left out" for name in ("scores", "lookahead")
    ]
    assert origin(read(out)) == origin(store.load(file))


def test_the_export_command_refuses_before_it_reads(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="out must end in one of"):
        run("export", tmp_path / "absent.safetensors", "--out", tmp_path / "t.parquet")
    with pytest.raises(InputError, match="trace must be an existing file"):
        run("export", tmp_path / "absent.safetensors", "--out", tmp_path / "t.csv")
    assert not list(tmp_path.iterdir())
