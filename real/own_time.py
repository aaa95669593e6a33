"""The host's seconds in this project's own code, without what it waits for and what is not its own."""

from __future__ import annotations

from time import perf_counter
from typing import Any

from torch import Tensor, nn

from real.device import Device


class OwnTime:
    """A stopwatch of the host that stands still while the host waits for its device, and leaves out what it is told."""

    def __init__(self, device: Device) -> None:
        self._device = device
        self._total_s = self._began_s = 0.0

    def begin(self) -> None:
        """From here on it counts."""
        self._began_s = perf_counter() - self._device.waited_s

    def end(self) -> None:
        """Until here it counts."""
        self._total_s += perf_counter() - self._device.waited_s - self._began_s

    def leave_out(self, seconds: float) -> None:
        """Counts so much less."""
        self._total_s -= seconds

    def take(self) -> float:
        """The seconds since the last time, or the beginning."""
        taken_s, self._total_s = self._total_s, 0.0
        return taken_s


class RouterApart:
    """A model's router, whose time is left out of ours where we call it."""

    def __init__(self, router: nn.Module, own: OwnTime) -> None:
        self._router, self._own = router, own
        self.stack = getattr(router, "stack", None)

    def forward(self, hidden: Tensor) -> Any:
        """What the router gives."""
        began_s = perf_counter()
        given = self._router.forward(hidden)
        self._own.leave_out(perf_counter() - began_s)
        return given
