"""``moetwin trace import``: what it writes, says and refuses."""

from __future__ import annotations

import json
from pathlib import Path

import pandas as pd
import pytest
from typer.testing import CliRunner, Result

from sim.replay import Capacity
from sim.spec import catalogue
from sim.target import model_for
from tests.commanding import run
from traces import InputError, TraceError, cli_import, store
from traces.cli import app
from traces.importers import IMPORTERS, collect
from traces.schema import TraceHeader

ROUTE = """\
# layer=0 expert_bytes=100
turn,phase,step,layer,slot,expert,weight,residency,expert_bytes
0,1,0,0,0,3,0.75,0,100
0,1,1,0,0,1,0.25,1,0
"""


def invoke(*arguments: str | Path) -> Result:
    return CliRunner().invoke(app, ["import", *map(str, arguments)], catch_exceptions=False, env={"COLUMNS": "200"})


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "in" / "run.csv"
    path.parent.mkdir()
    path.write_text(ROUTE, encoding="utf-8")
    return path


def test_import_writes_a_trace_and_says_so(file: Path, tmp_path: Path) -> None:
    out = tmp_path / "t.safetensors"
    result = invoke("--format", "route-csv", file, "--model", "M", "--experts", "8", "--out", out)
    trace = store.load(out, verify=True)
    assert f"{out}: 2 tokens in 1 sequences, 2 assignments, 1 x 8, top-1, digest {trace.digest}\n" in result.stdout
    assert "note" not in result.stderr
    assert trace.header.model == "M"
    assert trace.header.experts == 8


def test_notes_go_to_stderr_and_json_to_stdout(file: Path, tmp_path: Path) -> None:
    result = invoke("--format", "route-csv", file.parent, "--json", "--out", tmp_path / "t.safetensors")
    record = json.loads(result.stdout)
    assert (record["tokens"], record["sequences"], record["experts"], record["files"]) == (2, 1, 4, 1)
    assert record["notes"] == ["note: experts is 4, as far as the ids tell (--experts tells more)"]
    assert record["notes"][0] in result.stderr


def test_the_residency_is_written_beside_the_trace(file: Path, tmp_path: Path) -> None:
    out, hits = tmp_path / "t.safetensors", tmp_path / "hits.parquet"
    invoke("--format", "route-csv", file, "--residency-out", hits, "--out", out)
    table = pd.read_parquet(hits)
    assert table["residency"].tolist() == [0, 1]
    chosen = store.load(out).expert_ids[table["token"], table["layer"], table["rank"]]
    assert chosen.tolist() == table["expert"].tolist()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["hits.parquet", "in", "t.safetensors"]


def test_expert_bytes_may_differ_between_layers(tmp_path: Path) -> None:
    file, out = tmp_path / "a.csv", tmp_path / "t.safetensors"
    file.write_text("sequence,position,layer,expert_ids\n0,0,0,1\n0,0,1,0\n", encoding="utf-8")
    invoke("--format", "csv", file, "--expert-bytes", "900,800", "--out", out)
    assert store.load(out).header.expert_bytes == (900, 800)


@pytest.mark.parametrize(
    ("arguments", "rule"),
    [
        (("--format", "route_csv"), r"format must be a known name, got 'route_csv' \(did you mean route-csv"),
        (("--format", "csv"), "run.csv, line 1: must be '# ' and the header as JSON"),
        (("--format", "csv", "--residency-out", "x.parquet"), "residency_out must be left out for csv"),
        (("--format", "route-csv", "--residency-out", "x.csv"), "residency_out must be a .parquet file, got x.csv"),
        (("--format", "route-csv", "--expert-bytes", "1k"), "expert_bytes must be a whole number.* got '1k'"),
        (("--format", "route-csv", "--expert-bytes", "0"), "expert_bytes must be a whole number from 1 to .* got '0'"),
        (("--format", "route-csv", "--expert-bytes", "9,0"), "expert_bytes must be a whole .* got '9,0'"),
        (("--format", "route-csv", "--out", "t.csv"), r"out must end in \.safetensors, .* got t\.csv"),
        (("--format", "route-csv", "--prefill-as-batch"), "prefill_as_batch must be left out for route-csv"),
    ],
)
def test_import_refuses_and_writes_nothing(file: Path, tmp_path: Path, arguments: tuple[str, ...], rule: str) -> None:
    with pytest.raises(InputError, match=rule):
        invoke("--out", tmp_path / "t.safetensors", *arguments, file)
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


