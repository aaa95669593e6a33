"""Expert weights on the host, and the slots on the device that hold some of them.

One expert is one flat buffer, laid out by its model's form (:mod:`real.models.expert`), so that one copy moves it.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from contextlib import closing, nullcontext, suppress

import torch
from torch import Tensor

from real.models.expert import Weights
from real.models.families import MoeLayer
from real.models.load import DTYPES, LoadedModel
from real.packing import packing_of

ABSENT = -1
"""Tag of a slot that holds no whole expert."""


class SlotError(RuntimeError):
    """A kernel was about to read a slot that does not hold its expert: a fault of the program, never of the user."""


class HostStore:
    """All experts of a model in host memory, pinned when the device can use that.

    Takes the experts out of the model: its expert modules keep no weights, so that nothing is held twice. Each layer
    is pinned by itself; from the first one that cannot be, the rest stays pageable, which ``notes`` tell.
    """

    def __init__(
        self, loaded: LoadedModel, *, pin: bool = False, seed: int = 0, progress: Callable[[], None] | None = None
    ):
        """Experts on the meta device are read from the model's checkpoint, one by one; without one they are random.

        Random ones are seeded; ``progress`` is called each layer. Raises ValueError when the experts have been taken
        out of the model before.
        """
        spec = loaded.spec
        if not all(any(True for _ in layer.experts.parameters()) for layer in loaded.layers):
            raise ValueError(f"model must still hold its experts to be packed, got {spec.name} without them")
        self.spec, self.dtype = spec, DTYPES[spec.dtype]
        self.packing = packing_of(loaded.family.form(loaded.config), self.dtype, loaded.quant)
        self.form = self.packing.form
        self.notes: list[str] = []
        """What has to be told of runs with these experts."""
        self._layers: list[Tensor] = []
        self._pinned: list[Tensor] = []
        weakref.finalize(self, _unpin, self._pinned)
        fill = self._random(loaded, seed) if loaded.has_random_experts else self._given(loaded)
        with torch.inference_mode(), closing(loaded.checkpoint) if loaded.checkpoint else nullcontext():
            for layer in loaded.layers:
                packed = torch.empty(spec.experts, self.form.elements, dtype=self.packing.dtype)
                if pin and len(self._pinned) == len(self._layers) and _pin(packed):
                    self._pinned.append(packed)
                fill(layer, packed)
                _take_out(layer.experts)
                self._layers.append(packed)
                if progress is not None:
                    progress()
        if pin and self.pinned_bytes < self.bytes:
            pageable = f"{(self.bytes - self.pinned_bytes) / 1e9:.1f} of {self.bytes / 1e9:.1f} GB of experts"
            self.notes.append(
                f"{pageable} are in pageable memory, as no more could be pinned: their copies are slower, and the host "
                "takes part in them"
            )

    def expert(self, layer: int, expert: int) -> Tensor:
        """The flat weights of one expert."""
        return self._layers[layer][expert]

    def views(self, flat: Tensor) -> Weights:
        """The tensors of a flat expert, in the order of its form."""
        return self.form.views(flat)

    @property
    def bytes(self) -> int:
        """Bytes of all experts together."""
        return sum(packed.nbytes for packed in self._layers)

    @property
    def pinned_bytes(self) -> int:
        """How many of them a device can fetch without the host's help."""
        return sum(packed.nbytes for packed in self._pinned)

    def close(self) -> None:
        """Unpins the experts, which stay; nothing may be copying them. Happens by itself when the store is gone."""
        _unpin(self._pinned)

    def _given(self, loaded: LoadedModel) -> Callable[[MoeLayer, Tensor], None]:
        """Packs a layer of the weights that the model or its checkpoint has."""

        def fill(layer: MoeLayer, packed: Tensor) -> None:
            for flat, tensors in zip(packed, loaded.experts(layer), strict=True):
                self.packing.pack(tensors, flat)

        return fill

    def _random(self, loaded: LoadedModel, seed: int) -> Callable[[MoeLayer, Tensor], None]:
        """Packs a layer of random weights, each expert's own."""
        experts = self.spec.moe_layers * self.spec.experts
        block = self.packing.block(experts, seed)
        stride = max(1, len(block) // experts)

        def fill(layer: MoeLayer, packed: Tensor) -> None:
            first = layer.index * self.spec.experts
            for expert, flat in enumerate(packed, start=first):
                self.packing.pack_random(block, expert * stride % len(block), flat)

        return fill


class DeviceSlots:
    """A fixed number of slots on the device, allocated once; each is tagged with the expert whose bytes it holds."""

    def __init__(self, store: HostStore, slots: int, device: torch.device) -> None:
        self._store = store
        self._buffer = torch.zeros(slots, store.form.elements, dtype=store.packing.dtype, device=device)
        self._flat = list(self._buffer)
        self._views = [store.views(flat) for flat in self._flat]
        self._pool = store.form.pool(self._buffer) if store.form.run_together else ()
        self._tags = [(ABSENT, ABSENT)] * slots

    def load(self, slot: int, layer: int, expert: int) -> None:
        """Copies an expert into a slot, on the current stream or thread."""
        self._tags[slot] = (ABSENT, ABSENT)
        self._flat[slot].copy_(self._store.expert(layer, expert), non_blocking=True)
        self._tags[slot] = (layer, expert)

    def load_part(self, slot: int, layer: int, expert: int, start: int, stop: int) -> None:
        """Copies the elements from ``start`` to ``stop`` of an expert, as :meth:`load`; the slot holds it with the last
        ones, so that they have to come in order."""
        self._tags[slot] = (ABSENT, ABSENT)
        into = self._flat[slot]
        into[start:stop].copy_(self._store.expert(layer, expert)[start:stop], non_blocking=True)
        if stop == len(into):
            self._tags[slot] = (layer, expert)

    def read(self, slot: int, layer: int, expert: int) -> Weights:
        """The weights in a slot; raises :class:`SlotError` unless they are those of the expert asked for."""
        if self._tags[slot] != (layer, expert):
            raise SlotError(f"slot {slot} must hold expert {expert} of layer {layer}, it holds {self._tags[slot]}")
        return self._views[slot]

    def read_together(self, places: Sequence[tuple[int, int, int]]) -> Weights:
        """The weights [slots, ...] from the first to the last of ``places`` (slot, layer, expert), which ascend; what
        stands between them is no matter. Transposed as in :meth:`ExpertForm.pool`; raises as :meth:`read`."""
        for place in places:
            self.read(*place)
        first, last = places[0][0], places[-1][0]
        return tuple([matrices[first : last + 1] for matrices in self._pool])

    def save(self, slot: int, layer: int, expert: int) -> None:
        """Copies a slot back to where its expert came from, on the current stream or thread.

        The bytes are those that are there already, as weights do not change. Raises :class:`SlotError` as :meth:`read`.
        """
        self.read(slot, layer, expert)
        self._store.expert(layer, expert).copy_(self._flat[slot], non_blocking=True)

    def clear(self) -> None:
        """Forgets what the slots hold."""
        self._tags = [(ABSENT, ABSENT)] * len(self._tags)

    def release(self) -> None:
        """Gives the memory back, whoever still holds this object."""
        self._buffer = self._buffer.new_empty(0)
        self._flat, self._views, self._tags, self._pool = [], [], [], ()

    def __len__(self) -> int:
        return len(self._tags)

    @property
    def bytes(self) -> int:
        """Bytes of all slots together."""
        return self._buffer.nbytes


def _take_out(experts: torch.nn.Module) -> None:
    """Leaves a module, and those in it, without weights."""
    for module in experts.modules():
        for name, _ in list(module.named_parameters(recurse=False)):
            module.register_parameter(name, None)


def _pin(tensor: Tensor) -> bool:
    """Pins the memory of a tensor where it is, and tells whether that could be done.

    Torch's own pinned memory comes in powers of two, which can take nearly twice the weights.
    """
    try:
        return int(torch.cuda.cudart().cudaHostRegister(tensor.data_ptr(), tensor.nbytes, 0)) == 0 or _clear_error()
    except RuntimeError:
        return False


def _clear_error() -> bool:
    """Takes back the error that a refused call of CUDA leaves for the check of the next kernel; always False."""
    with suppress(RuntimeError):
        torch.ones(1, device="cuda").add_(1)
    return False


def _unpin(pinned: list[Tensor]) -> None:
    while pinned:
        torch.cuda.cudart().cudaHostUnregister(pinned.pop().data_ptr())
