"""A trace file: what is written can be read, and every kind of damage gives one clear line."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file

from traces import Trace, TraceError, TraceHeader, store
from traces.synthetic import Sizes, markov

SMALL = Sizes(sequences=2, prompt_tokens=3, new_tokens=2, layers=3, experts=5, top_k=2, scores=True, lookahead=2)


def small_trace(seed: int = 0) -> Trace:
    return markov(np.random.default_rng(seed), SMALL)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return store.save(small_trace(), tmp_path / "trace.safetensors")


def assert_same(left: Trace, right: Trace) -> None:
    assert left.header == right.header
    assert left.digest == right.digest
    both = dict(left.arrays()), dict(right.arrays())
    assert both[0].keys() == both[1].keys()
    for name, array in both[0].items():
        np.testing.assert_array_equal(array, both[1][name], strict=True)


def rewrite(
    path: Path, tensors: Callable[[dict[str, Any]], Any] = dict, metadata: Callable[[dict[str, str]], Any] = dict
) -> None:
    """Writes the file again with its tensors and its metadata changed."""
    with path.open("rb") as raw:
        layout = json.loads(raw.read(int.from_bytes(raw.read(8), "little")))
    save_file(tensors(load_file(path)), path, metadata=metadata(layout["__metadata__"]))


def rewrite_header(path: Path, **changed: Any) -> None:
    def change(metadata: dict[str, str]) -> dict[str, str]:
        return metadata | {"moetwin_trace": json.dumps(json.loads(metadata["moetwin_trace"]) | changed)}

    rewrite(path, metadata=change)


def expect_error(path: Path, *words: str, **options: bool) -> None:
    """Loading gives one line that begins with the file or names it, and has ``words`` in it."""
    with pytest.raises(TraceError) as raised:
        store.load(path, **options)
    message = str(raised.value)
    assert str(path) in message
    assert "\n" not in message
    for word in words:
        assert word in message


def test_round_trip(file: Path) -> None:
    assert_same(store.load(file, verify=True), small_trace())
    assert store.stored_digest(file) == small_trace().digest


def test_no_other_file_is_left(file: Path) -> None:
    assert list(file.parent.iterdir()) == [file]


def test_a_file_has_the_permissions_of_any_new_file(file: Path) -> None:
    other = file.with_name("other")
    other.touch()
    assert file.stat().st_mode == other.stat().st_mode


def test_arrays_are_mapped_read_only_views(file: Path) -> None:
    trace = store.load(file, check=False)
    for _, array in trace.arrays():
        assert type(array) is np.ndarray
        assert isinstance(array.base, np.memmap)
        assert not array.flags.writeable


@st.composite
def made_traces(draw: st.DrawFn) -> Trace:
    experts = draw(st.integers(1, 9))
    sizes = Sizes(
        sequences=draw(st.integers(1, 3)),
        prompt_tokens=draw(st.integers(0, 3)),
        new_tokens=draw(st.integers(1, 3)),
        layers=draw(st.integers(1, 4)),
        experts=experts,
        top_k=draw(st.integers(1, experts)),
        scores=draw(st.booleans()),
        lookahead=draw(st.integers(0, 5)),
    )
    trace = markov(np.random.default_rng(draw(st.integers(0, 99))), sizes)
    header = trace.header.model_copy(update={"licence": draw(st.text(max_size=5)), "prompts_digest": draw(st.text())})
    return Trace.of(header, **dict(trace.arrays()))


@settings(max_examples=25)
@given(made_traces())
def test_any_trace_survives(trace: Trace) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = store.save(trace, Path(folder) / "trace.safetensors")
        assert_same(store.load(path, verify=True), trace)


def test_an_existing_file_is_kept_unless_forced(file: Path) -> None:
    before = file.read_bytes()
    with pytest.raises(TraceError, match="out must be a new file"):
        store.save(small_trace(1), file)
    assert file.read_bytes() == before
    store.save(small_trace(1), file, force=True)
    assert store.load(file).digest == small_trace(1).digest


def test_a_folder_is_not_replaced(tmp_path: Path) -> None:
    with pytest.raises(TraceError, match="out must be a file, got the folder"):
        store.save(small_trace(), tmp_path, force=True)


def test_a_trace_that_breaks_a_rule_is_not_written(tmp_path: Path) -> None:
    trace = small_trace()
    trace.expert_ids[0, 0] = trace.expert_ids[0, 0, 0]
    with pytest.raises(TraceError, match="expert_ids must be distinct"):
        store.save(trace, tmp_path / "trace.safetensors")
    assert not list(tmp_path.iterdir())


def test_an_interrupted_write_leaves_the_old_file(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = file.read_bytes()

    def interrupted(tensors: Any, path: Path, **_: Any) -> None:
        path.write_bytes(b"the first part")
        raise KeyboardInterrupt

    monkeypatch.setattr(store, "save_file", interrupted)
    with pytest.raises(KeyboardInterrupt):
        store.save(small_trace(1), file, force=True)
    assert file.read_bytes() == before
    assert list(file.parent.iterdir()) == [file]


def test_a_failed_write_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(TraceError, match="out must be a file that can be written"):
        store.save(small_trace(), tmp_path / "file" / "trace.safetensors")


def test_files_of_other_kinds(tmp_path: Path) -> None:
    path = tmp_path / "other.safetensors"
    expect_error(path, "trace must be an existing file")
    expect_error(tmp_path, "trace must be an existing file")
    for content in (b"", b"seven b", b"some text that is longer than eight bytes", b"\x05" + bytes(7) + b"{abc}"):
        path.write_bytes(content)
        expect_error(path, "must be a safetensors file")
    path.write_bytes((2).to_bytes(8, "little") + b"[]")
    expect_error(path, "must be a safetensors file")
    path.write_bytes((13).to_bytes(8, "little") + b'{"a": [1, 2]}')
    expect_error(path, "must be a safetensors file")


def test_a_truncated_file_is_called_so_wherever_it_ends(file: Path) -> None:
    content = file.read_bytes()
    data = 8 + int.from_bytes(content[:8], "little")
    for end in (9, 100, data - 1):
        file.write_bytes(content[:end])
        expect_error(file, "must be a complete file", f"got {end} bytes")
    for end in (data, data + 1, (data + len(content)) // 2, len(content) - 1):
        file.write_bytes(content[:end])
        expect_error(file, f"must be a complete file of {len(content)} bytes, got {end}")


def test_bytes_after_the_end_are_refused(file: Path) -> None:
    file.write_bytes(file.read_bytes() + b"more")
    expect_error(file, "must be a well-formed safetensors file")


def test_a_safetensors_file_that_is_no_trace(tmp_path: Path) -> None:
    path = tmp_path / "weights.safetensors"
    save_file({"weight": np.zeros(3)}, path)
    expect_error(path, "metadata must have the entry moetwin_trace, got none")
    save_file({"weight": np.zeros(3)}, path, metadata={"moetwin_trace": "{no json"})
    expect_error(path, "metadata moetwin_trace must be JSON")


def test_header_that_fails_validation(file: Path) -> None:
    rewrite_header(file, top_k=6)
    expect_error(file, "top_k must be at most experts (5), got 6")


def test_another_schema_version_is_named_first(file: Path) -> None:
    rewrite_header(file, schema_version=2, something_new=1)
    expect_error(file, "schema_version must be 1 (the only one read here), got 2")


def test_missing_and_unknown_tensors(file: Path) -> None:
    rewrite(file, lambda tensors: {name: value for name, value in tensors.items() if name != "step"})
    expect_error(file, "tensor step must be given")
    rewrite(file, lambda tensors: tensors | {"gate": tensors["gates"]})
    expect_error(file, "tensor must be a known name, got 'gate'", "did you mean gates")


@pytest.mark.parametrize(
    ("tensor", "change", "message"),
    [
        ("gates", lambda a: a.astype(np.float32), "tensor gates must be F16, got F32"),
        ("phase", lambda a: a.astype(np.int32), "tensor phase must be U8, got I32"),
        ("position", lambda a: a[:-1].copy(), "position must have shape [10], got [9]"),
        ("scores", lambda a: a[..., :-1].copy(), "scores must have shape [10, 3, 5], got [10, 3, 4]"),
        ("lookahead", lambda a: a[:, :, 0].copy(), "lookahead must have shape"),
        ("expert_ids", lambda a: a[:0], "expert_ids must have at least one token, got 0"),
    ],
)
def test_wrong_types_and_shapes_need_no_full_check(
    file: Path, tensor: str, change: Callable[[np.ndarray], np.ndarray], message: str
) -> None:
    rewrite(file, lambda tensors: tensors | {tensor: change(tensors[tensor])})
    expect_error(file, message, check=False)


def damage(tensors: dict[str, np.ndarray], name: str, value: int) -> dict[str, np.ndarray]:
    changed = tensors[name].copy()
    changed[(3,) + (0,) * (changed.ndim - 1)] = value
    return tensors | {name: changed}


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("expert_ids", 5, "expert_ids must be below 5 (or 65535), got 5 at [3, 0, 0]"),
        ("lookahead", 9, "lookahead must be below 5 (or 65535), got 9 at [3, 0, 0, 0]"),
        ("gates", -1, "gates must be finite and at least 0, got -1.0 at [3, 0, 0]"),
        ("position", 8, "position must count up by one within a sequence, got 8 at token 3"),
        ("phase", 7, "phase must be 0 (prefill) or 1 (decode), got 7"),
    ],
)
def test_values_out_of_range_are_found_by_the_full_check(file: Path, name: str, value: int, message: str) -> None:
    rewrite(file, lambda tensors: damage(tensors, name, value))
    store.load(file, check=False)
    expect_error(file, message)


def test_a_changed_content_is_found_only_when_asked(file: Path) -> None:
    rewrite(file, lambda tensors: damage(tensors, "token_ids", 11))
    assert store.load(file).token_ids[3] == 11
    expect_error(file, "digest must be", "the content was changed", verify=True)


def test_a_trace_that_is_written_again_has_the_same_bytes(tmp_path: Path) -> None:
    """The library's order of the metadata differs from one file to the next: of twelve, hardly all are alike."""
    header = small_trace().header.model_copy(update={"made_by": 'a "quoted" é\t\x7f\x1f', "prompts_digest": "d"})
    trace = Trace.of(header, **dict(small_trace().arrays()))
    files = [store.save(trace, tmp_path / f"{number}.safetensors") for number in range(12)]
    assert len({path.read_bytes() for path in files}) == 1
    assert_same(store.load(files[0], verify=True), trace)
    assert load_file(files[0]).keys() == dict(trace.arrays()).keys()


def test_a_file_without_a_digest_has_nothing_to_verify(file: Path) -> None:
    rewrite(file, metadata=lambda metadata: {"moetwin_trace": metadata["moetwin_trace"]})
    assert_same(store.load(file, verify=True), small_trace())
    assert store.stored_digest(file) is None


def test_header_keeps_its_provenance(tmp_path: Path) -> None:
    header = TraceHeader(
        model="tiny", revision="r1", layers=3, experts=5, top_k=2, expert_bytes=(1, 2, 3), domains=("prose", "code"),
        prompts_digest="d", software={"torch": "2"}, licence="CC0-1.0", made_by="hand",
    )  # fmt: skip
    trace = Trace.of(header, **dict(small_trace().arrays()))
    assert store.load(store.save(trace, tmp_path / "a" / "b.safetensors")).header == header
