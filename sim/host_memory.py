"""HostMemory: which experts the host's memory holds, where a disk below it holds them all."""

from __future__ import annotations

from sim.plan import READ


class HostMemory:
    """A book of the experts in host memory, the least recently used of which gives its room to the next.

    It begins full, with the lowest blocks. An expert is used when it is copied to the device, or computed on the CPU,
    and counts as used as soon as that is decided: also by a prefetch that is withdrawn later, whose read goes on.
    For each block it keeps the last operation of each kind on it, so that no room is written while it is being read.
    """

    def __init__(self, slots: int) -> None:
        self._operations: dict[int, dict[str, int]] = {block: {} for block in range(slots)}  # least recently used first

    def __contains__(self, block: int) -> bool:
        return block in self._operations

    def arrival(self, block: int) -> tuple[int, ...] | None:
        """Notes a use of ``block``: the operation that brought it here, if any, or None when it is not here."""
        operations = self._operations.pop(block, None)
        if operations is None:
            return None
        self._operations[block] = operations
        return (operations[READ],) if READ in operations else ()

    def admit(self, block: int, number: int) -> tuple[int, ...]:
        """Gives ``block``, which operation ``number`` brings, the room of the least recently used expert.

        Returns the operations that have to end before that room may be written.
        """
        leaver = next(iter(self._operations))
        room = tuple(self._operations.pop(leaver).values())
        self._operations[block] = {READ: number}
        return room

    def note(self, block: int, op: str, number: int) -> None:
        """Operation ``number``, of kind ``op``, works on the room of ``block``."""
        self._operations[block][op] = number
