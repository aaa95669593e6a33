"""The benchmark of other programs, and that of the executor's limits: what they measure, keep and print."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pandas as pd
import pytest
import torch
import typer
from typer.testing import CliRunner, Result

from benchmarks import executor_limits, peer_programs, peers
from sim.spec.profile import Profile
from traces.errors import InputError
from traces.schema import Phase

PREFILL, DECODE = int(Phase.PREFILL), int(Phase.DECODE)
WORKLOAD: Any = SimpleNamespace(steps=[SimpleNamespace(phase=phase) for phase in (PREFILL, DECODE, DECODE)])


def run(main: Any, *words: str) -> Result:
    app = typer.Typer()
    app.command()(main)
    return CliRunner().invoke(app, ["--device", "cpu", "--tokens", "2", "--repeats", "1", *words])


def run_peers(*words: str) -> Result:
    return run(peers.main, "--systems", "mixtral-offloading,ktransformers", *words)


class Fake:
    """A program that passes logits through a head, and can fail."""

    def __init__(self, name: str, choice: int, error: Exception | None = None) -> None:
        self.name, self.note, self._choice, self._error = name, f"note of {name}", choice, error
        self._head = torch.nn.Identity()
        self.loaded: Any = SimpleNamespace(model=SimpleNamespace(get_output_embeddings=lambda: self._head))

    @contextmanager
    def ready(self) -> Iterator[None]:
        if self._error is not None:
            raise self._error
        yield

    def run(self, workload: Any, lap: peer_programs.Lap) -> None:
        for at, _ in enumerate(workload.steps):
            logits = torch.zeros(1, 2, 5)
            logits[0, 0, 0] = 2.0  # an earlier position, which nobody should look at
            logits[0, 1, self._choice if at else 1] = 1.0
            self._head(logits)
            lap()


def compared(*programs: Fake, **options: Any) -> list[peers.Row]:
    bench: Any = SimpleNamespace(workload=WORKLOAD, limit_bytes=7)
    return peers.compared(programs, bench, 2, **options)


def test_ours_run_beside_what_cannot_run_here_and_says_why(tmp_path: Path) -> None:
    out = tmp_path / "peers.json"
    result = run_peers("--out", str(out))
    assert result.exit_code == 0, result.output
    kept = json.loads(out.read_text(encoding="utf-8"))
    rows = {row["name"]: row for row in kept["programs"]}
    assert [*rows] == ["mixtral-offloading", "ktransformers", "moe-policylang", "accelerate"]
    for name in ("mixtral-offloading", "ktransformers"):
        assert len(rows[name]["tokens_per_s"]) == 1
        assert rows[name]["tokens_per_s"][0] > 0
        assert rows[name]["same_tokens"] == 1.0
        assert rows[name]["planned_bytes"] == kept["limit_bytes"]
    assert rows["accelerate"]["not_run"] == peers.FILES_ONLY
    assert rows["moe-policylang"]["not_run"].startswith(("moe-policylang is not installed", "its runtime needs a CUDA"))
    assert f"accelerate: not run: {peers.FILES_ONLY}" in result.stdout


def test_accelerate_chooses_the_same_tokens_under_its_own_limit() -> None:
    pytest.importorskip("accelerate")
    result = run_peers("--peers", "accelerate-files", "--gpu-memory", "30MB", "--json")
    assert result.exit_code == 0, result.output
    figures = json.loads(result.stdout)
    row = figures["programs"][-1]
    assert (figures["limit_bytes"], row["planned_bytes"], row["not_run"]) == (30_000_000, 30_000_000, "")
    assert row["same_tokens"] == 1.0
    assert row["note"].endswith("modules in files")
    assert not row["note"].startswith("0 of")


def test_the_greedy_choice_of_the_last_position_is_compared() -> None:
    same, other = compared(Fake("a", 3), Fake("b", 3)), compared(Fake("a", 3), Fake("b", 4))
    assert [row.same_tokens for row in same] == [1.0, 1.0]
    assert other[1].same_tokens == pytest.approx(1 / 3)  # the pass of the prompt chooses alike
    assert [len(row.tokens_per_s) for row in same] == [2, 2]
    assert [row.planned_bytes for row in same] == [7, 7]


def test_a_program_that_fails_does_not_end_the_others() -> None:
    unable, broken = peer_programs.UnableError("no room"), TypeError("its fault")
    rows = compared(Fake("a", 3), Fake("b", 3, unable), Fake("c", 3, broken), Fake("d", 3))
    assert [row.not_run for row in rows] == ["", "no room", "TypeError: its fault", ""]
    assert [len(row.tokens_per_s) for row in rows] == [2, 0, 0, 2]


def test_one_turn_is_counted_even_where_there_is_no_time_for_it() -> None:
    assert [len(row.tokens_per_s) for row in compared(Fake("a", 3), Fake("b", 3), left_s=0.0)] == [1, 1]


def test_the_first_pass_is_no_decode_token(monkeypatch: pytest.MonkeyPatch) -> None:
    times = iter([100.0, 100.5, 102.0])
    monkeypatch.setattr(peers.time, "perf_counter", lambda: next(times))
    laps = peers.Laps()
    for _ in range(3):
        laps()
    assert laps.tokens_per_s(WORKLOAD) == 2 / 2.0


def test_mistakes_are_told_before_anything_is_loaded(tmp_path: Path) -> None:
    out = tmp_path / "peers.json"
    out.write_text("mine", encoding="utf-8")
    refused, unknown = run_peers("--out", str(out)), run_peers("--peers", "acelerate")
    assert isinstance(refused.exception, InputError)
    assert "out must be a new file" in str(refused.exception)
    assert out.read_text(encoding="utf-8") == "mine"
    assert "accelerate" in str(unknown.exception)


def test_seconds_under_way_count_once_where_copies_overlap() -> None:
    copies = pd.DataFrame({"start_s": [5.0, 0.0, 1.0, 2.0], "end_s": [6.0, 4.0, 2.0, 4.5]})
    assert executor_limits.union_s(copies) == 4.5 + 1.0


def run_of(bytes_: list[int], python_s: list[float]) -> Any:
    """A prompt of 2 seconds and a token of 1 second, with copies that were under way for half of the time."""
    phases = [PREFILL, DECODE]
    return SimpleNamespace(
        layers=pd.DataFrame({"phase": phases, "bytes": bytes_, "python_s": python_s}),
        tokens=pd.DataFrame({"phase": phases, "start_s": [0.0, 2.0], "end_s": [2.0, 3.0]}),
        events=pd.DataFrame(
            {
                "resource": ["link", "link", "gpu", "link"],
                "kind": ["copy", "copy", "expert", "prefetch"],
                "start_s": [0.0, 2.0, 0.0, 0.0],
                "end_s": [1.0, 2.5, 3.0, 3.0],
            }
        ),
    )


def test_the_share_of_the_link_is_bytes_over_seconds_over_bandwidth() -> None:
    shares = executor_limits.link_share([run_of([180, 30], [1.0, 2.0])], 100.0)
    assert shares == {"prompt": 0.9, "decode": 0.3, "copies_under_way": pytest.approx(1.4)}


def test_python_in_a_layer_is_that_of_decode_tokens() -> None:
    runs = [run_of([0, 0], [9.0, 100e-6]), run_of([0, 0], [9.0, 200e-6])]
    assert executor_limits.python_us(runs) == {"median": pytest.approx(150.0), "p90": pytest.approx(190.0)}


def test_the_limits_of_the_executor_are_kept_as_they_are_printed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    known = Profile.load(
        Path(__file__).parent.parent / "analysis/results/xeon-2core-cpu-small/moetwin-small/profile.toml"
    )
    monkeypatch.setattr(executor_limits, "calibrate", lambda *args, **options: known)
    out, profile = tmp_path / "limits.json", tmp_path / "here.toml"
    result = run(executor_limits.main, "--prompt", "4", "--keep-profile", str(profile), "--out", str(out))
    assert result.exit_code == 0, result.output
    kept = json.loads(out.read_text(encoding="utf-8"))
    assert kept["profile"] == Profile.load(profile).digest
    assert [(row["system"], row["cache"]) for row in kept["memory"]] == [*executor_limits.RUNS]
    assert all(share > 0 for share in kept["link_share"].values())
    assert kept["python_us"]["mixtral-offloading 25%"]["median"] > 0
    assert f"{kept['link_share']['prompt']:.0%} of it in a prompt" in result.stdout
