"""Several resident experts in one call: products of groups, over the slot pool where it is.

One expert takes five calls to torch and two events, whatever its size; any number of them together takes twelve and
two. So from :data:`FEWEST` on the host has less to do, and a GPU that computes one token waits for the host.

Shapes: N rows of all experts together, H hidden width.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from real.device import Device
from real.store import DeviceSlots, HostStore
from sim.plan import GPU, Operation

FEWEST = 3
"""Fewer experts than these take fewer calls one by one."""
MOST_ROWS = 256
"""Up to so many rows an expert takes as long as its weights take to be read, so that equal shares of the time are
right, and what is in between needs little memory."""
MOST_SLOTS = 1023
"""CUDA's kernel takes no more groups; a slot within the span that is not read is a group without rows."""
GOOD_ON = (9, 10)
"""Major compute capabilities with a kernel for groups: on others torch waits for the offsets, and goes one by one."""
ALIGNED_BYTES = 16
"""Rows of matrices have to begin at multiples of this."""
TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-2, torch.bfloat16: 5e-2}
"""By which share of the largest output the two ways may differ."""


class Together:
    """Computes resident experts of a layer together."""

    def __init__(self, store: HostStore, slots: DeviceSlots, place: torch.device, fewest: int = FEWEST) -> None:
        """``place`` is where the slots are; the form of ``store`` must have a way to do so."""
        self._store, self._slots, self._place, self._fewest = store, slots, place, fewest

    def among(self, operations: Sequence[Operation]) -> list[Operation]:
        """Those of a plan that are computed together, by slot: the GPU's that wait for nothing. Empty where they are
        too few, have too many rows, or lie too far apart."""
        found = [one for one in operations if one.op == GPU and not one.after]
        if len(found) < self._fewest or sum([one.tokens for one in found]) > MOST_ROWS:
            return []
        found.sort(key=_slot)
        return found if found[-1].slot - found[0].slot < MOST_SLOTS else []

    def compute(self, operations: Sequence[Operation], rows: Tensor) -> Tensor:
        """The experts of ``operations``, in the order of their slots, on rows [N, H] in the same order."""
        weights = self._slots.read_together([(one.slot, one.layer, one.expert) for one in operations])
        first, counts = operations[0].slot, np.zeros(len(weights[0]), np.int32)
        for one in operations:
            counts[one.slot - first] = one.tokens
        ends = torch.from_numpy(counts.cumsum(dtype=np.int32)).to(self._place, non_blocking=True)
        run = self._store.form.run_together
        assert run is not None, "a form without it is never computed together"
        return run(weights, rows, ends)

    def objection(self) -> str:
        """What is wrong with computing together here, or nothing: it is tried on experts in the real slots, against one
        by one. Leaves slots that hold no expert. What makes CUDA itself fail for good cannot be survived."""
        try:
            with torch.inference_mode():
                off, most = self._difference()
        except Exception as error:
            return f"failed ({str(error).partition(chr(10))[0] or type(error).__name__})"
        finally:
            self._slots.clear()
        return "" if off <= most else f"gave outputs that differ by {off:.3g}, which is more than {most:.3g}"

    def _difference(self) -> tuple[float, float]:
        """By how much the two ways differ on random rows, and by how much they may."""
        span, spec = min(len(self._slots), MOST_SLOTS), self._store.spec
        places = sorted({0, span // 2, span - 1})
        chosen = [Operation(0, GPU, 0, n % spec.experts, slot, 1 + n, 0) for n, slot in enumerate(places)]
        for one in chosen:
            self._slots.load(one.slot, one.layer, one.expert)
        counts = [one.tokens for one in chosen]
        generator = torch.Generator().manual_seed(0)
        given = torch.randn(sum(counts), spec.hidden, generator=generator)
        rows = given.to(self._place, self._store.dtype)
        single = [
            self._store.form.run(self._slots.read(one.slot, one.layer, one.expert), own)
            for one, own in zip(chosen, rows.split(counts), strict=True)
        ]
        wanted = torch.cat(single).float()
        off = (self.compute(chosen, rows).float() - wanted).abs().max()
        return float(off), TOLERANCE[self._store.dtype] * float(wanted.abs().max())


def together(
    store: HostStore, slots: DeviceSlots, device: Device, wanted: bool | None = None
) -> tuple[Together | None, list[str]]:
    """How a run computes its resident experts together, None for one by one; and what has to be told of that.

    By itself (``wanted`` None) it does so for gated experts in bf16 on a GPU that has a kernel for it; ``wanted`` is
    True for every device, dtype and number of experts. In any case it is tried first.
    """
    fits = _has_kernel(device, store) if wanted is None else wanted
    if not fits or not _can(store) or len(slots) < 2:
        return None, []
    way = Together(store, slots, device.torch_device, FEWEST if wanted is None else 2)
    objection = way.objection()
    return (None, [f"experts were computed one by one: together they {objection}"]) if objection else (way, [])


def _slot(operation: Operation) -> int:
    return operation.slot


def _can(store: HostStore) -> bool:
    """Whether the form of the experts allows it."""
    widths = [shape[-1] * store.packing.dtype.itemsize for shape in store.form.shapes.values()]
    aligned = not any(width % ALIGNED_BYTES for width in widths)
    return store.form.run_together is not None and aligned


def _has_kernel(device: Device, store: HostStore) -> bool:
    """Whether CUDA computes the experts together without a wait."""
    place = device.torch_device
    if place.type != "cuda" or torch.version.hip is not None or store.dtype != torch.bfloat16:
        return False
    return torch.cuda.get_device_capability(place)[0] in GOOD_ON
