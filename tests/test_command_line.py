"""The root of the command line: lazy imports, exit codes, and one line for every mistake."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import typer
from pydantic import BaseModel, PositiveInt
from typer.testing import CliRunner

import moetwin
from moetwin import ENTRIES, Entry
from traces.errors import InputError

ROOT = Path(__file__).resolve().parent.parent
HEAVY = ("torch", "transformers", "simpy", "matplotlib", "pandas", "scipy")


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Runs the command line in a process of its own, with warnings as errors."""
    command = [sys.executable, "-W", "error", "-m", "moetwin", *arguments]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False, env=plain_terminal())


def plain_terminal() -> dict[str, str]:
    return {**os.environ, "NO_COLOR": "1", "TERM": "dumb", "COLUMNS": "120"}


def loaded_by(*arguments: str) -> set[str]:
    """Heavy modules that a run of the command line has imported by the time it ends."""
    program = (
        "import sys, moetwin\n"
        f"sys.argv = ['moetwin', *{list(arguments)!r}]\n"
        "try:\n    moetwin.main()\n"
        f"finally:\n    print('LOADED', *[name for name in {HEAVY!r} if name in sys.modules])\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT, check=False, env=plain_terminal()
    )
    assert done.returncode == 0, done.stderr
    return set(done.stdout.rpartition("LOADED")[2].split())


class Tiny(BaseModel):
    slots: PositiveInt


def wrong_input() -> None:
    raise InputError("cache must be at most 100 %,\ngot 140 %")


def wrong_field() -> None:
    Tiny(slots=-3)


def interrupted() -> None:
    raise KeyboardInterrupt


def broken() -> None:
    raise ValueError("an error of the program itself")


def fine(name: str, times: int = 1) -> None:
    """Greets."""
    typer.echo(f"hello {name} " * times)


sub_app = typer.Typer()
sub_app.command("one")(fine)


@pytest.fixture
def cli(monkeypatch: pytest.MonkeyPatch) -> Callable[..., object]:
    """The command line with its table replaced by this module's commands."""
    module = sys.modules[__name__]
    monkeypatch.setitem(sys.modules, "commands_of_the_test", module)
    names = ("wrong_input", "wrong_field", "interrupted", "broken", "fine")
    table = {name.replace("_", "-"): Entry(f"commands_of_the_test:{name}", "For the test.") for name in names}
    borrowed = {"two": Entry("commands_of_the_test:fine", "Borrowed.")}
    table["group"] = Entry("commands_of_the_test:sub_app", "A group.", borrowed)
    table["missing"] = Entry("no_such_module_anywhere:app", "Never imported.")
    monkeypatch.setattr(moetwin, "ENTRIES", table)
    return lambda *arguments: CliRunner().invoke(moetwin.app, list(arguments))


def test_help_lists_every_entry_without_importing_heavy_modules() -> None:
    done = run("--help")
    assert done.returncode == 0
    assert done.stderr == ""
    for name, entry in ENTRIES.items():
        assert name in done.stdout
        assert entry.help.split(".")[0][:40] in done.stdout
    assert loaded_by("--help") == set()


def test_looking_up_the_catalogue_imports_neither_torch_nor_simpy() -> None:
    assert not loaded_by("models", "list") & {"torch", "transformers", "simpy", "matplotlib"}


def test_entries_name_an_object_of_a_room_and_help_in_one_line() -> None:
    borrowed = [more for entry in ENTRIES.values() for more in entry.more.values()]
    for entry in [*ENTRIES.values(), *borrowed]:
        module, _, attribute = entry.target.partition(":")
        assert module.split(".")[0] in {"traces", "sim", "real", "analysis"} or module.startswith("moetwin")
        assert attribute.isidentifier()
        assert entry.help.endswith(".")
        assert len(entry.help) < 80


def test_version_names_python_and_torch_without_importing_torch() -> None:
    done = run("--version")
    assert done.returncode == 0
    assert done.stdout.startswith("moetwin ")
    assert f"Python {sys.version_info.major}.{sys.version_info.minor}." in done.stdout
    assert "torch 2." in done.stdout
    assert loaded_by("--version") == set()


@pytest.mark.parametrize("arguments", [("modles",), ("--no-such-option",), ("models", "no-such"), ("models", "show")])
def test_usage_errors_exit_with_two(arguments: tuple[str, ...]) -> None:
    done = run(*arguments)
    assert done.returncode == 2
    assert done.stdout == ""
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: ")


def test_an_unknown_command_offers_the_near_one() -> None:
    assert "models" in run("modles").stderr


def test_an_unknown_model_is_one_line_that_offers_the_near_names() -> None:
    done = run("models", "show", "olmo-1b-7b")
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.splitlines() == [
        "error: model must be a known name, got 'olmo-1b-7b' (did you mean olmoe-1b-7b?)"
    ]


def test_input_errors_become_one_line_even_when_their_text_has_several(cli: Callable[..., object]) -> None:
    result = cli("wrong-input")
    assert result.exit_code == 2
    assert result.output == "error: cache must be at most 100 %, got 140 %\n"


def test_a_validation_error_is_told_as_field_rule_and_value(cli: Callable[..., object]) -> None:
    result = cli("wrong-field")
    assert result.exit_code == 2
    assert result.output == "error: slots must be greater than 0, got -3\n"


def test_an_interrupt_is_one_line_and_exit_code_130(cli: Callable[..., object]) -> None:
    result = cli("interrupted")
    assert result.exit_code == 130
    assert result.output == "error: interrupted\n"


def test_errors_of_the_program_itself_are_not_disguised(cli: Callable[..., object]) -> None:
    result = cli("broken")
    assert isinstance(result.exception, ValueError)
    assert result.exit_code == 1


def test_a_plain_function_is_a_command_with_arguments_and_options(cli: Callable[..., object]) -> None:
    assert cli("fine", "you", "--times", "2").output.split() == ["hello", "you", "hello", "you"]
    assert cli("fine").output == "error: name must be given, got nothing\n"


def test_help_of_a_lazy_command_is_that_of_the_real_one(cli: Callable[..., object]) -> None:
    text = cli("fine", "--help").output
    assert "Greets." in text
    assert "--times" in text


def test_a_group_keeps_its_own_commands_and_borrows_others(cli: Callable[..., object]) -> None:
    assert "Borrowed." in cli("group", "--help").output
    assert cli("group", "one", "you").output.split() == ["hello", "you"]
    assert cli("group", "two", "me").output.split() == ["hello", "me"]


def test_help_does_not_import_the_entries(cli: Callable[..., object]) -> None:
    assert "Never imported." in cli("--help").output
    assert isinstance(cli("missing").exception, ModuleNotFoundError)


def test_a_reader_that_leaves_early_is_no_error() -> None:
    command = f"set -o pipefail; {sys.executable} -m moetwin hardware list --json | head -n 1"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.stdout == "{\n"
    assert done.stderr == ""
