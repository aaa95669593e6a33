"""All figures of a machine with a GPU, from one command: see docs/gpu.md.

    python3 -m benchmarks.gpu_suite --out results/gpu [--part 1|2|3] [--time-limit 540] [--wheels FOLDER]

It imports nothing but the standard library, so that it can say what is missing. Every step is a program of its own with
a limit of time; what a step leaves is packed after it, so that a call that is cut short loses one step at the most.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from benchmarks import gpu_summary

ROOT = Path(__file__).resolve().parent.parent
MODELS = {"1": "olmoe-1b-7b", "2": "deepseek-v2-lite", "3": "qwen3-30b-a3b"}
QUICK_MODEL = "moetwin-small"
NEEDED = {  # by the name to import: what pip calls it
    "jinja2": "jinja2", "matplotlib": "matplotlib", "numba": "numba", "numpy": "numpy", "pandas": "pandas",
    "pyarrow": "pyarrow", "pydantic": "pydantic", "pydantic_core": "pydantic_core", "rich": "rich",
    "annotated_types": "annotated-types", "typing_inspection": "typing-inspection", "safetensors": "safetensors",
    "scipy": "scipy", "simpy": "simpy", "tokenizers": "tokenizers", "tomli_w": "tomli-w", "torch": "torch",
    "transformers": "transformers", "typer": "typer", "pytest": "pytest", "hypothesis": "hypothesis",
}  # fmt: skip
OPTIONAL = {"accelerate": "accelerate", "moe_policylang": "moe-policylang", "lark": "lark", "xdist": "pytest-xdist"}
TOO_LONG = "ended at its limit of time"
LEAST_DISK_BYTES = 2 * 10**9
MARGIN_S, TO_END_S = 15.0, 10.0
"""Kept back of the time limit to pack at the end, and of a step's to end by itself."""
SYSTEMS = "mixtral-offloading,adapmoe,ktransformers,fiddler,hybrimoe,dali"
PART_BYTES, MOST_PARTS = 15 * 2**20, 4
"""The archive is written in parts of at most this size, of which there are at most so many."""
LARGE = ("operations.parquet", "events.parquet")
"""The tables of a run that the archive leaves out when it grows too large, the last of them first."""


@dataclass(frozen=True)
class Step:
    """A program to run: ``reserve_s`` is what it gets at least, when those before it take all they can.

    With a ``unit`` it is told its limit in seconds, followed by it, and ends by itself; a ``profile`` is handed to it
    once there is one.
    """

    name: str
    words: tuple[str, ...]
    reserve_s: float
    limit_s: float
    unit: str | None = None
    profile: Path | None = None

    def command(self, given_s: float) -> list[str]:
        """What follows the interpreter's name."""
        limit = [] if self.unit is None else ["--time-limit", f"{max(1, int(given_s - TO_END_S))}{self.unit}"]
        profile = ["--profile", str(self.profile)] if self.profile is not None and self.profile.exists() else []
        return [*self.words, *limit, *profile]


