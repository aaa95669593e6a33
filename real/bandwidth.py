"""Copies of any size between device and host, from and to either kind of the host's memory, alone and beside GPU work.

Both ends move through areas that no processor's cache holds, so that a copy is as cold as that of an expert.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import cycle

import torch
from torch import Tensor

from real.bench import Bench
from real.device import Device, Work
from sim.spec.profile import TO_DEVICE, TO_HOST, Direction, Memory, Point, Transfers
from traces.memory import free_bytes

LEAST_BYTES, MOST_BYTES, STEP = 64 * 2**10, 64 * 2**20, 4
"""The sizes that are measured go from the first to the second by this factor."""
SHARE = 8
"""Of the free memory, one part in so many is the largest size; two areas hold twice that each."""


def transfers(bench: Bench, device: Device, expert_bytes: int) -> tuple[Transfers, ...]:
    """Seconds of copies for :func:`sizes_of`, in both directions; a CUDA device copies from and to pinned memory too,
    as far as that can be had."""
    sizes = sizes_of(expert_bytes, _free_bytes(device.torch_device))
    area_bytes = max(2 * min(sizes[-1], MOST_BYTES), sizes[-1])
    on_device = torch.ones(area_bytes, dtype=torch.uint8, device=device.torch_device)
    kinds: tuple[Memory, ...] = ("pinned", "pageable") if on_device.is_cuda else ("pageable",)
    busy, busy_s = bench.busy()
    found: list[Transfers] = []
    for memory in kinds:
        on_host = _host_area(area_bytes, pinned=memory == "pinned")
        if on_host is None:
            continue
        for direction in (TO_DEVICE, TO_HOST):
            copies = partial(_copies, device, direction, on_device, on_host)
            alone = [bench.point(size, copies(size)) for size in sizes]
            covering = [1 + math.ceil(2 * point.median_s / busy_s) for point in alone]
            beside = [
                bench.point(size, partial(_beside, device, copies(size), busy, pieces))
                for size, pieces in zip(sizes, covering, strict=True)
            ]
            for points, beside_gpu in ((alone, False), (beside, True)):
                one = Transfers(direction=direction, memory=memory, beside_gpu=beside_gpu, points=_usual(points))
                found.append(one)
    return tuple(found)


def sizes_of(expert_bytes: int, free: int) -> list[int]:
    """Bytes of the copies that are measured: powers of four as far as ``free`` memory allows, and one expert's."""
    most = min(MOST_BYTES, free // SHARE)
    steps = [LEAST_BYTES * STEP**power for power in range(round(math.log(MOST_BYTES / LEAST_BYTES, STEP)) + 1)]
    return sorted({expert_bytes, *(size for size in steps if size <= most)})


def _usual(points: Sequence[Point]) -> tuple[Point, ...]:
    """The points at their medians: the quickest copy of some sizes is one that found a part of itself in a cache."""
    return tuple(point.model_copy(update={"value_s": point.median_s}) for point in points)


def _free_bytes(device: torch.device) -> int:
    """What is free of the memory that holds less: the host's, or a GPU's."""
    free = free_bytes()
    return min(free, torch.cuda.mem_get_info()[0]) if device.type == "cuda" else free


def _host_area(size_bytes: int, *, pinned: bool) -> Tensor | None:
    """Memory of the host that has been written to, else it would not be there yet; None where none can be pinned."""
    try:
        return torch.empty(size_bytes, dtype=torch.uint8, pin_memory=pinned).fill_(1)
    except RuntimeError:
        if pinned:
            return None
        raise


def _copies(device: Device, direction: Direction, on_device: Tensor, on_host: Tensor, size: int) -> Callable[[], Work]:
    """What submits copies of that size, each to and from another place."""
    there, here = _windows(on_device, size), _windows(on_host, size)

    def submit() -> Work:
        if direction == TO_DEVICE:
            return device.copy(partial(_move, next(there), next(here)), ())
        return device.save(partial(_move, next(here), next(there)), ())

    return submit


def _windows(area: Tensor, size: int) -> Iterator[Tensor]:
    """The parts of that size of an area, over and over."""
    return cycle(area[: len(area) // size * size].split(size))


def _move(into: Tensor, out: Tensor) -> None:
    into.copy_(out, non_blocking=True)


def _beside(device: Device, copies: Callable[[], Work], busy: Callable[[], Work], count: int) -> Work:
    """A copy that was submitted after ``count`` pieces of GPU work, which take twice as long, and has ended."""
    pieces = [busy() for _ in range(count)]
    copy = copies()
    device.wait([*pieces, copy])
    return copy
