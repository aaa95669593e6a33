"""The formats with a file a layer, esft and logits-safetensors: what is read, and each defect by its name and row."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from tests.traces.importing import ESFT, PREFILL, esft, expect, logits, save, without, write
from traces.importers import Options, import_files
from traces.workload import one_at_a_time

# esft


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


# logits-safetensors


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