@dataclass
class Suite:
    """Where the suite works, and what it has done: by step, how it ended and after how many seconds."""

    work: Path
    out: Path
    environment: dict[str, str]
    now_s: Callable[[], float] = time.monotonic
    done: dict[str, dict[str, Any]] = field(default_factory=dict)

    def run(self, steps: Sequence[Step], limit_s: float) -> None:
        """Runs what has not ended well before, while there is time, and packs after each step.

        What met its limit of time before comes last, so that it does not take the time of all others again.
        """
        end_s = self.now_s() + limit_s - MARGIN_S
        steps = sorted(steps, key=lambda step: self.done.get(step.name, {}).get("status") == TOO_LONG)
        for place, step in enumerate(steps):
            if self.done.get(step.name, {}).get("status") == "done":
                continue
            later_s = sum(one.reserve_s for one in steps[place + 1 :])
            left_s = end_s - self.now_s()
            given_s = min(step.limit_s, max(left_s - later_s, min(step.reserve_s, left_s)))
            if given_s < min(step.reserve_s, step.limit_s) / 2:
                self.done[step.name] = {"status": "no time left"}
            else:
                say(f"{step.name}: at most {given_s:.0f} s")
                self.done[step.name] = self._ended(step, given_s)
                say(f"{step.name}: {self.done[step.name]['status']}")
            self.keep()

    def keep(self) -> None:
        """Writes the state, the archive and the summary into the out folder."""
        write(self.work / "state.json", json.dumps(self.done, indent=1))
        self.out.mkdir(parents=True, exist_ok=True)
        left_out = pack(self.work, self.out)
        figures = gpu_summary.collect(self.work, self.done, left_out)
        write(self.out / "summary.json", json.dumps(figures, indent=1) + "\n")
        write(self.out / "summary.md", gpu_summary.told(figures))

    def _ended(self, step: Step, given_s: float) -> dict[str, Any]:
        folder = self.work / step.name
        folder.mkdir(parents=True, exist_ok=True)
        words = step.command(given_s)
        begun_s = self.now_s()
        with (folder / "stdout.txt").open("w") as stdout, (folder / "stderr.txt").open("w") as stderr:
            status = ended([sys.executable, "-u", *words], given_s, self.environment, stdout, stderr)
        if status == "done" and gpu_summary.unfinished(folder):
            status = "to be gone on with"
        if status == "done" and gpu_summary.tested(folder).startswith(gpu_summary.NOTHING_TESTED):
            status = gpu_summary.NOTHING_TESTED
        return {"status": status, "seconds": round(self.now_s() - begun_s, 1), "command": " ".join(words)}


def ended(words: Sequence[str], limit_s: float, environment: dict[str, str], stdout: Any, stderr: Any) -> str:
    """Runs a program in a process group of its own, which is ended after ``limit_s`` seconds; says how it ended."""
    process = subprocess.Popen(
        words, cwd=ROOT, env=environment, stdin=subprocess.DEVNULL, stdout=stdout, stderr=stderr, start_new_session=True
    )
    try:
        code = process.wait(limit_s)
    except subprocess.TimeoutExpired:
        for signal_number in (15, 9):
            os.killpg(process.pid, signal_number)
            try:
                process.wait(5)
                break
            except subprocess.TimeoutExpired:
                continue
        return TOO_LONG
    return "done" if code == 0 else f"exit code {code}"


def steps_of(parts: Sequence[str], device: str, work: Path, *, quick: bool) -> list[Step]:
    """What is run for the parts: the tests first, then each model's validation, limits and peers."""
    tested = "tests/real/test_device.py" if quick else "tests/real"
    steps = [Step("tests", tests_command(tested, device), 100, 180)] if "1" in parts or quick else []
    for part in parts[:1] if quick else parts:
        steps += model_steps(QUICK_MODEL if quick else MODELS[part], device, work, quick=quick)
    return steps


def tests_command(tested: str, device: str) -> tuple[str, ...]:
    """The tests that need a GPU, or without one those that need none; warnings of other versions than the pinned ones
    are no failures here."""
    marked = "gpu" if device == "cuda" else "not gpu"
    together = ("-n", "4") if find_spec("xdist") else ()
    return ("-m", "pytest", "-q", "-m", marked, "-W", "default", "-p", "no:cacheprovider", *together, tested)


