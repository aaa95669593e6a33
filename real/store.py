"""Expert weights on the host, and the slots on the device that hold some of them.

One expert is one flat buffer, gate and up [2I, H] first, then down [H, I], so that one copy moves it.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from real.models.load import DTYPES, LoadedModel
from sim.spec import ModelSpec

ABSENT = -1
"""Tag of a slot that holds no whole expert."""


class SlotError(RuntimeError):
    """A kernel was about to read a slot that does not hold its expert: a fault of the program, never of the user."""


class HostStore:
    """All experts of a model in host memory, pinned when the device can use that.

    Takes the experts out of the model: its expert modules keep no weights, so that nothing is held twice.
    """

    def __init__(
        self, loaded: LoadedModel, *, pin: bool = False, seed: int = 0, progress: Callable[[], None] | None = None
    ):
        """A model whose experts are on the meta device gets random ones, seeded; ``progress`` is called each layer.

        Raises ValueError when the experts have been taken out of the model before.
        """
        spec = loaded.spec
        if not all(any(True for _ in layer.experts.parameters()) for layer in loaded.layers):
            raise ValueError(f"model must still hold its experts to be packed, got {spec.name} without them")
        self.spec, self.dtype = spec, DTYPES[spec.dtype]
        generator = torch.Generator().manual_seed(seed)
        self._layers: list[Tensor] = []
        with torch.inference_mode():
            for layer in loaded.layers:
                packed = torch.empty(spec.experts, spec.expert_elements, dtype=self.dtype, pin_memory=pin)
                if next(layer.experts.parameters()).is_meta:
                    packed.uniform_(-0.02, 0.02, generator=generator)
                else:
                    self._pack(loaded, layer.experts, packed)
                for name, _ in list(layer.experts.named_parameters(recurse=False)):
                    layer.experts.register_parameter(name, None)
                self._layers.append(packed)
                if progress is not None:
                    progress()

    def expert(self, layer: int, expert: int) -> Tensor:
        """The flat weights of one expert."""
        return self._layers[layer][expert]

    def views(self, flat: Tensor) -> tuple[Tensor, Tensor]:
        """Gate and up [2I, H], and down [H, I], of a flat expert."""
        return expert_views(flat, self.spec)

    @property
    def bytes(self) -> int:
        """Bytes of all experts together."""
        return sum(packed.nbytes for packed in self._layers)

    def _pack(self, loaded: LoadedModel, experts: torch.nn.Module, packed: Tensor) -> None:
        for expert in range(self.spec.experts):
            gate_up, down = loaded.family.experts_tensors(experts, expert)
            into_gate_up, into_down = self.views(packed[expert])
            into_gate_up.copy_(gate_up)
            into_down.copy_(down)


class DeviceSlots:
    """A fixed number of slots on the device, allocated once; each is tagged with the expert whose bytes it holds."""

    def __init__(self, store: HostStore, slots: int, device: torch.device) -> None:
        spec = store.spec
        self._store = store
        self._buffer = torch.zeros(slots, spec.expert_elements, dtype=store.dtype, device=device)
        self._flat = list(self._buffer)
        self._views = [expert_views(flat, spec) for flat in self._flat]
        self._tags = [(ABSENT, ABSENT)] * slots

    def load(self, slot: int, layer: int, expert: int) -> None:
        """Copies an expert into a slot, on the current stream or thread."""
        self._tags[slot] = (ABSENT, ABSENT)
        self._flat[slot].copy_(self._store.expert(layer, expert), non_blocking=True)
        self._tags[slot] = (layer, expert)

    def read(self, slot: int, layer: int, expert: int) -> tuple[Tensor, Tensor]:
        """The weights in a slot; raises :class:`SlotError` unless they are those of the expert asked for."""
        if self._tags[slot] != (layer, expert):
            raise SlotError(f"slot {slot} must hold expert {expert} of layer {layer}, it holds {self._tags[slot]}")
        return self._views[slot]

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
        self._flat, self._views, self._tags = [], [], []

    def __len__(self) -> int:
        return len(self._tags)

    @property
    def bytes(self) -> int:
        """Bytes of all slots together."""
        return self._buffer.nbytes


def expert_views(flat: Tensor, spec: ModelSpec) -> tuple[Tensor, Tensor]:
    """Gate and up [2I, H], and down [H, I], as views of a flat expert."""
    gate_up, down = flat.split([2 * spec.expert_width * spec.hidden, spec.hidden * spec.expert_width])
    return gate_up.view(2 * spec.expert_width, spec.hidden), down.view(spec.hidden, spec.expert_width)
