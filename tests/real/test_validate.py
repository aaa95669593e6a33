"""The measuring half of a validation on a tiny model: what it writes, how it goes on, and when it stops."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from real import validate
from real.estimates import LOAD_S, REPEAT_S, Took
from real.models.load import load_spec
from real.subjects import WIDE, Subject, beginnings, subject
from real.validate import CONSTANT_REPEATS, JUDGING_S, Settings, Validation
from sim.profile import ProfileCosts
from sim.results import RunResult
from sim.spec.profile import Profile
from sim.target import retarget
from tests.real import tiny
from traces.errors import InputError
from traces.schema import Phase, Trace
from traces.shipped import find_trace
from traces.store import load as load_trace
from traces.synthetic import Sizes, zipf

SYSTEMS, CACHES, REPEATS = ("ktransformers", "hybrimoe"), ("25%", "50%"), 2
PIECES = 1 + len(SYSTEMS) * (CONSTANT_REPEATS + REPEATS * len(CACHES))
SPEC = tiny.SPECS["olmoe"].model_copy(update={"layers": 5, "moe_layers": 5})

SETTINGS = Settings(
    device="cpu",
    models=("tiny",),
    dtype="fp32",
    systems=SYSTEMS,
    caches=CACHES,
    repeats=REPEATS,
    tokens=3,
    sequences=1,
    trace="a",
    calibration="b",
)


def routing(seed: int, sequences: int = 2) -> Trace:
    sizes = Sizes(
        sequences=sequences, prompt_tokens=4, new_tokens=5, layers=SPEC.moe_layers, experts=SPEC.experts,
        top_k=SPEC.top_k, expert_bytes=SPEC.expert_bytes, lookahead=3,
    )  # fmt: skip
    return retarget(zipf(np.random.default_rng(seed), sizes), SPEC)


@pytest.fixture(scope="module")
def profile(tmp_path_factory: pytest.TempPathFactory) -> Profile:
    """What calibrating the tiny model gives, once for all tests of this file."""
    one = Validation(tmp_path_factory.mktemp("profile") / "v", SETTINGS, [tiny_subject()])
    calls: list[int] = []

    def stop() -> None:
        calls.append(1)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        one.run(advance=stop)
    return Profile.load(one.out / SPEC.name / "profile.toml")


def tiny_subject() -> Subject:
    learned = routing(1)
    judged = beginnings(routing(2), 1, 3, besides=learned)
    return Subject(SPEC.name, SPEC, judged, learned, lambda: load_spec(SPEC, model_type="olmoe", seed=3))


@pytest.fixture
def validation(tmp_path: Path, profile: Profile, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Validation]:
    """A validation in a new folder, whose calibration takes no time."""

    def ready(machine: object, *, progress: Callable[[str], None], **given: object) -> Profile:
        progress("nothing")
        return profile

    monkeypatch.setattr(validate, "calibrate", ready)
    return lambda **changes: Validation(tmp_path / "v", replace(SETTINGS, **changes), [tiny_subject()])


def test_every_run_is_measured_and_stored_with_what_judging_needs(validation: Callable[..., Validation]) -> None:
    one = validation()
    assert one.progress().total == PIECES
    told: list[str] = []
    outcome = one.run(say=told.append)
    assert outcome.complete
    assert (outcome.done, outcome.missing) == (PIECES, {})
    folder = one.out / SPEC.name
    assert len([*folder.glob("runs/*/*/r*/run.json")]) == len(SYSTEMS) * len(CACHES) * REPEATS
    assert len([*folder.glob("constants/*/r*/run.json")]) == len(SYSTEMS) * CONSTANT_REPEATS
    run = RunResult.load(folder / "runs" / "hybrimoe" / "25pct" / "r1")
    assert run.info.source == "measured"
    assert run.info.workload["cache"] == "25%"
    assert run.info.costs == ProfileCosts(Profile.load(folder / "profile.toml")).name
    assert run.info.calibration_digest == load_trace(folder / "calibration.safetensors").digest
    assert run.info.recorded == ""
    assert run.info.trace_digest == load_trace(folder / "trace.safetensors").digest
    assert run.info.capacity_slots == SPEC.moe_layers * SPEC.experts // 4
    assert one.progress().notes == ()
    assert {"digest", "systems"} <= json.loads((one.out / "settings.json").read_text()).keys()
    assert {"date", "processor", "torch"} <= json.loads((one.out / "environment.json").read_text()).keys()
    assert any("hybrimoe at 50%" in text for text in told)


def test_repeats_are_interleaved(validation: Callable[..., Validation]) -> None:
    told: list[str] = []
    validation().run(say=told.append)
    runs = [text for text in told if " at " in text and "%" in text]
    first = runs[: len(runs) // REPEATS]
    assert runs == first * REPEATS
    assert len({*first}) == len(SYSTEMS) * len(CACHES)


def test_an_interrupt_loses_one_run_and_the_next_call_goes_on(validation: Callable[..., Validation]) -> None:
    done: list[int] = []

    def interrupt() -> None:
        done.append(1)
        if len(done) == 4:
            raise KeyboardInterrupt

    one = validation()
    with pytest.raises(KeyboardInterrupt):
        one.run(advance=interrupt)
    assert one.progress().done == 4
    kept = {path: path.stat().st_mtime_ns for path in one.out.rglob("*.parquet")}
    again = validation()
    count: list[int] = []
    assert again.run(advance=lambda: count.append(1)).complete
    assert len(count) == PIECES - 3  # the profile is told of again
    assert {path: path.stat().st_mtime_ns for path in kept} == kept
    assert not [path for path in one.out.rglob("*.partial")]


def test_a_complete_validation_loads_no_model(validation: Callable[..., Validation]) -> None:
    validation().run()
    told: list[str] = []
    assert validation().run(say=told.append).complete
    assert told == []


@pytest.mark.parametrize("replaced", [False, True])
def test_runs_of_a_profile_that_is_gone_or_replaced_are_refused(
    validation: Callable[..., Validation], profile: Profile, replaced: bool
) -> None:
    one = validation()
    one.run()
    folder = one.out / SPEC.name
    kept = (folder / "profile.toml").read_bytes()
    (folder / "profile.toml").unlink()
    if replaced:
        profile.model_copy(update={"name": "elsewhere"}).save(folder / "profile.toml")
    with pytest.raises(InputError, match=r"profile\.toml must be the one that the runs beside it") as error:
        validation()
    assert ProfileCosts(profile).name in str(error.value)
    assert f"got {'profile elsewhere' if replaced else 'none'}" in str(error.value)
    assert f"remove {folder / 'runs'} and {folder / 'constants'} to measure them again" in str(error.value)
    (folder / "profile.toml").write_bytes(kept)
    assert validation().progress().complete


def test_a_profile_that_is_gone_is_measured_again_where_no_run_is_kept(validation: Callable[..., Validation]) -> None:
    one = validation()
    one.run()
    folder = one.out / SPEC.name
    for name in ("runs", "constants"):
        shutil.rmtree(folder / name)
    half = folder / "runs" / "hybrimoe" / "25pct" / ".r1.1.partial"
    half.mkdir(parents=True)
    (half / "run.json").write_text("{")
    (folder / "profile.toml").unlink()
    assert validation().progress().done == 0


def test_it_stops_before_its_time_limit(validation: Callable[..., Validation]) -> None:
    now = [0.0]

    def run_takes_ten_seconds(text: str) -> None:
        now[0] += 10.0 if " at " in text else 0.0

    set_aside_s = JUDGING_S * len(SYSTEMS) * len(CACHES)
    outcome = validation().run(limit_s=100.0, say=run_takes_ten_seconds, now_s=lambda: now[0])
    assert 0 < outcome.done < PIECES
    assert 100.0 - set_aside_s - 2 * 10.0 <= now[0] <= 100.0 - set_aside_s
    assert len(outcome.missing[SPEC.name]) == PIECES - outcome.done
    assert validation().run().complete


@pytest.mark.parametrize(
    ("changes", "told"),
    [({"repeats": 3}, "repeats 2 in place of 3"), ({"caches": ("25%",)}, "caches 25%,50% in place of 25%")],
)
def test_a_folder_of_another_validation_is_refused(
    validation: Callable[..., Validation], changes: dict[str, object], told: str
) -> None:
    validation()
    with pytest.raises(InputError, match=told) as error:
        validation(**changes)
    assert "\n" not in str(error.value)


def test_two_of_one_name_are_refused_before_anything_is_written(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=f"models must have different names, got {SPEC.name} 2 times"):
        Validation(tmp_path / "v", replace(SETTINGS, models=("a/tiny", "b/tiny")), [tiny_subject(), tiny_subject()])
    (tmp_path / "hybrimoe.toml").write_text('like = "ktransformers"\n')
    with pytest.raises(InputError, match="systems must have different names, got hybrimoe 2 times"):
        Validation(tmp_path / "v", own_system(tmp_path / "hybrimoe.toml", "hybrimoe"), [tiny_subject()])
    assert not (tmp_path / "v").exists()


def own_system(*systems: Path | str) -> Settings:
    return replace(SETTINGS, systems=tuple(map(str, systems)))


def test_an_edited_system_or_policy_is_refused_by_name(tmp_path: Path) -> None:
    system, policy = tmp_path / "mine.toml", tmp_path / "mine.py"
    code = "from sim.policies.evict.lru import Lru\n\n\nclass Mine(Lru):\n    pass\n"
    text = 'like = "ktransformers"\nevict = "mine.py:Mine"\n'

    def begin() -> None:
        Validation(tmp_path / "v", own_system(system, "hybrimoe"), [tiny_subject()])

    policy.write_text(code)
    system.write_text(text)
    begin()
    begin()
    system.write_text(f'{text}prefetch = "next-router"\n')
    with pytest.raises(InputError, match=f"with another system {system}$"):
        begin()
    system.write_text(text)
    begin()
    policy.write_text(f"{code}    own = 1\n")
    with pytest.raises(InputError, match=f"with another system {system}$"):
        begin()


def test_an_edited_model_is_refused_by_name(tmp_path: Path) -> None:
    Validation(tmp_path / "v", SETTINGS, [tiny_subject()])
    edited = replace(tiny_subject(), spec=SPEC.model_copy(update={"vocab": SPEC.vocab + 1}))
    with pytest.raises(InputError, match=r"of the same validation, got .* with another model tiny$"):
        Validation(tmp_path / "v", SETTINGS, [edited])


def test_nothing_is_loaded_that_is_not_estimated_to_fit(validation: Callable[..., Validation], tmp_path: Path) -> None:
    one, told = validation(), list[str]()
    outcome = one.run(limit_s=5.0, say=told.append)
    assert told == []
    (note,) = outcome.notes
    assert note.startswith(f"{SPEC.name} was not begun: it needs about 7 s for its first piece, and 4 s")
    took = Took(one.out, "cpu", REPEATS)
    took.keep(SPEC, load=0.0, calibrate=0.0, run=0.0)
    assert one.run(limit_s=600.0, say=told.append).complete
    assert told[0] == f"loading {SPEC.name}"


def test_calibrating_is_not_begun_when_loading_took_its_time(
    validation: Callable[..., Validation], monkeypatch: pytest.MonkeyPatch
) -> None:
    now, told = [0.0], list[str]()
    one = validation()
    slow = Subject(SPEC.name, SPEC, one.subjects[0].judged, one.subjects[0].learned, lambda: now.append(90.0) or model)
    model = tiny_subject().load()
    one.subjects = [slow]
    outcome = one.run(limit_s=100.0, say=told.append, now_s=lambda: now[-1])
    assert told == [f"loading {SPEC.name}"]
    assert outcome.done == 0
    assert Took(one.out, "cpu", REPEATS).estimate(SPEC, "load") == 90.0


def test_estimates_are_what_was_measured_and_else_as_for_others(tmp_path: Path) -> None:
    took = Took(tmp_path, "cpu", 7)
    assert took.estimate(SPEC, "load") >= LOAD_S
    assert took.estimate(SPEC, "calibrate") >= 7 * REPEAT_S
    took.keep(SPEC, load=2.0, calibrate=30.0, run=1.0)
    took.keep(SPEC, run=4.0)
    took.keep(SPEC, run=3.0)
    again = Took(tmp_path, "cpu", 7)
    assert [again.estimate(SPEC, what) for what in ("load", "calibrate", "run")] == [2.0, 30.0, 4.0]
    smaller = SPEC.model_copy(update={"name": "smaller", "layers": 4, "moe_layers": 4})
    larger = SPEC.model_copy(update={"name": "larger", "layers": 50, "moe_layers": 50})
    assert again.estimate(smaller, "calibrate") == 30.0
    assert again.estimate(larger, "calibrate") > 2 * 30.0


def test_a_folder_of_another_machine_is_refused(validation: Callable[..., Validation]) -> None:
    path = validation().out / "environment.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "cores": "96"}))
    with pytest.raises(InputError, match=r"of this machine and these versions, got .* with cores 96 in place of"):
        validation()


def test_a_folder_with_other_files_is_left_alone(validation: Callable[..., Validation], tmp_path: Path) -> None:
    (tmp_path / "v").mkdir()
    (tmp_path / "v" / "mine.txt").write_text("kept")
    with pytest.raises(InputError, match="out must be an empty or new folder"):
        validation()
    assert [path.name for path in (tmp_path / "v").iterdir()] == ["mine.txt"]


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"systems": ("layer-split",)}, "got layer-split, simulated only"),
        ({"systems": ("hybrimo",)}, "hybrimoe"),
        ({"caches": ("0%",)}, "caches must be between 1 and"),
    ],
)
def test_what_could_not_run_is_refused_before_anything_is_written(
    validation: Callable[..., Validation], tmp_path: Path, changes: dict[str, object], told: str
) -> None:
    with pytest.raises(InputError, match=told):
        validation(**changes)
    assert not (tmp_path / "v").exists()


def test_the_judged_sequences_are_none_that_calibration_has() -> None:
    recorded, learned = (load_trace(find_trace(name)) for name in ("mixed", "code"))
    one = subject(WIDE, "fp32", recorded, learned, sequences=3, tokens=2)
    assert one.spec.expert_bytes == 12_582_912
    assert len(np.unique(one.judged.sequence)) == 3
    known = {learned.token_ids[learned.sequence == each][:20].tobytes() for each in np.unique(learned.sequence)}
    for each in np.unique(one.judged.sequence):
        rows = one.judged.sequence == each
        assert one.judged.token_ids[rows][:20].tobytes() not in known
        assert (one.judged.phase[rows] == Phase.DECODE).sum() == 2
        assert (one.judged.phase[rows] == Phase.PREFILL).sum() > 0
    assert len({*one.judged.header.domains}) == 3
    with pytest.raises(InputError, match="26 sequences that calibration has not, got 25"):
        subject(WIDE, "fp32", recorded, learned, sequences=26, tokens=2)


def test_a_model_of_other_dimensions_gets_routing_like_the_recording() -> None:
    recorded, learned = (load_trace(find_trace(name)) for name in ("mixed", "code"))
    one = subject("olmoe-1b-7b", "bf16", recorded, learned, sequences=2, tokens=3)
    for trace in (one.judged, one.learned):
        header = trace.header
        assert (header.layers, header.experts, header.top_k) == (16, 64, 8)
        assert header.expert_bytes == (one.spec.expert_bytes,) * 16
        assert header.synthetic
    assert one.spec.dtype == "bf16"
    assert (one.judged.phase == Phase.DECODE).sum() == 6
    assert one.judged.lookahead_depth == 3
