"""How far the replays are, on stderr, and when numba compiles one."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from numba.core import event
from rich.console import Console
from rich.progress import Progress


class _Compiling(event.Listener):
    """Calls ``tell`` whenever numba begins to compile; code that is read from its cache is not compiled."""

    def __init__(self, tell: Callable[[], None]) -> None:
        self._tell = tell

    def on_start(self, event: Any) -> None:
        self._tell()

    def on_end(self, event: Any) -> None:
        """Nothing: the next policy or pass is told by the replay."""


@contextmanager
def progress_bar(total: int, what: str = "replaying") -> Iterator[Callable[[str, int], None]]:
    """A bar over passes, where stderr is a terminal; it is told the policy at work, and the passes just replayed."""
    console = Console(stderr=True)
    with Progress(console=console, transient=True, disable=not console.is_terminal) as bar:
        task, name = bar.add_task(what, total=total), what

        def advance(policy: str, passes: int) -> None:
            nonlocal name
            name = policy
            bar.update(task, advance=passes, description=policy)

        told: set[str] = set()

        def compiling() -> None:
            bar.update(task, description=f"compiling {name}, kept for the next run")
            if not console.is_terminal and name not in told:
                told.add(name)
                console.print(f"note: compiling {name}, kept for the next run", highlight=False, soft_wrap=True)

        listener = _Compiling(compiling)
        event.register("numba:compile", listener)
        try:
            yield advance
        finally:
            event.unregister("numba:compile", listener)
