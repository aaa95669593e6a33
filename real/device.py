"""The face that a CUDA GPU and this machine's CPU in the same role share.

Work is submitted without waiting. A piece of work waits for the pieces named in ``after`` and carries the times at
which it really ran. Times are seconds since the device was opened.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Any, ClassVar, Self

import torch

from real.checks import check_cpu_threads
from real.memory import give_back, told_when_full
from traces.errors import InputError

Run = Callable[[], None]
Chunks = Sequence[Run]
"""The pieces of a copy, in their order."""

CHUNK_BYTES = 4 << 20
"""A demand copy waits at most for so many bytes of prefetches, 75 us at 55 GB/s; on a CPU, 12.6 MB in these take 1%
longer than whole."""


class Work:
    """Something submitted to a device. ``start_s`` and ``end_s`` hold once it is done; ``error`` says why it failed.

    ``resource`` is what does it: "gpu", "link", "link-back" or "cpu". A copy can be given in chunks: it ends when the
    last one has. While it ``yields``, a prefetch makes way for a demand copy between two of them; ``stretches`` are
    then the times (start, end) during which it ran.
    """

    __slots__ = ("after", "begun", "chunks", "end_s", "error", "finished", "resource", "start_s", "stretches", "yields")

    def __init__(self, resource: str, run: Run | Chunks, after: Sequence[Work] = (), *, yields: bool = False) -> None:
        self.resource, self.after, self.yields = resource, after, yields
        self.chunks: Chunks = (run,) if callable(run) else run
        self.begun = 0  # chunks that have begun
        self.finished = False
        self.error: BaseException | None = None
        self.start_s = self.end_s = 0.0
        self.stretches: Sequence[tuple[float, float]] = ()

    @property
    def done(self) -> bool:
        """Whether it has ended."""
        return self.finished

    @property
    def ready(self) -> bool:
        """Whether everything it waits for has been done."""
        return all(work.done for work in self.after)

    def execute(self, now_s: Callable[[], float], makes_way: Callable[[Work], bool]) -> bool:
        """Runs it on the calling thread, to its end (True) or, between two chunks, until it ``makes_way`` (False).

        An error is kept; work that waited for failed work fails with its error.
        """
        start_s = now_s()
        if not self.begun:
            self.start_s = start_s
            self.error = next((earlier.error for earlier in self.after if earlier.error is not None), None)
        over = self.error is not None or self._run_on(makes_way)
        self.end_s = now_s()
        if self.stretches or not over:
            self.stretches = (*self.stretches, (start_s, self.end_s))
        if over:
            self.chunks, self.after = (), ()  # a layer's tensors must not live until its times are read
        return over

    def _run_on(self, makes_way: Callable[[Work], bool]) -> bool:
        chunks = self.chunks
        try:
            while True:
                self.begun += 1
                chunks[self.begun - 1]()
                if self.begun == len(chunks):
                    return True
                if makes_way(self):
                    return False
        except BaseException as error:
            self.error = error
            return True


class Device(ABC):
    """What the executor needs. ``joins_layers``: the caller has to wait for a layer's work before using its output.

    All calls come from the thread that opened it. A ``with`` block closes it.
    """

    name: ClassVar[str]
    joins_layers: ClassVar[bool]
    chunk_bytes = CHUNK_BYTES
    """What is under way of prefetches when a demand copy comes is at most this, or one expert of less; 0: whole."""
    pieces: ClassVar[int] = 1
    """Prefetches are handed over in so many pieces a chunk, all of which can be under way."""
    torch_device: torch.device
    waited_s = 0.0
    """Seconds for which the host has waited so far, without what it did meanwhile."""

    @abstractmethod
    def now_s(self) -> float:
        """The device's clock, as the host reads it."""

    @abstractmethod
    def mark(self) -> Any:
        """A point on the compute timeline; :meth:`time_of` turns it into seconds after :meth:`settle`."""

    @abstractmethod
    def time_of(self, mark: Any) -> float:
        """Seconds of a mark."""

    @abstractmethod
    def gpu(self, run: Callable[[], None], after: Sequence[Work]) -> Work:
        """Compute in the GPU's role; pieces run in order of submission."""

    @abstractmethod
    def copy(self, run: Run | Chunks, after: Sequence[Work], *, prefetch: bool = False) -> Work:
        """A copy from host to device; demand copies go before what has not begun of a prefetch."""

    @abstractmethod
    def save(self, run: Callable[[], None], after: Sequence[Work]) -> Work:
        """A copy from device to host, in order of submission and beside the copies to the device."""

    @abstractmethod
    def cpu(self, run: Callable[[], None]) -> Work:
        """Compute on the CPU's expert pool."""

    @property
    def cpu_threads(self) -> int:
        """Threads that a CPU expert has."""
        return 1

    def use_cpu_threads(self, count: int) -> None:
        """Gives the CPU experts from now on ``count`` threads each; raises :class:`InputError` where that is fixed."""
        check_cpu_threads(count, self.name)

    @abstractmethod
    def promote(self, works: Sequence[Work]) -> None:
        """What is left of prefetches that are now waited for becomes demand copies."""

    @abstractmethod
    def withdraw(self, works: Sequence[Work]) -> list[Work]:
        """Takes back those prefetches among ``works`` that have not begun, and returns them."""

    @abstractmethod
    def flush(self) -> None:
        """Lets everything submitted since the last flush begin, as far as the link has room; waiting does so too."""

    @abstractmethod
    def wait(self, works: Sequence[Work], on_copy: Callable[[], None] | None = None) -> None:
        """Returns when ``works`` are done (or ordered before all later compute); calls ``on_copy`` as copies end.

        Raises the error of the first of ``works`` that failed.
        """

    def await_compute(self, on_copy: Callable[[], None] | None = None) -> None:
        """Waits for all compute that the host does not do itself; calls ``on_copy`` as copies end meanwhile."""
        self.settle()

    @abstractmethod
    def settle(self) -> None:
        """Waits for all compute, so that its times and those of the marks so far are known."""

    @abstractmethod
    def drain(self) -> None:
        """Leaves nothing to do: what has begun ends; work and chunks that have not are dropped where possible."""

    @abstractmethod
    def close(self) -> None:
        """Ends threads, and gives back what was changed; calling it again does nothing."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def open_device(name: str = "auto", cpu_threads: int | None = None) -> Device:
    """The device called ``name``: ``cpu``, ``cuda``, or ``auto`` for a GPU where there is one. Raises InputError.

    ``cpu_threads`` are those of a CPU expert; None leaves them to torch.
    """
    from real.cpu_device import CpuDevice  # here, because both build on this module
    from real.cuda_device import CudaDevice

    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name not in ("cpu", "cuda"):
        raise InputError(f"device must be cpu, cuda or auto, got {name!r}")
    check_cpu_threads(cpu_threads, name)
    with told_when_full():
        if name == "cuda":
            give_back()  # else what an earlier model has left counts as the next one's
        opened = CudaDevice() if name == "cuda" else CpuDevice()
    if cpu_threads is not None:
        opened.use_cpu_threads(cpu_threads)
    return opened
