"""What a person at a terminal sees of work that takes its time: a spinner or a bar on stderr, nothing elsewhere."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import Progress


@contextmanager
def status(text: str) -> Iterator[Callable[[str], None]]:
    """A spinner on stderr; what it yields changes the text."""
    with Console(stderr=True).status(text) as spinner:
        yield lambda what: spinner.update(what)


@contextmanager
def bar(text: str, steps: int) -> Iterator[Callable[[], None]]:
    """A progress bar, where stderr is a terminal; what it yields advances it by one."""
    console = Console(stderr=True)
    with Progress(console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task(text, total=steps)
        yield lambda: progress.advance(task)
