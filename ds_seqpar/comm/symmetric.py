"""Memory that every GPU of a group can read, and the rule by which it is reused.

Reads of peers' memory and barriers run on one stream of their own, in one order on all ranks, so that a rank which is late
delays only the products that need its rows. A slot may be written again when every peer has finished reading it: all ranks give
it back at the same place, after waiting for their own reads, so the first barrier after that stands behind everybody's reads,
and the next use waits for it. All ranks make the same calls in the same order, so all agree on which slot is meant.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

__all__ = ["ENOUGH_SLOTS", "GRAIN", "Slot", "SymmetricMemory"]

ENOUGH_SLOTS = 3  # with these a backward pass never waits for a barrier of its own to reuse one
GRAIN = 2 << 20  # bytes; allocations of this memory come in such pages anyway
_MOST_VIEWS = 512


class Slot:
    """One allocation on every rank of the group.

    `in_use`: taken and not given back. `unread`: the end of the first barrier since it was given back, None before that barrier.
    """

    def __init__(self, memory: Tensor, handle: Any) -> None:
        self.memory, self.handle = memory, handle
        self.nbytes = memory.nbytes
        self.in_use = True
        self.unread: torch.cuda.Event | None = None
        self._views: dict[tuple[Any, ...], Tensor] = {}

    def of(self, rank: int, shape: tuple[int, ...], dtype: torch.dtype, offset: int = 0) -> Tensor:
        """A tensor in `rank`'s copy of the slot, `offset` bytes from its start; kept, since every step asks for the same ones."""
        key = (rank, shape, dtype, offset)
        view = self._views.get(key)
        if view is None:
            if len(self._views) >= _MOST_VIEWS:  # batches of ever new lengths
                self._views.clear()
            view = self._views[key] = self.handle.get_buffer(rank, tuple(shape), dtype, offset // dtype.itemsize)
        return view


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
        """A barrier waits as long as a collective of `group` would, and then stops this rank's GPU with an error."""
        self._group = group
        self._slots: list[Slot] = []  # the one given back longest ago comes first
        self.stream = torch.cuda.Stream(priority=-1)  # a barrier is placed before the next tiles of a product
        self._outer = self.stream

    @property
    def nbytes(self) -> int:
        """Bytes held on this GPU, beside what torch's allocator counts."""
        return sum(slot.nbytes for slot in self._slots)

    def take(self, nbytes: int) -> Slot:
        """A slot of at least `nbytes` that no peer is reading any more. Collective when it must be allocated."""
        fitting = [slot for slot in self._slots if not slot.in_use and slot.nbytes >= nbytes]
        slot = next((slot for slot in fitting if slot.unread is not None), None)
        if slot is None and fitting and len(self._slots) >= ENOUGH_SLOTS:
            self.barrier()
            slot = fitting[0]
        if slot is None:
            return self._allocate(nbytes)
        assert slot.unread is not None
        torch.cuda.current_stream(self.stream.device_index).wait_event(slot.unread)
        slot.in_use, slot.unread = True, None
        return slot

    def give_back(self, slot: Slot) -> None:
        """This rank has read what it wanted from its peers' slots, and from this one, on the current stream."""
        slot.in_use = False
        self._slots.remove(slot)
        self._slots.append(slot)

    def barrier(self) -> None:
        """Orders what every rank's current stream holds so far ahead of what follows on any rank's `stream`."""
        with self.behind_barrier():
            pass

    def behind_barrier(self) -> SymmetricMemory:
        """A context on `stream`: a barrier comes first (see `barrier`), then what the body asks for. Not to be nested.

        Entered, it gives the stream that was current.
        """
        return self

    def __enter__(self) -> torch.cuda.Stream:
        # By hand: torch's own context costs a host more than the copies that it is entered for.
        self._outer = torch.cuda.current_stream(self.stream.device_index)
        self.stream.wait_event(self._outer.record_event())
        torch.cuda.set_stream(self.stream)
        self._meet()
        read = [slot for slot in self._slots if not slot.in_use and slot.unread is None]
        if read:
            met = self.stream.record_event()
            for slot in read:
                slot.unread = met
        return self._outer

    def __exit__(self, *_: object) -> None:
        torch.cuda.set_stream(self._outer)

    @functools.cached_property
    def _limit_ms(self) -> int:
        backend = self._group._get_backend(torch.device("cuda", torch.cuda.current_device()))
        return round(backend.options._timeout.total_seconds() * 1e3)

    def _meet(self) -> None:
        self._slots[0].handle.barrier(channel=0, timeout_ms=self._limit_ms)

    def _allocate(self, nbytes: int) -> Slot:
        import torch.distributed._symmetric_memory as symm_mem

        torch.cuda.synchronize()
        torch.distributed.barrier(group=self._group)
        self._slots = [s for s in self._slots if s.in_use or s.nbytes >= nbytes]
        device = torch.device("cuda", torch.cuda.current_device())
        memory = symm_mem.empty((-(-nbytes // GRAIN) * GRAIN,), dtype=torch.uint8, device=device)
        slot = Slot(memory, symm_mem.rendezvous(memory, self._group))
        self._slots.append(slot)
        return slot
