"""What a layer's decisions mean in operations: their numbers, their order, and what each has to wait for."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from sim.cache import ExpertCache, Verdict
from sim.host_memory import HostMemory
from sim.plan import COPY, CPU, EVICT, GPU, READ, Operation, operation_of
from sim.policies import EvictionPolicy


class Draft:
    """Numbers operations, puts those of one layer in order, and enters them into the cache's book."""

    def __init__(
        self,
        cache: ExpertCache,
        evict: EvictionPolicy,
        expert_bytes: int,
        *,
        write_back: bool = False,
        memory: HostMemory | None = None,
    ) -> None:
        """With ``write_back`` evictions are copies to the host; ``memory`` is the host's where it cannot hold all."""
        self._cache, self._evict, self._experts, self._bytes = cache, evict, cache.experts, expert_bytes
        self._written_bytes = expert_bytes if write_back else 0
        self._memory = memory
        self._saved_by: dict[int, int] = {}  # by slot: the operation that saves what it held
        self._awaited_save: dict[int, int] = {}  # by prefetch: the write-back that its slot is being saved by
        self._tells = type(evict).admit is not EvictionPolicy.admit  # most policies do not listen
        self._number = 0
        self._ahead = False  # whether what is being copied is a prefetch
        self.begin(0, {})

    def begin(self, layer: int, load: dict[int, int]) -> None:
        """Starts the plan of ``layer``, whose blocks get ``load[block]`` tokens."""
        self._layer, self._load, self._base = layer, load, layer * self._experts
        self.operations: list[Operation] = []

    def preload(self, blocks: Iterable[int]) -> list[Operation]:
        """Copies of ``blocks`` to free slots."""
        operations = []
        for block in blocks:
            layer = block // self._experts
            self.begin(layer, {})
            self._admit((block,))
            operations += self.operations
        return operations

    def cpu(self, blocks: Sequence[int], deferred: int = 0) -> None:
        """Experts that the CPU computes, in its order; the last ``deferred`` ones join the next layer's output.

        A resident one stays, another is used without being kept.
        """
        memory, at_once = self._memory, len(blocks) - deferred
        for place, block in enumerate(blocks):
            after = self._brought(memory, block) if memory else ()
            self._number = number = self._number + 1
            tokens, late = self._load[block], place >= at_once
            fields = (number, CPU, self._layer, block - self._base, -1, tokens, 0, after, False, late)
            self.operations.append(operation_of(fields))
            if memory:
                memory.note(block, CPU, number)
            if self._cache.slot_of[block] < 0:
                self._evict.forget(block)

    def gpu(self, blocks: Sequence[int], copies: Mapping[int, int]) -> None:
        """Experts in their slots; ``copies`` names the operations that bring those which are not there yet."""
        layer, base, load, slot_of = self._layer, self._base, self._load, self._cache.slot_of
        add = self.operations.append
        for number, block in enumerate(blocks, self._number + 1):
            after = (copies[block],) if block in copies else ()
            add(operation_of((number, GPU, layer, block - base, slot_of[block], load[block], 0, after, False, False)))
        self._number += len(blocks)

    def fetch(self, blocks: list[int], verdict: Verdict) -> None:
        """The GPU's experts in its order, after copies of those that are missing; these need nothing first."""
        admitted, streamed, victims, leaving = verdict
        self._drop(victims)
        if leaving or streamed:
            self._fetch_crowded(blocks, verdict)
        else:
            copies = self._admit(admitted)
            if self._cache.in_flight:
                copies |= self._cache.in_flight
            self.gpu(blocks, copies)
        if self._tells:
            for block in sorted(admitted):
                self._evict.admit(block)

    def _fetch_crowded(self, blocks: list[int], verdict: Verdict) -> None:
        """The same where not all of the layer's experts can be kept: what is there, then what arrives, as it arrives.

        Some are streamed through the staging slots, and residents may leave once they have been read.
        """
        admitted, streamed, _, leaving = verdict
        ready = [block for block in blocks if self._cache.slot_of[block] >= 0]
        self._drop([block for block in leaving if block not in ready])  # the CPU computes them from the host's copy
        leaving = [block for block in leaving if block in ready]
        at_once = len(admitted) - len(leaving)
        copies = self._admit(admitted[:at_once])
        for block, slot in zip(streamed, self._cache.staging, strict=False):
            copies[block] = self._copy(block, slot)
        self.gpu(ready, self._cache.in_flight)
        if leaving:
            copies |= self._swap(leaving, admitted[at_once:])
        self.gpu(admitted, copies)
        self._stream(streamed, copies)

    def prefetch(self, layer: int, block: int, victim: int) -> tuple[Operation, ...]:
        """The copy of ``block``, after the eviction of ``victim`` (-1: none) and a read where the disk has it."""
        self.begin(layer, {})
        self._drop(() if victim < 0 else (victim,))
        self._ahead = True
        number = self._copy(block, self._cache.insert(block))
        self._ahead = False
        self._cache.in_flight[block] = number
        self._evict.admit(block)
        return tuple(self.operations)

    def arrived(self, operation: Operation) -> None:
        """A prefetch has ended, and so has the write-back that it waited for."""
        self._awaited_save.pop(operation.id, None)

    def withdraw(self, operation: Operation) -> None:
        """Gives back the slot of a prefetch that has not begun; what its copy had to wait for, the next one has to."""
        block = operation.layer * self._experts + operation.expert
        slot = self._cache.remove(block)
        self._evict.forget(block)
        if operation.id in self._awaited_save:
            self._saved_by[slot] = self._awaited_save.pop(operation.id)

    def _swap(self, leaving: Sequence[int], arriving: Sequence[int]) -> dict[int, int]:
        """Residents that leave once they have been read: each gives its slot to one of ``arriving``."""
        reads = {self._base + one.expert: one.id for one in self.operations if one.op == GPU}
        copies = {}
        for leaver, block in zip(leaving, arriving, strict=True):
            self._drop((leaver,))
            copies[block] = self._copy(block, self._cache.insert(block), (reads[leaver],))
        return copies

    def _stream(self, streamed: Sequence[int], copies: dict[int, int]) -> None:
        """Experts that are not kept pass through the staging slots, each copy after the read of its predecessor."""
        staging = self._cache.staging
        for index, block in enumerate(streamed):
            slot = staging[index % len(staging)]
            self._number = number = self._number + 1
            tokens, after = self._load[block], (copies[block],)
            fields = (number, GPU, self._layer, block - self._base, slot, tokens, 0, after, False, False)
            self.operations.append(operation_of(fields))
            self._evict.forget(block)
            if index + len(staging) < len(streamed):
                follower = streamed[index + len(staging)]
                copies[follower] = self._copy(follower, slot, (number,))

    def _admit(self, blocks: Iterable[int]) -> dict[int, int]:
        """Gives ``blocks`` free slots, and returns the operations that copy them there."""
        insert, copy, copies = self._cache.insert, self._copy, {}
        for block in blocks:
            copies[block] = copy(block, insert(block))
        return copies

    def _copy(self, block: int, slot: int, after: tuple[int, ...] = ()) -> int:
        memory = self._memory
        if memory:
            after = (*after, *self._brought(memory, block))
        self._number = number = self._number + 1
        if slot in self._saved_by:
            saver = self._saved_by.pop(slot)
            after = (*after, saver)
            if self._ahead:
                self._awaited_save[number] = saver
        fields = (number, COPY, self._layer, block - self._base, slot, 0, self._bytes, after, self._ahead, False)
        self.operations.append(operation_of(fields))
        if memory:
            memory.note(block, COPY, number)
        return number

    def _brought(self, memory: HostMemory, block: int) -> tuple[int, ...]:
        """What has to end before the host's memory holds ``block``: a read from the disk, where it did not."""
        arrival = memory.arrival(block)
        if arrival is not None:
            return arrival
        self._number = number = self._number + 1
        room = memory.admit(block, number)
        fields = (number, READ, self._layer, block - self._base, -1, 0, self._bytes, room, self._ahead, False)
        self.operations.append(operation_of(fields))
        return (number,)

    def _drop(self, blocks: Sequence[int]) -> None:
        """Removes ``blocks``, which may be other layers', from the cache; what is written back keeps its slot busy."""
        remove, forget, experts, size_bytes = self._cache.remove, self._evict.forget, self._experts, self._written_bytes
        add = self.operations.append
        for number, block in enumerate(blocks, self._number + 1):
            layer, expert = divmod(block, experts)
            slot = remove(block)
            room = self._saved(block, slot, number) if size_bytes else ()
            add(operation_of((number, EVICT, layer, expert, slot, 0, size_bytes, room, False, False)))
            forget(block)
        self._number += len(blocks)

    def _saved(self, block: int, slot: int, number: int) -> tuple[int, ...]:
        """What a write-back of ``block`` waits for: that the host has room for it, which it has where it holds all."""
        self._saved_by[slot] = number
        if self._memory is None:
            return ()
        if block not in self._memory:
            return self._memory.admit(block, number)
        self._memory.note(block, EVICT, number)
        return ()
