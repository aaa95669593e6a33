"""What all formats have in common: where a trace came from, defects, dummies, assumptions, and shared recordings."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.traces.importing import ESFT, LAYER, esft, expect, gpt_oss, logits, route, router_trace, without, write
from traces import NOT_ROUTED, InputError, TraceError
from traces.importers import IMPORTERS, Imported, Options, import_files
from traces.importers.assemble import MOST_IDENTICAL_ROWS
from traces.stats import neighbour_overlap


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
