"""Words that a parser refuses, in every command; and examples of the help that hold."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from typing import Any

import pytest

import moetwin
from real.cli import choose
from sim.spec import catalogue
from sim.systems import SystemSpec
from tests.commanding import refused, run
from traces import synthetic
from traces.prompts import SHIPPED_PROMPTS, load_prompts
from traces.shipped import find_trace

pytestmark = pytest.mark.usefixtures("own_folder")


def commands() -> Iterator[tuple[str, Any]]:
    """Every command with its words, such as "trace record"."""
    for name, entry in moetwin.ENTRIES.items():
        command = moetwin._load(entry, name)
        if not hasattr(command, "commands"):
            yield name, command
            continue
        for own, below in command.commands.items():
            borrowed = entry.more.get(own)
            yield f"{name} {own}", below if borrowed is None else moetwin._load(borrowed, own)


COMMANDS = dict(commands())


def mistakes(name: str, command: Any) -> Iterator[tuple[list[str], str]]:
    """Words that a command's parser must refuse, and how the error about each begins."""
    needed = [one for one in command.params if one.required]
    given = [word for one in needed for word in ([] if one.param_type_name == "argument" else one.opts[:1]) + ["x"]]
    yield ["--no-such-option"], "option must be a known name, got '--no-such-option' ("
    for one in (one for one in command.params if one.param_type_name == "argument"):
        yield [""], f"{max(one.opts, key=len)} must hold something, got ''"
        break
    if needed:
        yield [], f"{needed[0].opts[0].lstrip('-')} must be given, got nothing"
    if all(one.nargs == 1 for one in command.params):
        alone = " and ".join(one.name.upper() for one in command.params if one.param_type_name == "argument")
        told = f"{alone} alone, got 'one-too-many' as well" if alone else "no words, got 'one-too-many' as well"
        free = [one for one in command.params if one.param_type_name == "argument" and not one.required]
        yield [*given, *("x" for _ in free), "one-too-many"], f"{name} must be given {told}"
    taking = [one for one in command.params if one.param_type_name == "option" and not one.is_flag]
    for one in taking:
        yield [*given, one.opts[0]], f"{one.opts[0][2:]} must have a value, got none"
        if one.name != "policies":
            yield [*given, one.opts[0], ""], f"{max(one.opts, key=len)[2:]} must hold something, got ''"
    for one in taking:
        if type(one.default) in (int, float):
            yield [*given, one.opts[0], "x"], f"{one.opts[0][2:]} must be a valid "


@pytest.mark.parametrize("name", COMMANDS)
def test_every_usage_error_of_every_command_is_one_line(name: str) -> None:
    found = list(mistakes(name, COMMANDS[name]))
    assert len(found) >= 2
    for words, message in found:
        assert refused(*name.split(), *words).startswith(f"error: {message}"), words


@pytest.mark.parametrize("name", ["", "trace", "models", "hardware"])
def test_usage_errors_of_a_group_are_one_line(name: str) -> None:
    words = name.split()
    assert refused(*words, "--hlep").startswith("error: option must be a known name, got '--hlep' (did you mean --help")
    assert refused(*words, "chow").startswith("error: command must be a known name, got 'chow' (")
    alone = run(*words)
    assert alone.exit_code == 2
    assert "Usage: " in alone.output
    assert "error:" not in alone.output


def test_a_mistyped_option_offers_options_alone_both_ways_of_a_switch() -> None:
    assert "(did you mean --no-events or " in refused("simulate", "mixed", "--no-event")
    message = refused("simulate", "mixed", "--trace", "x")
    offered = message.partition("(did you mean ")[2].rstrip("?)").split(" or ")
    assert offered
    assert all(name.startswith("--") for name in offered)


def test_a_mistyped_option_offers_the_near_ones() -> None:
    assert refused("decode", "--repeat", "2").endswith(
        "got '--repeat' (did you mean --repeats or --temperature or --prefetch?)"
    )


EXAMPLES = [
    (name, command, example.strip())
    for name, command in COMMANDS.items()
    for example in re.findall(r"(?:^|Examples?:) *(moetwin .*)$", command.help or "", re.MULTILINE)
]


def test_every_command_has_an_example_of_its_own() -> None:
    assert set(COMMANDS) == {name for name, _, _ in EXAMPLES}


@pytest.mark.parametrize(("name", "command", "example"), EXAMPLES, ids=[example for *_, example in EXAMPLES])
def test_an_example_of_the_help_is_a_command_with_names_that_exist(name: str, command: Any, example: str) -> None:
    called = name.removesuffix(" run") if name == "sweep run" else name  # what a sweep does unless told otherwise
    words = shlex.split(example)
    assert words[: len(called.split()) + 1] == ["moetwin", *called.split()]
    given = command.make_context(name, words[len(called.split()) + 1 :]).params
    choose(load_prompts(SHIPPED_PROMPTS), given.get("domains") or None)
    policies = {kind: given[kind] for kind in ("evict", "place", "prefetch", "scope") if given.get(kind)}
    assert SystemSpec(**policies)
    for trace in (given.get("trace"), given.get("routing")):
        assert trace is None or trace.endswith(".safetensors") or find_trace(trace).exists()
    assert given.get("generator", "zipf") in synthetic.GENERATORS
    models = given.get("model") or []
    for model in [models] if isinstance(models, str) else models:
        assert "/" in model or model in [*catalogue.model_names(), "moetwin-small"] or "x" in model
    if name in ("simulate", "hardware show"):
        machine = given.get("hardware") or given.get("name") or catalogue.REFERENCE_MACHINE
        assert catalogue.find_parts(machine) or catalogue.hardware(machine)