def test_existing_files_are_replaced_only_by_force(file: Path, tmp_path: Path) -> None:
    out, hits = tmp_path / "t.safetensors", tmp_path / "hits.parquet"
    hits.write_text("mine", encoding="utf-8")
    arguments = ("--format", "route-csv", file, "--residency-out", hits, "--out", out)
    with pytest.raises(TraceError, match=r"out must be a new file \(or give --force\), got .*hits.parquet"):
        invoke(*arguments)
    assert hits.read_text(encoding="utf-8") == "mine"
    assert not out.exists()
    invoke(*arguments, "--force")
    assert len(pd.read_parquet(hits)) == 2


def test_a_trace_without_sizes_tells_how_to_get_them(tmp_path: Path) -> None:
    file, out = tmp_path / "a.csv", tmp_path / "t.safetensors"
    file.write_text("sequence,position,layer,expert_ids\n0,0,0,1\n0,0,1,0\n", encoding="utf-8")
    told = "note: expert_bytes is 1, so that bytes are counts of experts (--expert-bytes tells more)"
    assert told in invoke("--format", "csv", file, "--out", out).stderr
    header = store.load(out).header
    rule = r"bytes must be at most the 4 of all experts, whose sizes .* not know \(.*--expert-bytes N.*, got 5$"
    with pytest.raises(InputError, match=rule):
        Capacity.bytes("5", header, "global")
    assert Capacity.bytes("4", header, "global").amount == 4
    known = header.model_copy(update={"expert_bytes": (1, 2)})
    with pytest.raises(InputError, match="bytes must be at most the 6 of all experts, got 7"):
        Capacity.bytes("7", known, "global")


def test_the_help_names_every_format() -> None:
    assert cli_import.FORMATS.split(", ") == list(IMPORTERS)


def test_the_format_page_names_every_format_and_option() -> None:
    page = (Path(__file__).parents[2] / "docs" / "trace-format.md").read_text(encoding="utf-8")
    options = ("--prefill-as-batch", "--drop-identical-rows", "--residency-out", "--expert-bytes", "--top-k")
    assert [word for word in (*IMPORTERS, *options) if f"`{word}" not in page] == []


def test_a_recording_of_a_known_model_is_replayed_by_bytes_right_away(tmp_path: Path) -> None:
    """The lines that a person types one after the other: the importer knows how large the experts are."""
    layers = {f"layer_{layer}": {"selected_experts": [0, 1, 2, 3], "selected_probs": [0.25] * 4} for layer in range(24)}
    file, out = tmp_path / "p.json", str(tmp_path / "t.safetensors")
    file.write_text(json.dumps({"router_data": [{"token_7": layers}, {"token_8": layers}]}), encoding="utf-8")
    imported = run("trace", "import", "--format", "gpt-oss-json", str(file), "--out", out)
    assert imported.exit_code == 0, imported.output
    spec = catalogue.model("gpt-oss-20b")
    assert f"note: expert_bytes is {spec.expert_bytes}, that of gpt-oss-20b in the catalogue" in imported.stderr
    assert store.load(out).header.expert_bytes == (spec.expert_bytes,) * 24
    done = run("cache", out, "--policies", "lru", "--scope", "global", "--bytes", "4000MiB", "--json")
    assert done.exit_code == 0, done.output
    row = json.loads(done.stdout)
    assert row["capacity_bytes"] == 4000 << 20
    assert row["bytes_loaded"] == 24 * 4 * spec.expert_bytes
    assert model_for(store.load(out)) == spec  # as released, not all of it in the header's dtype


@pytest.mark.parametrize("name", IMPORTERS)
def test_a_folder_is_searched_below_only_where_the_format_comes_in_folders(name: str, tmp_path: Path) -> None:
    (tmp_path / "below").mkdir()
    deep = tmp_path / "below" / IMPORTERS[name].patterns[0].replace("*", "1")
    deep.touch()
    if name in ("gpt-oss-json", "esft", "layer-csv"):
        assert collect([tmp_path], IMPORTERS[name]) == [deep]
        return
    with pytest.raises(InputError, match=r"files must be named .* in a folder, got .*, which has none"):
        collect([tmp_path], IMPORTERS[name])
    assert collect([tmp_path / "below"], IMPORTERS[name]) == [deep]


@pytest.mark.parametrize("size", ["68719476737", "9" * 19, "1" * 5000, "\u0663"])
def test_bytes_of_an_expert_beyond_reason_are_refused(size: str, file: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"expert_bytes must be a whole number from 1 to 68719476736, or one for each"):
        invoke("--format", "route-csv", file, "--expert-bytes", size, "--out", tmp_path / "t.safetensors")
    with pytest.raises(TraceError, match=r"expert_bytes.*must be less than or equal to 68719476736, got 68719476737"):
        TraceHeader.of({"model": "m", "layers": 1, "experts": 2, "top_k": 1, "expert_bytes": [(1 << 36) + 1]})
    assert TraceHeader.of({"model": "m", "layers": 1, "experts": 2, "top_k": 1, "expert_bytes": [1 << 36]}).layers == 1
