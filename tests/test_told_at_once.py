"""Mistakes that are told before torch is imported, which takes seconds, and sizes that no run could have."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

import moetwin
from tests.commanding import SMALL, refused, run
from traces import store, synthetic
from traces.shipped import find_trace

pytestmark = pytest.mark.usefixtures("own_folder")

WITHOUT_TORCH = {
    "trace record --out t.safetensors --prompts nope.txt": "prompts must be a readable file, got nope.txt",
    "trace record --out t.safetensors --prompts empty.txt": "empty.txt: must hold a prompt, got an empty file",
    "trace record --out t.safetensors --domains nope": "domain must be a known name, got 'nope'",
    "trace record --out t.safetensors --temperature nan": "temperature must be 0, or at least 0.001 and finite",
    "trace record --out t.safetensors --model moetwin-smal": "model must be a known name, got 'moetwin-smal' (did you",
    "trace record --out t.safetensors --model hollow": "model must be a checkpoint folder with a config.json, got ",
    "decode --prompt a --temperature 1e-320": "temperature must be 0, or at least 0.001 and finite, got 1e-320",
    "decode --prompt a --temperature inf": "temperature must be 0, or at least 0.001 and finite, got inf",
    "decode --prompt a --model nope": "model must be a known name, got 'nope'",
    "decode --prompt a --repeats 3": "repeats must be 1 without routing, got 3",
    "decode --routing nope": "routing must be a known name, got 'nope'",
    "decode --routing nope.safetensors": "routing must be an existing file, got nope.safetensors",
    "decode --routing code --calibration nope": "calibration must be a known name, got 'nope'",
    "calibrate --out h.toml --model nope": "model must be a known name, got 'nope'",
    "calibrate --out h.txt": "out must end in .toml, as a profile is such a file, got h.txt",
    "simulate mixed --calibration nope": "calibration must be a known name, got 'nope'",
    "cache mixed --calibration nope.safetensors": "calibration must be an existing file, got nope.safetensors",
}
"""Command lines, and how the error about each begins."""

PROGRAM = """
import json, sys
sys.modules["torch"] = sys.modules["transformers"] = None  # an import of either fails
import moetwin
from typer.testing import CliRunner
for words in json.loads(sys.argv[1]):
    result = CliRunner().invoke(moetwin.app, words.split())
    print(json.dumps([words, result.exit_code, result.stderr]))
"""


def test_what_is_wrong_at_first_sight_is_told_without_torch(tmp_path: Path) -> None:
    (tmp_path / "empty.txt").touch()
    (tmp_path / "hollow").mkdir()
    words = [sys.executable, "-c", PROGRAM, json.dumps([*WITHOUT_TORCH])]
    root = {"PYTHONPATH": str(Path(moetwin.__file__).parent)}
    done = subprocess.run(words, capture_output=True, text=True, check=False, env=root)
    assert done.returncode == 0, done.stderr
    told = [json.loads(line) for line in done.stdout.splitlines()]
    assert [(words, code) for words, code, _ in told] == [(words, 2) for words in WITHOUT_TORCH]
    for words, _, stderr in told:
        assert stderr.startswith(f"error: {WITHOUT_TORCH[words]}"), words
        assert len(stderr.splitlines()) == 1


@pytest.mark.parametrize(
    "command",
    [
        "simulate mixed",
        "cache mixed",
        "cache curve mixed",
        "decode --prompt a",
        "decode --routing mixed",
        "trace record --out t.safetensors",
    ],
)
@pytest.mark.parametrize("batch", ["65537", "9" * 23])
def test_more_lanes_than_anybody_has_are_refused(command: str, batch: str) -> None:
    assert (
        refused(*command.split(), "--batch", batch)
        == f"error: batch must be less than or equal to 65536, got '{batch}'"
    )


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("link.gb_per_s=1e300", "link_gb_per_s must be less than or equal to 1000000000, got 1e+300"),
        ("link.latency_us=1e308", "link_latency_us must be less than or equal to 3600000000, got 1e+308"),
    ],
)
def test_a_machine_beyond_all_bounds_is_refused(setting: str, message: str) -> None:
    assert refused("simulate", "mixed", "--hardware-set", setting) == f"error: {message}"


@pytest.mark.parametrize(
    "words",
    [
        ("simulate", "mixed", "--model", ""),
        ("simulate", "mixed", "--hardware", ""),
        ("simulate", "mixed", "--out", ""),
        ("cache", "mixed", "--capacity", ""),
        ("trace", "slice", "mixed", "--out", "s.safetensors", "--layers", ""),
        ("trace", "slice", "mixed", "--out", "s.safetensors", "--phase="),
        ("trace", "slice", "mixed", "--out", "s.safetensors", "--sequences", ""),
        ("decode", "--prompt", ""),
    ],
)
def test_an_empty_word_is_not_the_same_as_none(words: tuple[str, ...]) -> None:
    option = words[-1] or words[-2]
    assert refused(*words) == f"error: {option.strip('-=')} must hold something, got ''"


def changed(name: str, seed: int) -> tuple[str, str]:
    """A trace whose content is no longer that of its digest, and its digests as stored and as it is."""
    file = store.save(synthetic.generate("zipf", seed, SMALL), name)
    content, layout = bytearray(file.read_bytes()), store._read_layout(file)
    content[layout[1] + layout[0]["token_ids"]["data_offsets"][0]] ^= 1
    stored = store.load(file).digest
    file.write_bytes(content)
    return stored, store.load(file).digest


def test_a_changed_content_is_told_wherever_a_digest_tells_traces_apart() -> None:
    told = {}
    for seed, name in enumerate(("t.safetensors", "c.safetensors")):
        stored, found = changed(name, seed)
        told[name] = f"{name}: the digest is {found} and not {stored} as stored, so that the content was changed"
    note, also = (f"note: {told[name]}" for name in ("t.safetensors", "c.safetensors"))
    assert run("trace", "info", "t.safetensors").stderr.splitlines() == [note]
    replayed = run("cache", "t.safetensors", "--policies", "static", "--calibration", "c.safetensors", "--json")
    assert replayed.exit_code == 0, replayed.output
    assert replayed.stderr.splitlines()[:2] == [note, also]
    simulated = run("simulate", "t.safetensors", "--model", "moetwin-small", "--json")
    assert json.loads(simulated.stdout)["notes"][0] == told["t.safetensors"]
    decoded = run("decode", "--routing", "t.safetensors", "--device", "cpu", "--json")
    assert decoded.exit_code == 0, decoded.output
    assert decoded.stderr.splitlines() == [note]
    assert "stored" not in run("trace", "info", str(find_trace("code"))).stderr


def test_the_judged_trace_under_another_name_and_with_other_bytes_is_no_calibration() -> None:
    """Neither the digest that a file states, nor the bytes of its experts, make another trace of it."""
    trace = synthetic.generate("zipf", 0, SMALL)
    content = store.save(trace, "t.safetensors").read_bytes()
    Path("c.safetensors").write_bytes(content.replace(trace.digest.encode(), b"0" * 64))
    assert store.stored_digest("c.safetensors") == "0" * 64
    words = ("simulate", "t.safetensors", "--model", "moetwin-small", "--calibration")
    for same in ("t.safetensors", "c.safetensors"):
        assert "error: calibration trace must be another than the one replayed" in run(*words, same).stderr
    store.save(synthetic.generate("zipf", 1, SMALL), "other.safetensors")
    assert run(*words, "other.safetensors").exit_code == 0