def model_steps(model: str, device: str, work: Path, *, quick: bool) -> list[Step]:
    """Validation, limits of the executor, and peers for one model, all from the validation's calibration."""
    common = ("--model", model, "--device", device, "--dtype", "bf16" if device == "cuda" else "fp32")
    names = {kind: f"{kind}-{model}" for kind in ("validate", "limits", "peers")}
    run, few = work / names["validate"] / "run", ("--tokens", "4", "--repeats", "2") if quick else ()
    validate = ["-m", "moetwin", "validate", *common, "--out", str(run), "--json", "--sequences", "1"]
    validate += [*few, "--systems", "mixtral-offloading,hybrimoe", "--caches", "50%"] if quick else ["--tokens", "16"]
    validate += [] if quick else ["--systems", SYSTEMS]
    profile, big = run / model / "profile.toml", model == MODELS["3"]

    def measuring(kind: str, module: str, reserve_s: float, *more: str, unit: str | None = None) -> Step:
        words = ("-m", module, *common, *more, "--out", str(work / names[kind] / "figures.json"), "--force")
        return Step(names[kind], words, reserve_s, 300, unit=unit, profile=profile)

    steps = [Step(names["validate"], tuple(validate), 60 if quick else 180, 1e9, unit="s")]
    limits_s = 30 if quick else 150 if big else 70
    steps.append(
        measuring("limits", "benchmarks.executor_limits", limits_s, *few, *(("--prompt", "16") if quick else ()))
    )
    if not big:  # the peers' copy of the weights is a second one in host memory
        turns = few or ("--tokens", "8", "--repeats", "3")  # of which accelerate takes some seconds a token
        steps.append(measuring("peers", "benchmarks.peers", 30 if quick else 130, *turns, unit=""))
    return steps


def pack(work: Path, out: Path) -> list[str]:
    """Packs the work folder into ``results-N.tar.gz``; returns what did not fit, which are the largest tables."""
    for old in out.glob("results-*.tar.gz"):
        old.unlink()
    files = sorted((path for path in work.rglob("*") if path.is_file()), key=_worth)
    sizes = {path: path.stat().st_size for path in files}  # not compressed: in the archive they take less
    files, too_large = ([path for path in files if (sizes[path] <= PART_BYTES) == fits] for fits in (True, False))
    for number in range(1, MOST_PARTS + 1):
        room = PART_BYTES
        if not files:
            break
        with tarfile.open(out / f"results-{number}.tar.gz", "w:gz") as archive:
            while files and sizes[files[0]] <= room:
                room -= sizes[files[0]]
                archive.add(files[0], str(files.pop(0).relative_to(work)))
    return [str(path.relative_to(work)) for path in (*files, *too_large)]


def _worth(path: Path) -> tuple[int, str]:
    """What is packed first: figures and small tables, then operations, then events, those of first repeats before."""
    rank = LARGE.index(path.name) + 1 if path.name in LARGE else 0
    return rank + (rank == len(LARGE) and path.parent.name != "r1"), str(path)


def unpack(archives: Sequence[Path], work: Path) -> dict[str, dict[str, Any]]:
    """Unpacks what earlier calls left, and returns what they had done.

    Of a step that is to be gone on with, runs that lost a table to the archive's size are dropped, to be made again.
    """
    done: dict[str, dict[str, Any]] = {}
    for path in archives:
        with tarfile.open(path) as archive:
            archive.extractall(work, filter="data")
        state = work / "state.json"
        if state.exists():
            done |= json.loads(state.read_text(encoding="utf-8"))
            state.unlink()
    for run in [path.parent for path in work.rglob("run.json")]:
        whole = all((run / name).exists() for name in LARGE)
        if not whole and done.get(run.relative_to(work).parts[0], {}).get("status") != "done":
            shutil.rmtree(run)
    return done


def install(wheels: Path, into: Path) -> None:
    """Installs every wheel of a folder without a network, beside what the machine has."""
    found = [str(path) for path in sorted(wheels.glob("*.whl"))]
    if not found:
        stop(f"wheels must be a folder with *.whl files, got {wheels}")
    command = [sys.executable, "-m", "pip", "install", "-q", "--no-index", "--no-deps", "--target", str(into), *found]
    if subprocess.run(command, check=False).returncode:
        stop("wheels must be installed before anything else, and pip could not")


