"""The distribution: a wheel holds the four packages and the command line, with their data, and nothing else."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("traces", "sim", "real", "analysis")
DATA = {".toml", ".json", ".jsonl", ".safetensors", ".html", ".j2", ".md", ".txt"}


@pytest.fixture(scope="module")
def project() -> dict[str, object]:
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


@pytest.fixture(scope="module")
def pins() -> dict[str, str]:
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    return dict(line.split("==") for line in lines if line and not line.startswith("#"))


@pytest.fixture(scope="module")
def wheel_names(tmp_path_factory: pytest.TempPathFactory) -> set[str]:
    """Names of the files in a wheel that is built from a copy, so that the checkout stays as it is."""
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    for package in PACKAGES:
        shutil.copytree(ROOT / package, source / package, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copytree(ROOT / "tests", source / "tests", ignore=shutil.ignore_patterns("__pycache__"))
    for file in ("moetwin.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / file, source / file)
    pip = [sys.executable, "-m", "pip", "wheel", str(source), "--no-deps", "--no-build-isolation", "--no-index"]
    done = subprocess.run([*pip, "-w", str(out)], capture_output=True, text=True, cwd=source, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    (wheel,) = out.glob("moetwin-*.whl")
    with zipfile.ZipFile(wheel) as archive:
        return set(archive.namelist())


@pytest.mark.slow
def test_top_level_of_the_wheel(wheel_names: set[str], project: dict[str, object]) -> None:
    top = {name.split("/")[0] for name in wheel_names}
    assert top == {*PACKAGES, "moetwin.py", f"moetwin-{project['version']}.dist-info"}


@pytest.mark.slow
def test_wheel_holds_every_module_and_data_file(wheel_names: set[str]) -> None:
    kept = {
        path.relative_to(ROOT).as_posix()
        for package in PACKAGES
        for path in (ROOT / package).rglob("*")
        if path.is_file() and path.suffix in DATA | {".py"} and not path.name.startswith(".")
        if (ROOT / "analysis" / "results") not in path.parents  # figures of this repository, not of the package
    }
    assert kept - wheel_names == set()


def test_direct_dependencies_have_lower_bounds_only(project: dict[str, object]) -> None:
    extras = [entry for group in project["optional-dependencies"].values() for entry in group]
    for entry in [*project["dependencies"], *extras]:
        assert re.fullmatch(r"[a-z0-9-]+(\[[a-z]+\])?>=[0-9.]+", entry), entry


def test_constraints_pin_every_direct_dependency_within_its_bound(
    project: dict[str, object], pins: dict[str, str]
) -> None:
    lowered = {name.lower().replace("_", "-"): _numbers(pin) for name, pin in pins.items()}
    for entry in [*project["dependencies"], *project["optional-dependencies"]["dev"]]:
        name, bound = re.sub(r"\[.*\]", "", entry).split(">=")
        assert lowered[name] >= _numbers(bound), entry


def test_torch_is_pinned_without_a_local_part(pins: dict[str, str]) -> None:
    assert pins["torch"] == "2.13.0"
    assert not [name for name in pins if name.startswith(("nvidia-", "triton"))]


def test_continuous_integration_runs_the_same_tests_as_a_developer() -> None:
    script = ROOT / ".ci" / "run"
    assert script.stat().st_mode & 0o111
    assert script.read_text(encoding="utf-8").rstrip().endswith("make test")


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", version))
