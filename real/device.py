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

from traces.errors import InputError


class Work:
    """Something submitted to a device. ``start_s`` and ``end_s`` hold once it is done; ``error`` says why it failed.

    ``resource`` is what does it: "gpu", "link", "link-back" or "cpu".
    """

    __slots__ = ("after", "end_s", "error", "finished", "resource", "run", "start_s")

    def __init__(self, resource: str, run: Callable[[], None], after: Sequence[Work] = ()) -> None:
        self.resource, self.run, self.after = resource, run, after
        self.finished = False
        self.error: BaseException | None = None
        self.start_s = self.end_s = 0.0

    @property
    def done(self) -> bool:
        """Whether it has ended."""
        return self.finished

    @property
    def ready(self) -> bool:
        """Whether everything it waits for has been done."""
        return all(work.done for work in self.after)

    def execute(self, now_s: Callable[[], float]) -> None:
        """Runs it on the calling thread. An error is kept; work that waited for failed work fails with its error."""
        self.start_s = now_s()
        self.error = next((earlier.error for earlier in self.after if earlier.error is not None), None)
        if self.error is None:
            try:
                self.run()
            except BaseException as error:
                self.error = error
        self.end_s = now_s()
        self.run, self.after = nothing, ()  # a layer's tensors must not live until its times are read


class Device(ABC):
    """What the executor needs. ``joins_layers``: the caller has to wait for a layer's work before using its output.

    All calls come from the thread that opened it. A ``with`` block closes it.
    """

    name: ClassVar[str]
    joins_layers: ClassVar[bool]
    torch_device: torch.device

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
    def copy(self, run: Callable[[], None], after: Sequence[Work], *, prefetch: bool = False) -> Work:
        """A copy from host to device; demand copies go before prefetches that have not begun."""

    @abstractmethod
    def save(self, run: Callable[[], None], after: Sequence[Work]) -> Work:
        """A copy from device to host, in order of submission and beside the copies to the device."""

    @abstractmethod
    def cpu(self, run: Callable[[], None]) -> Work:
        """Compute on the CPU's expert pool."""

    @abstractmethod
    def promote(self, works: Sequence[Work]) -> None:
        """Prefetches that are now waited for become demand copies, where they have not begun."""

    @abstractmethod
    def flush(self) -> None:
        """Lets everything submitted since the last flush begin."""

    @abstractmethod
    def wait(self, works: Sequence[Work], on_copy: Callable[[], None] | None = None) -> None:
        """Returns when ``works`` are done (or ordered before all later compute); calls ``on_copy`` as copies end.

        Raises the error of the first of ``works`` that failed.
        """

    @abstractmethod
    def settle(self) -> None:
        """Waits for all compute, so that its times and those of the marks so far are known."""

    @abstractmethod
    def drain(self) -> None:
        """Leaves nothing to do: work that has begun ends, work that has not is dropped where that is possible."""

    @abstractmethod
    def close(self) -> None:
        """Ends threads, and gives back what was changed; calling it again does nothing."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def open_device(name: str = "auto") -> Device:
    """The device called ``name``: ``cpu``, ``cuda``, or ``auto`` for a GPU where there is one. Raises InputError."""
    from real.cpu_device import CpuDevice  # here, because both build on this module
    from real.cuda_device import CudaDevice

    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name not in ("cpu", "cuda"):
        raise InputError(f"device must be cpu, cuda or auto, got {name!r}")
    return CudaDevice() if name == "cuda" else CpuDevice()


def nothing() -> None:
    """What is left of work that has run."""
