"""Memory that every GPU of a group can read, and the rule by which it is reused.

A slot may be written again only when every peer has finished reading it. A rank gives a slot back when its stream has waited
for its own reads, and all ranks give it back at the same place, so a slot is free once a barrier lies between its return and
its next use. All ranks make the same calls in the same order, so all agree on which slot is meant.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

__all__ = ["Slot", "SymmetricMemory"]

_ENOUGH_SLOTS = 3  # with these a backward pass never waits for a barrier of its own to reuse one
_GRAIN = 2 << 20  # bytes; allocations of this memory come in such pages anyway


class Slot:
    """One allocation on every rank of the group. `given_back`: the count of barriers when it was, None while in use."""

    def __init__(self, memory: Tensor, handle: Any) -> None:
        self.memory, self.handle = memory, handle
        self.given_back: int | None = None

    def of(self, rank: int, shape: tuple[int, ...] | torch.Size, dtype: torch.dtype, offset: int = 0) -> Tensor:
        """A tensor in `rank`'s copy of the slot, `offset` bytes from its start."""
        return self.handle.get_buffer(rank, tuple(shape), dtype, offset // dtype.itemsize)  # type: ignore[no-any-return]


class SymmetricMemory:
    """The slots of one group, on the current GPU."""

    @staticmethod
    def is_available() -> bool:
        """Whether this build of torch has symmetric memory for CUDA."""
        try:
            import torch.distributed._symmetric_memory as symm_mem
        except ImportError:
            return False
        return hasattr(symm_mem, "rendezvous") and hasattr(symm_mem, "empty")

    def __init__(self, group: ProcessGroup) -> None:
        self._group = group
        self._slots: list[Slot] = []
        self._barriers = 0

    @property
    def nbytes(self) -> int:
        """Bytes held on this GPU, beside what torch's allocator counts."""
        return sum(slot.memory.nbytes for slot in self._slots)

    def take(self, nbytes: int) -> Slot:
        """A slot of at least `nbytes` that no peer is reading any more. Collective when it must be allocated."""
        fitting = [slot for slot in self._slots if slot.given_back is not None and slot.memory.nbytes >= nbytes]
        for slot in fitting:
            if slot.given_back is not None and slot.given_back < self._barriers:
                slot.given_back = None
                return slot
        if fitting and len(self._slots) >= _ENOUGH_SLOTS:
            self.barrier()
            fitting[0].given_back = None
            return fitting[0]
        return self._allocate(nbytes)

    def give_back(self, slot: Slot) -> None:
        """This rank has read what it wanted from its peers' slots, and from this one, on the current stream."""
        slot.given_back = self._barriers

    def barrier(self) -> None:
        """Orders everything before it on every rank's current stream ahead of everything after it on any rank's."""
        self._barriers += 1
        self._slots[0].handle.barrier(channel=0)

    def _allocate(self, nbytes: int) -> Slot:
        import torch.distributed._symmetric_memory as symm_mem

        torch.cuda.synchronize()
        torch.distributed.barrier(group=self._group)
        self._slots = [s for s in self._slots if s.given_back is None or s.memory.nbytes >= nbytes]
        device = torch.device("cuda", torch.cuda.current_device())
        memory = symm_mem.empty((-(-nbytes // _GRAIN) * _GRAIN,), dtype=torch.uint8, device=device)
        slot = Slot(memory, symm_mem.rendezvous(memory, self._group))
        self._slots.append(slot)
        return slot