def check(models: Sequence[str], device: str, work: Path, environment: dict[str, str]) -> list[str]:
    """Prints what the machine has in one screen; returns what is missing."""
    faults = [f"Python must be 3.11 or newer, got {sys.version.split()[0]}"] if sys.version_info < (3, 11) else []
    missing = [pip for name, pip in NEEDED.items() if find_spec(name) is None]
    faults += [f"packages are missing: {' '.join(missing)} (carry their wheels, and give --wheels)"] if missing else []
    lacking = [pip for name, pip in OPTIONAL.items() if find_spec(name) is None]
    disk = shutil.disk_usage(work).free
    if disk < LEAST_DISK_BYTES:
        faults.append(f"disk must have {LEAST_DISK_BYTES / 1e9:.0f} GB free, got {disk / 1e9:.1f}")
    words = [sys.executable, "-m", "benchmarks.gpu_probe", device, *models]
    facts: dict[str, Any] = {}
    if not missing:
        probe = subprocess.run(words, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
        if probe.returncode:
            faults.append(f"the machine could not be asked: {probe.stderr.strip().splitlines()[-1:]}")
        else:
            facts = json.loads(probe.stdout)
            faults += facts.pop("faults")
    write(work / "machine.json", json.dumps(facts, indent=1))
    for name, value in {"disk": f"{disk / 1e9:.0f} GB free", **facts}.items():
        say(f"{name}: {value}")
    say(f"not there, and not needed: {' '.join(lacking) or 'nothing'}")
    for fault in faults:
        say(f"MISSING {fault}")
    return faults


def write(path: Path, text: str) -> None:
    """Writes a file under a temporary name first."""
    draft = path.with_name(f".{path.name}.partial")
    draft.write_text(text, encoding="utf-8")
    draft.replace(path)


def say(text: str) -> None:
    """A line of progress."""
    print(text, file=sys.stderr, flush=True)


def stop(text: str) -> None:
    """Ends with a user's error."""
    print(f"error: {text}", file=sys.stderr)
    sys.exit(2)


def options() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python3 -m benchmarks.gpu_suite", description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="folder of the summary and the archive")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="cpu: only to try the suite itself")
    parser.add_argument("--part", choices=(*MODELS, "all"), default="all", help="one model; tests with the first")
    parser.add_argument("--time-limit", type=float, default=1e6, metavar="SECONDS", help="for the whole call")
    parser.add_argument("--wheels", type=Path, help="folder of wheels, for a machine without a network")
    parser.add_argument("--resume", type=Path, action="append", default=[], help="an archive of an earlier call")
    parser.add_argument("--quick", action="store_true", help="the small model and few runs: does it all work?")
    parser.add_argument("--check", action="store_true", help="only say what is missing")
    parser.add_argument("--no-run", action="store_true", help="only sum up what earlier calls left")
    return parser.parse_args()


def main() -> None:
    """Checks the machine, runs the steps, and leaves at most six files."""
    given = options()
    parts = [*MODELS] if given.part == "all" else [given.part]
    begun_s = time.monotonic()
    archives = [*given.resume, *sorted(given.out.glob("results-*.tar.gz"))]
    absent = [path for path in archives if not path.is_file()]
    if absent:
        stop(f"resume must be an archive of an earlier call, got {absent[0]}")
    with tempfile.TemporaryDirectory(prefix="gpu-suite-") as folder:
        work, site = Path(folder) / "results", Path(folder) / "site"
        work.mkdir()
        paths = [str(site), *filter(None, [os.environ.get("PYTHONPATH")])] if given.wheels else []
        environment = {**os.environ, "HF_HUB_OFFLINE": "1", "COLUMNS": "140"}
        if given.wheels:
            install(given.wheels, site)
            sys.path.insert(0, str(site))
            environment["PYTHONPATH"] = os.pathsep.join(paths)
        suite = Suite(work, given.out, environment, done=unpack(archives, work))
        if not given.no_run:
            models = [QUICK_MODEL] if given.quick else [MODELS[part] for part in parts]
            faults = check(models, given.device, work, environment)
            if faults or given.check:
                sys.exit(2 if faults else 0)
            left_s = given.time_limit - (time.monotonic() - begun_s)
            suite.run(steps_of(parts, given.device, work, quick=given.quick), left_s)
        suite.keep()
    print((given.out / "summary.md").read_text(encoding="utf-8"))


if __name__ == "__main__":
    main()
