"""What the settings of a point come to, which values are mistakes, and what a run is known by."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import pytest

from sim.presets import preset
from sim.scenario import Scenario
from sim.sweep import keys
from sim.sweep.check import check_some_run, check_values
from sim.sweep.fields import scenarios_of
from sim.sweep.keys import code_version, key_of
from sim.systems import KINDS
from tests.sim.sweeping import COUNTING, grid, write_trace
from traces.errors import InputError


@pytest.fixture(autouse=True)
def _trace(tmp_path: Path) -> None:
    write_trace(tmp_path)
    (tmp_path / "own.py").write_text(COUNTING)


def scenario(folder: Path, **settings: Any) -> Scenario:
    (found,) = scenarios_of(grid(folder, {"seed": [1]}, **settings).points(), folder)
    return found


def checked(folder: Path, **settings: Any) -> None:
    check_values([scenario(folder, **settings)])


def test_settings_reach_the_scenario(tmp_path: Path) -> None:
    found = scenario(tmp_path, cache=8, hardware__link_gb_per_s=12, model__expert_bits=4.25, batch=2)
    assert (found.cache, found.batch, found.seed) == ("8", 2, 1)
    assert found.hardware_set == {"link_gb_per_s": 12}
    assert found.model_set == {"expert_bits": 4.25}
    assert found.trace == str(tmp_path / "t.safetensors")


def test_a_systems_fields_and_constants_are_changed(tmp_path: Path) -> None:
    changed = scenario(tmp_path, system="adapmoe", system__write_back=True, system__options__prefetch__depth=2)
    spec = changed.system.system
    assert (spec.write_back, spec.options["prefetch"]) == (True, {"depth": 2})
    assert spec.name == "adapmoe with write_back True, options.prefetch.depth 2"
    assert changed.system.uncalibrated == preset("adapmoe").uncalibrated


def test_another_policy_does_not_take_over_constants(tmp_path: Path) -> None:
    system = scenario(tmp_path, system="hybrimoe-code", system__evict="lru").system.system
    assert "evict" not in system.options
    assert preset("hybrimoe-code").system.options_of("evict")


def test_a_change_holds_without_calibration_too(tmp_path: Path) -> None:
    found = scenario(tmp_path, system="fiddler", system__evict="lru")
    assert found.system.fitted(calibrated=False)[0].evict == "lru"


@pytest.mark.parametrize("kind", sorted(KINDS))
def test_constants_are_tried_on_every_policy(tmp_path: Path, kind: str) -> None:
    for name, policy in KINDS[kind].items():
        for constant, value in policy.defaults.items():
            checked(tmp_path, **{f"system__{kind}": name, f"system__options__{kind}__{constant}": value})


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"trace": "none.safetensors"}, "none.safetensors"),
        ({"trace": "mixd"}, "did you mean mixed"),
        ({"calibration": "cod"}, "did you mean code"),
        ({"system": "hybrymoe"}, "did you mean hybrimoe"),
        ({"system": 3}, "system must be the name of a system, or a TOML file, got 3"),
        ({"system": "none.toml"}, "system file must be readable"),
        ({"system.evict": "lruu"}, "did you mean lru"),
        ({"system.scope": "layers"}, "scope"),
        ({"system.options.evict.alpha": 1}, "options.evict must be left out for lru, which has none, got alpha"),
        ({"system": "hybrimoe", "system.options.evict.alhpa": 1}, "did you mean alpha"),
        ({"system": "adapmoe", "system.options.prefetch.depth": 1.5}, "depth must be a whole number, got '1.5'"),
        ({"system": "adapmoe", "system.options.prefetch.depth": 0}, "depth"),
        ({"model": "moetwin-smal"}, "did you mean moetwin-small"),
        ({"model.experts": -1}, "experts must be greater than"),
        ({"quant": "int5"}, "quant must be one of"),
        ({"hardware": "rtx4091"}, "hardware must be a known name"),
        ({"hardware.link_gb_per_s": -1}, "link_gb_per_s must be greater than"),
        ({"hardware.disk_gb_per_s": 1}, "machine without a disk"),
        ({"cache": "a quarter"}, "cache must be a number of slots or a percentage, got 'a quarter'"),
        ({"cache": 0}, "cache must be between 1 and"),
        ({"gpu_memory": "lots"}, "gpu-memory must be a size such as 8GiB"),
        ({"host_memory": "lots"}, "host-memory must be a size such as 8GiB"),
        ({"calibration": "none.safetensors"}, "calibration must be an existing file, got "),
        ({"profile": "none.toml"}, "profile must be readable"),
        ({"compute_table": "none.csv"}, "compute-table must be readable"),
        ({"arrivals": "poison"}, "poison"),
        ({"arrivals": "none.csv"}, "none.csv"),
        ({"arrivals": "poisson", "rate_per_s": -1}, "rate_per_s must be greater than or equal to 0.000001, got -1.0"),
        ({"lookahead_recall": 1.5}, "recall must be"),
        ({"batch": 0}, "batch must be greater than 0, got 0"),
        ({"batch": 1.5}, "batch must be a valid integer"),
        ({"seed": "one"}, "seed must be a valid integer"),
    ],
)
def test_mistakes_are_found_before_anything_runs(tmp_path: Path, settings: dict[str, Any], words: str) -> None:
    wanted = grid(tmp_path, {"context": [100, 200]}, **settings)
    with pytest.raises(InputError) as caught:
        check_values(scenarios_of(wanted.points(), tmp_path))
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_grid_without_a_trace_is_a_mistake(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="trace must be given, got nothing"):
        scenarios_of([{"seed": 1}], tmp_path)


def test_the_last_point_is_checked_as_the_first(tmp_path: Path) -> None:
    wanted = grid(tmp_path, {"seed": [1, 2], "cache": ["25%", "50%", "much"]})
    with pytest.raises(InputError, match="got 'much'"):
        check_values(scenarios_of(wanted.points(), tmp_path))


def test_what_does_not_fit_is_no_mistake_unless_nothing_fits(tmp_path: Path) -> None:
    """1% of 32 experts is no slot: a run is refused for it, and the sweep only when all are."""
    both = scenarios_of(grid(tmp_path, {"cache": ["1%", "25%"]}).points(), tmp_path)
    check_values(both)
    check_some_run(both)
    with pytest.raises(InputError, match="cache must be between 1 and 32 slots, got 1%"):
        check_some_run(both[:1])


def test_a_key_is_of_the_content_and_not_of_names(tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.mkdir()
    shutil.copy(tmp_path / "t.safetensors", other / "u.safetensors")
    shutil.copy(tmp_path / "own.py", other / "mine.py")
    one = scenario(tmp_path, system__evict="own.py:Counting")
    same = scenario(other, trace="u.safetensors", system__evict="mine.py:Counting")
    assert key_of(one) == key_of(same)


def test_a_copy_of_a_published_system_has_its_key(tmp_path: Path) -> None:
    (tmp_path / "copy.toml").write_text('name = "copy"\nlike = "hybrimoe"\nsummary = "the same"')
    assert key_of(scenario(tmp_path, system="copy.toml")) == key_of(scenario(tmp_path, system="hybrimoe"))


@pytest.mark.parametrize(
    "change",
    [
        {"cache": "50%"},
        {"seed": 2},
        {"system": "fiddler"},
        {"system.options.evict.pause_s": 0.1},
        {"hardware.link_gb_per_s": 5},
        {"hardware": "own.toml"},
        {"model.expert_bits": 8},
        {"batch": 2},
        {"calibration": "code"},
        {"quant": "int4"},
    ],
)
def test_whatever_is_set_changes_the_key(tmp_path: Path, change: dict[str, Any]) -> None:
    (tmp_path / "own.toml").write_text('name = "m"\ngpu = "rtx4090"\ncpu = "epyc9374f"\nlink = "pcie4-x16"')
    start = {"trace": "t.safetensors", "model": "moetwin-small", "system.evict": "own.py:Counting"}
    both = scenarios_of([start, start | change], tmp_path)
    assert key_of(both[0]) != key_of(both[1])


def test_a_file_that_changes_changes_the_key(tmp_path: Path) -> None:
    """Also one that another names, and a trace that is as large and as old as it was."""
    (tmp_path / "own.toml").write_text('name = "m"\ngpu = "rtx4090"\ncpu = "epyc9374f"\nlink = "link.toml"')
    (tmp_path / "link.toml").write_text('source = "mine"\nbytes_per_s = 1e9')
    one = scenario(tmp_path, hardware="own.toml", system__evict="own.py:Counting")
    found = [key_of(one)]
    (tmp_path / "link.toml").write_text('source = "mine"\nbytes_per_s = 2e9')
    found.append(key_of(one))
    (tmp_path / "own.py").write_text(COUNTING.replace("return block", "return -block"))
    found.append(key_of(one))
    (tmp_path / "t.safetensors").unlink()
    write_trace(tmp_path, seed=2)
    os.utime(tmp_path / "t.safetensors", ns=(1, 1))
    found.append(key_of(one))
    assert len(set(found)) == 4


def test_other_code_changes_the_key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one = scenario(tmp_path)
    before = key_of(one)
    monkeypatch.setattr(keys, "code_version", lambda: "other")
    assert key_of(one) != before


def test_the_code_is_what_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A digest over copies of the packages: of engines and catalogues, but not of command lines."""
    for package in (keys.sim, keys.traces):
        folder = Path(str(package.__file__)).parent
        shutil.copytree(folder, tmp_path / package.__name__, ignore=shutil.ignore_patterns("__pycache__", "data"))
        monkeypatch.setattr(package, "__file__", str(tmp_path / package.__name__ / "__init__.py"))
    before = code_version.__wrapped__()
    (tmp_path / "sim" / "cli_run.py").write_text("x = 1")
    (tmp_path / "sim" / "options.py").write_text("x = 1")
    assert code_version.__wrapped__() == before
    for name in ("sim/engine.py", "traces/workload.py", "sim/spec/hardware.toml", "sim/policies/evict/lru.py"):
        (tmp_path / name).write_text("x = 1")
        after = code_version.__wrapped__()
        assert after != before, name
        before = after
