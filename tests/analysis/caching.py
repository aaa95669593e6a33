"""``moetwin cache`` on small traces, as the tests of its sub-commands run it."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
from typer.testing import CliRunner, Result

import moetwin
from traces.schema import Trace, TraceHeader
from traces.synthetic import Sizes

GOLDEN = [(0, 1), (0, 2), (0, 1), (0, 3), (0, 1)]
"""What each of three layers of four experts is asked for, in five steps."""

OWN = """
from sim.policies import EvictionPolicy
from sim.policies.evict.lru import Lru

class Same(Lru):
    pass

class Late(EvictionPolicy):
    defaults = {"patience": 3, "shy": False, "mode": "a", "rate": 0.5}
    def __init__(self, context):
        super().__init__(context)
        if self.options["patience"] < 1:
            raise ValueError(f"patience must be at least 1, got {self.options['patience']}")
    def key(self, block):
        return block

class Broken(EvictionPolicy):
    def key(self, block):
        return 1 / 0

class Leaves(EvictionPolicy):
    def key(self, block):
        raise SystemExit(0)

class Nameless(Lru):
    name = 5
"""


def run(*words: str) -> Result:
    return CliRunner().invoke(moetwin.app, ["cache", *words], env={"COLUMNS": "220"})


def shown(*words: str) -> str:
    result = run(*words)
    assert result.exit_code == 0, result.output
    return result.stdout


def rows(*words: str) -> list[dict[str, Any]]:
    def never(constant: str) -> None:
        raise AssertionError(constant)

    return [json.loads(line, parse_constant=never) for line in shown(*words, "--json").splitlines()]


def refused(*words: str) -> str:
    """The error of a command that must end with exit code 2, which is one line on stderr."""
    result = run(*words)
    assert result.exit_code == 2, result.output
    assert isinstance(result.exception, SystemExit)
    assert result.stdout == ""
    (line,) = [line for line in result.stderr.splitlines() if not line.startswith("note: ")]
    return line.removeprefix("error: ")


def golden() -> Trace:
    ids = np.array([[unions] * 3 for unions in GOLDEN], np.uint16)
    index = np.arange(len(ids))
    header = TraceHeader(model="golden", layers=3, experts=4, top_k=2, expert_bytes=(100, 100, 100))
    zeros = np.zeros_like(index)
    return Trace.of(
        header, expert_ids=ids, token_ids=zeros, sequence=zeros, position=index, step=index, phase=zeros + 1
    )


SIZES = Sizes(sequences=8, prompt_tokens=3, new_tokens=10, layers=2, experts=8, top_k=2, expert_bytes=1 << 20)
