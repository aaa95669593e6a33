"""The command line as the tests of mistakes run it."""

from __future__ import annotations

from typer.testing import CliRunner, Result

import moetwin
from traces import synthetic


def run(*words: str) -> Result:
    return CliRunner().invoke(moetwin.app, list(words))


def refused(*words: str) -> str:
    """The error of a command that must end with exit code 2, which is one line on stderr."""
    result = run(*words)
    assert result.exit_code == 2, result.output
    assert isinstance(result.exception, SystemExit)
    assert result.stdout == ""
    (line,) = result.stderr.splitlines()
    return line


SMALL = synthetic.Sizes(sequences=1, prompt_tokens=2, new_tokens=2, layers=8, experts=32, top_k=4)
