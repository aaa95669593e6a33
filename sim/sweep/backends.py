"""Where the points of a sweep run: processes of this machine, or the workers of a Dask scheduler."""

from __future__ import annotations

import logging
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager, suppress
from typing import Any, TypeAlias

from sim.sweep.point import Outcome, Task, run_point
from traces.errors import InputError, unknown_name

Backend: TypeAlias = Callable[[Sequence[Task]], Iterator[Outcome]]
"""Runs tasks, and gives their outcomes in the order in which they end."""

BACKENDS = ("processes", "dask")
PATIENCE_S = 5
"""How long a scheduler may take to answer."""

IDLE_S = 20
"""How long a process waits for another point, so that it does not outlive a sweep that was killed for long."""

SILENCE_S, WORKERS_S = 3, 60
"""How long a scheduler may be without workers until that is told, and until it is given up."""

REFUSALS = (OSError, ValueError, TypeError, ImportError)
"""What an address may raise: nobody there, no address, one that needs keys, or a transport that is not installed."""

LOST = "were lost; those that ended are kept, and --resume goes on from there"


@contextmanager
def backend_of(
    name: str, *, jobs: int, scheduler: str | None = None, tell: Callable[[str], object] = lambda text: None
) -> Iterator[Backend]:
    """The backend of that name with ``jobs`` processes, or with those of the Dask ``scheduler`` at an address.

    What takes time is told. Raises :class:`InputError` for an unknown name, a scheduler without Dask, and one that does
    not answer, or gets no worker.
    """
    if name not in BACKENDS:
        raise unknown_name("backend", name, BACKENDS)
    if name == "dask":
        with _client(jobs, scheduler) as client:
            if scheduler is not None:
                _wait_for_workers(client, scheduler, tell)
            yield lambda tasks: _on_dask(client, tasks)
        return
    if scheduler is not None:
        raise InputError(f"scheduler must come with the backend dask, got {scheduler}")
    yield lambda tasks: _in_processes(tasks, jobs)


def _in_processes(tasks: Sequence[Task], jobs: int) -> Iterator[Outcome]:
    """One task at a time to each process: they take seconds, and an outcome is handed over as soon as it is there."""
    jobs = min(jobs, len(tasks))
    if jobs <= 1:
        yield from map(run_point, tasks)
        return
    from joblib import Parallel, delayed
    from joblib.externals.loky.process_executor import TerminatedWorkerError

    handing_out = {"return_as": "generator_unordered", "batch_size": 1, "pre_dispatch": "2 * n_jobs"}
    parallel = Parallel(n_jobs=jobs, idle_worker_timeout=IDLE_S, **handing_out)
    with _children_spared():
        begun = parallel(delayed(run_point)(task) for task in tasks)
    try:
        with closing(begun) as outcomes:
            yield from outcomes
    except TerminatedWorkerError as error:
        raise InputError(f"jobs must leave memory for each process, got {jobs}, and points that {LOST}") from error


def _on_dask(client: Any, tasks: Sequence[Task]) -> Iterator[Outcome]:
    import distributed

    futures = client.map(run_point, tasks, pure=False)
    ended: Any = distributed.as_completed
    try:
        for future in ended(futures, loop=client.loop):
            yield future.result()
    except (distributed.KilledWorker, distributed.client.FutureCancelledError, OSError) as error:
        raise InputError(f"workers must live until the end of the sweep, got points that {LOST}") from error


def _client(jobs: int, scheduler: str | None) -> Any:
    """A client of the scheduler at an address, or of one with ``jobs`` workers that is made here and ends with it."""
    try:
        from distributed import Client
    except ImportError as error:
        raise InputError("backend must be processes without the extra moetwin[cluster], got dask") from error
    connected: Any = Client
    if scheduler is None:
        with _children_spared():
            return connected(
                n_workers=jobs,
                threads_per_worker=1,
                dashboard_address=":0",  # any port that is free
                silence_logs=logging.CRITICAL,
                set_as_default=False,
            )
    client = connected.__new__(connected)
    try:
        client.__init__(scheduler, timeout=PATIENCE_S, set_as_default=False)
    except BaseException as error:
        with suppress(Exception):  # while its thread lives: __del__ would wait for that at the end of the process
            client.close()
        if isinstance(error, REFUSALS):
            raise InputError(f"scheduler must be one that answers within {PATIENCE_S} s, got {scheduler}") from error
        raise
    return client


def _wait_for_workers(client: Any, scheduler: str, tell: Callable[[str], object]) -> None:
    """Returns as soon as there is one."""
    for patience_s in (SILENCE_S, WORKERS_S - SILENCE_S):
        with suppress(TimeoutError):
            client.wait_for_workers(1, timeout=patience_s)
            return
        if patience_s == SILENCE_S:
            tell(f"the scheduler at {scheduler} has no workers yet: waiting for one, {WORKERS_S} s at most")
    raise InputError(f"scheduler must have a worker within {WORKERS_S} s, got none at {scheduler}")


@contextmanager
def _children_spared() -> Iterator[None]:
    """Processes that begin in the block, and inherit this, are not interrupted: that is for the one that made them."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
