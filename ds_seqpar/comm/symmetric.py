"""Memory that every GPU of a group can read, and the rule by which it is reused.

Reads of peers' memory and barriers run on one stream of their own, in one order on all ranks, so that a rank which is late
delays only the products that need its rows. A slot may be written again when every peer has finished reading it: all ranks give
it back at the same place, after waiting for their own reads, so the first barrier after that stands behind everybody's reads,
and the next use waits for it. All ranks make the same calls in the same order, so all agree on which slot is meant.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

__all__ = ["ENOUGH_SLOTS", "GRAIN", "Slot", "SymmetricMemory"]

ENOUGH_SLOTS = 3  # with these a backward pass never waits for a barrier of its own to reuse one
GRAIN = 2 << 20  # bytes; allocations of this memory come in such pages anyway
_MOST_KEPT = 64

T = TypeVar("T")


class Slot:
    """One allocation on every rank of the group.

    `in_use`: taken and not given back. `unread`: the end of the first barrier since it was given back, None before that barrier.
    """

    def __init__(self, memory: Tensor, handle: Any) -> None:
        self.memory, self.handle = memory, handle
        self.nbytes = memory.nbytes
        self.in_use = True
        self.unread: torch.cuda.Event | None = None
        self._kept: dict[tuple[Any, ...], Any] = {}

    def of(self, rank: int, shape: tuple[int, ...], dtype: torch.dtype, offset: int = 0) -> Tensor:
        """A tensor in `rank`'s copy of the slot, `offset` bytes from its start."""
        return self.handle.get_buffer(rank, tuple(shape), dtype, offset // dtype.itemsize)  # type: ignore[no-any-return]

    def kept(self, key: tuple[Any, ...], make: Callable[[], T]) -> T:
        """What `make` gives, made once for each `key`: every step asks for the same tensors."""
        found = self._kept.get(key)
        if found is None:
            if len(self._kept) >= _MOST_KEPT:  # batches of ever new lengths
                self._kept.clear()
            found = self._kept[key] = make()
        return found


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
        self._outer: torch.cuda.Stream | None = None  # what was current when `stream` was last entered

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
        self._current().wait_event(slot.unread)
        slot.in_use, slot.unread = True, None
        return slot

    def give_back(self, slot: Slot) -> None:
        """This rank has read what it wanted from its peers' slots, and from this one, on the current stream."""
        slot.in_use = False
        self._slots.remove(slot)
        self._slots.append(slot)

    def _current(self) -> torch.cuda.Stream:
        """The current stream. The same object each time: to make one takes as long as to launch a kernel."""
        identity = torch._C._cuda_getCurrentStream(self.stream.device_index)
        if self._outer is None or identity[0] != self._outer.stream_id:
            self._outer = torch.cuda.current_stream(self.stream.device_index)
        return self._outer

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
        self._outer = outer = self._current()
        self.stream.wait_event(outer.record_event())
        torch.cuda.set_stream(self.stream)
        self._meet()
        met = None
        for slot in self._slots:
            if not slot.in_use and slot.unread is None:
                met = met or self.stream.record_event()
                slot.unread = met
        return outer

    def __exit__(self, *_: object) -> None:
        assert self._outer is not None
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
