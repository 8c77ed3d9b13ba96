"""All-gather and reduce-scatter of token rows in parts, so that matrix products run while the rest is under way.

A product over gathered rows starts with this rank's own; a product that is to be reduce-scattered makes first what other
ranks wait for. Two transports, chosen by facts that all ranks share:

    collectives   one part: all rows at once, on the communication library's own stream
    copy engines  a part for each rank, read from the peers' symmetric memory without using a multiprocessor

Legend: T tokens, t group size, c = ceil(T/t) rows a rank.
"""

from __future__ import annotations

import math
import socket
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from ..kernels.addition import sum_into
from .collectives import Pending, all_gather, all_gather_async, reduce_scatter, reduce_scatter_async
from .symmetric import Slot, SymmetricMemory
from .tokens import rows_per_rank

__all__ = ["Exchange", "Gathering", "Scattering", "Transport"]

_LEAST_BYTES = 1 << 20  # below this a collective's latency is less than a barrier and a copy


class Gathering(Protocol):
    """An all-gather of [c, ...] under way. Consume it by `arrivals()`, `whole()`, or both in this order, and then `release()` it."""

    def arrivals(self) -> Iterator[tuple[slice, Tensor]]:
        """(rows of T, their values) as they arrive; together all T rows."""
        ...

    def whole(self) -> Tensor:
        """[T, ...], complete for whatever follows on the current stream."""
        ...

    def release(self) -> None:
        """What was gathered is not read any more by what follows on the current stream; all of it has arrived."""
        ...


class Scattering(Protocol):
    """A reduce-scatter of [T, w] whose input is made in parts: exhaust `parts()`, do other work, then `wait()`."""

    def parts(self) -> Iterator[tuple[slice, Tensor]]:
        """(rows of T, memory [rows, w] to write them to); what other ranks wait for comes first."""
        ...

    def wait(self) -> Tensor:
        """[c, w], this rank's rows of the sum over the ranks; rows past T are zero."""
        ...

    def addends(self) -> tuple[Tensor, Tensor | None]:
        """In place of `wait`: [c, w], and [p, c, w] or None, whose sum it would return."""
        ...


class Transport(Protocol):
    """What moves the rows."""

    def gather(self, shard: Tensor, tokens: int) -> Gathering:
        """Starts gathering shard [c, ...], c = ceil(tokens/t)."""
        ...

    def gather_made(self, like: Tensor, make: Callable[[Tensor], None], tokens: int) -> Gathering:
        """`gather` of what `make(memory)` writes to memory of the shape, dtype and device of `like`."""
        ...

    def scatter(self, tokens: int, width: int, like: Tensor) -> Scattering:
        """Begins a reduce-scatter of [tokens, width] with the dtype and device of `like`."""
        ...


class Exchange:
    """Gathers and scatters token rows over one group with the best transport there is."""

    def __init__(
        self, group: ProcessGroup, cpu_group: ProcessGroup, overlap: bool, tell: Callable[[str], None] | None = None
    ) -> None:
        """`cpu_group`: the same ranks over gloo. `overlap` False: plain collectives that are waited for at once.

        `tell` is called once with a line that says which transport was chosen and why.
        """
        self._group, self._cpu_group, self._overlap, self._tell = group, cpu_group, overlap, tell
        self._collectives: Transport = _Collectives(group, overlap)
        self._copy_engines: Transport | None = None
        self._decided = not overlap
        self.remark = "plain collectives, not overlapped" if not overlap else "undecided before the first forward"

    def gather(self, shard: Tensor, tokens: int) -> Gathering:
        """Starts gathering shard [c, ...] of all ranks to [tokens, ...]."""
        return self._transport(shard, shard.nbytes).gather(shard.contiguous(), tokens)

    def gather_made(self, like: Tensor, make: Callable[[Tensor], None], tokens: int) -> Gathering:
        """Starts gathering what `make(memory)` writes to memory of the shape [c, ...], dtype and device of `like`."""
        return self._transport(like, like.nbytes).gather_made(like, make, tokens)

    def scatter(self, tokens: int, width: int, like: Tensor) -> Scattering:
        """Begins a reduce-scatter of [tokens, width] with the dtype and device of `like`."""
        rows = rows_per_rank(tokens, dist.get_world_size(self._group))
        return self._transport(like, rows * width * like.element_size()).scatter(tokens, width, like)

    def decide(self, memory: SymmetricMemory | None) -> None:
        """Takes copy engines over `memory`, or collectives for None, without asking the other ranks."""
        self._decided = True
        self._copy_engines = None if memory is None else _CopyEngines(self._group, memory)

    def _transport(self, x: Tensor, nbytes: int) -> Transport:
        if not self._decided:
            self._decide(x)
        if self._copy_engines is None or nbytes < _LEAST_BYTES or not x.is_cuda:
            return self._collectives
        return self._copy_engines

    def _decide(self, x: Tensor) -> None:
        """Whether every rank of the group can read every other's memory. Collective, once."""
        mine = (socket.gethostname(), x.device.index if x.is_cuda else None, dist.get_backend(self._group))
        everyone: list[Any] = [None] * dist.get_world_size(self._group)
        dist.all_gather_object(everyone, mine, group=self._cpu_group)
        why = self._why_not(mine, everyone)
        reasons: list[Any] = [None] * len(everyone)
        dist.all_gather_object(reasons, why, group=self._cpu_group)
        why = next((reason for reason in reasons if reason), None)
        self.decide(None if why else SymmetricMemory(self._group))
        self.remark = f"collectives on their own stream ({why})" if why else "copy engines over the GPUs' peer memory"
        if self._tell is not None:
            self._tell(f"token rows travel by {self.remark}")

    def _why_not(self, mine: tuple[Any, ...], everyone: list[tuple[Any, ...]]) -> str | None:
        if len(everyone) == 1:
            return "one rank"
        if mine[1] is None or mine[2] != "nccl":
            return f"the group runs on {mine[2]}"
        if any(host != mine[0] for host, _, _ in everyone):
            return "the group spans several hosts"
        devices = [device for _, device, _ in everyone]
        visible = torch.cuda.device_count()
        if any(device >= visible for device in devices):
            return "the ranks see different GPUs"
        if not SymmetricMemory.is_available():
            return "this torch has no symmetric memory"
        if not all(d == mine[1] or torch.cuda.can_device_access_peer(mine[1], d) for d in devices):
            return "the GPUs have no peer access"
        return None


class _Collectives:
    def __init__(self, group: ProcessGroup, asynchronous: bool) -> None:
        self.group, self.asynchronous = group, asynchronous

    def gather(self, shard: Tensor, tokens: int) -> _GatheringAtOnce:
        start = all_gather_async if self.asynchronous else all_gather
        return _GatheringAtOnce(start(shard, self.group), tokens)

    def gather_made(self, like: Tensor, make: Callable[[Tensor], None], tokens: int) -> _GatheringAtOnce:
        shard = torch.empty_like(like, memory_format=torch.contiguous_format)
        make(shard)
        return self.gather(shard, tokens)

    def scatter(self, tokens: int, width: int, like: Tensor) -> _ScatteringAtOnce:
        return _ScatteringAtOnce(self, tokens, width, like)


class _GatheringAtOnce:
    def __init__(self, pending: Pending | Tensor, tokens: int) -> None:
        self._pending, self._tokens = pending, tokens

    def arrivals(self) -> Iterator[tuple[slice, Tensor]]:
        yield slice(0, self._tokens), self.whole()

    def whole(self) -> Tensor:
        if isinstance(self._pending, Pending):
            self._pending = self._pending.wait()
        return self._pending[: self._tokens]

    def release(self) -> None:
        del self._pending


class _ScatteringAtOnce:
    def __init__(self, by: _Collectives, tokens: int, width: int, like: Tensor) -> None:
        self._by, self._tokens = by, tokens
        t = dist.get_world_size(by.group)
        self._full = like.new_empty((t * rows_per_rank(tokens, t), width))
        self._result: Pending | Tensor | None = None

    def parts(self) -> Iterator[tuple[slice, Tensor]]:
        self._full[self._tokens :].zero_()
        yield slice(0, self._tokens), self._full[: self._tokens]
        start = reduce_scatter_async if self._by.asynchronous else reduce_scatter
        self._result = start(self._full, self._by.group)
        del self._full

    def wait(self) -> Tensor:
        assert self._result is not None, "parts() was not exhausted"
        return self._result.wait() if isinstance(self._result, Pending) else self._result

    def addends(self) -> tuple[Tensor, Tensor | None]:
        return self.wait(), None


class _CopyEngines:
    """Reads from the peers' symmetric memory on a stream of its own. A group makes the same calls on all ranks."""

    def __init__(self, group: ProcessGroup, memory: SymmetricMemory) -> None:
        self.memory = memory
        self.rank, self.size = dist.get_rank(group), dist.get_world_size(group)
        # Each rank reads from a different peer at a time.
        self.peers = [(self.rank + step) % self.size for step in range(1, self.size)]

    def rows_of(self, rank: int, tokens: int) -> slice:
        rows = rows_per_rank(tokens, self.size)
        return slice(min(rank * rows, tokens), min((rank + 1) * rows, tokens))

    def gather(self, shard: Tensor, tokens: int) -> _GatheringByRank:
        return _GatheringByRank(self, shard, lambda memory: memory.copy_(shard), tokens)

    def gather_made(self, like: Tensor, make: Callable[[Tensor], None], tokens: int) -> _GatheringByRank:
        return _GatheringByRank(self, like, make, tokens)

    def scatter(self, tokens: int, width: int, like: Tensor) -> _ScatteringByRank:
        return _ScatteringByRank(self, tokens, width, like)


Rows = tuple[slice, Tensor]


@dataclass
class _GatheringViews:
    """Of one slot: where this rank writes its rows, (where to, where from) of every peer's rows, the same without dead rows."""

    mine: Tensor
    copies: list[tuple[Tensor, Tensor]]
    own: Rows | None
    peers: list[Rows | None]
    whole: Tensor

    @classmethod
    def of(
        cls, slot: Slot, by: _CopyEngines, shape: tuple[int, ...], dtype: torch.dtype, tokens: int
    ) -> _GatheringViews:
        nbytes = math.prod(shape) * dtype.itemsize
        row = nbytes // shape[0]

        def live(rank: int) -> Rows | None:
            rows = by.rows_of(rank, tokens)
            return (rows, read(rows)) if rows.stop > rows.start else None

        def read(rows: slice) -> Tensor:
            return slot.of(by.rank, (rows.stop - rows.start, *shape[1:]), dtype, rows.start * row)

        return cls(
            slot.of(by.rank, shape, dtype, by.rank * nbytes),
            [(slot.of(by.rank, shape, dtype, p * nbytes), slot.of(p, shape, dtype, p * nbytes)) for p in by.peers],
            live(by.rank),
            [live(peer) for peer in by.peers],
            read(slice(0, tokens)),
        )


class _GatheringByRank:
    """Gathers into the slot that the peers read this rank's rows from."""

    def __init__(self, by: _CopyEngines, like: Tensor, make: Callable[[Tensor], object], tokens: int) -> None:
        shape, dtype = tuple(like.shape), like.dtype
        self._memory = memory = by.memory
        self._slot = slot = memory.take(by.size * like.nbytes)
        key = ("gathering", shape, dtype, tokens)
        self._views = views = slot.kept(key, lambda: _GatheringViews.of(slot, by, shape, dtype, tokens))
        make(views.mine)
        self._arrived = []
        with memory.behind_barrier() as self._current:
            for to, source in views.copies:
                to.copy_(source)
                self._arrived.append(memory.stream.record_event())

    def arrivals(self) -> Iterator[Rows]:
        if self._views.own is not None:
            yield self._views.own
        for i, rows in enumerate(self._views.peers):
            self._current.wait_event(self._arrived[i])
            if rows is not None:
                yield rows
        self._arrived.clear()

    def whole(self) -> Tensor:
        if self._arrived:
            self._current.wait_event(self._arrived[-1])  # one stream reads them all, in order
            self._arrived.clear()
        return self._views.whole

    def release(self) -> None:
        self.whole()
        self._memory.give_back(self._slot)
        del self._slot, self._views


@dataclass
class _ScatteringViews:
    """Of one slot: what this rank makes for its peers, in their order; rows past T in it; where the peers keep what is for it."""

    parts: list[Rows]
    dead: list[Tensor]
    sources: list[Tensor]

    @classmethod
    def of(
        cls, slot: Slot, by: _CopyEngines, shape: tuple[int, int], dtype: torch.dtype, tokens: int
    ) -> _ScatteringViews:
        part = math.prod(shape) * dtype.itemsize
        views = cls([], [], [])
        for i, peer in enumerate(by.peers):
            rows, kept = by.rows_of(peer, tokens), slot.of(by.rank, shape, dtype, i * part)
            live = rows.stop - rows.start
            if live < shape[0]:
                views.dead.append(kept[live:])
            if live:
                views.parts.append((rows, slot.of(by.rank, (live, shape[1]), dtype, i * part)))
            # A rank keeps what it made for others in the order of its own peers.
            views.sources.append(slot.of(peer, shape, dtype, part * ((by.rank - peer) % by.size - 1)))
        return views


class _ScatteringByRank:
    def __init__(self, by: _CopyEngines, tokens: int, width: int, like: Tensor) -> None:
        self._by, self._tokens, self._like = by, tokens, like
        self._shape = (rows_per_rank(tokens, by.size), width)

    def parts(self) -> Iterator[Rows]:
        by, shape, like, tokens = self._by, self._shape, self._like, self._tokens
        memory, dtype = by.memory, like.dtype
        self._slot = slot = memory.take(math.prod(shape) * dtype.itemsize * (by.size - 1))
        key = ("scattering", shape, dtype, tokens)
        views = slot.kept(key, lambda: _ScatteringViews.of(slot, by, shape, dtype, tokens))
        for dead in views.dead:
            dead.zero_()
        yield from views.parts
        self._received = received = like.new_empty((by.size - 1, *shape))
        with memory.behind_barrier() as self._current:
            for to, source in zip(received.unbind(0), views.sources, strict=True):
                to.copy_(source)
            self._done = memory.stream.record_event()
        self._own = own = like.new_empty(shape)
        rows = by.rows_of(by.rank, tokens)
        live = rows.stop - rows.start
        if live < shape[0]:
            own[live:].zero_()
        if live:
            yield rows, own if live == shape[0] else own[:live]

    def addends(self) -> tuple[Tensor, Tensor | None]:
        self._current.wait_event(self._done)
        self._by.memory.give_back(self._slot)
        return self._own, self._received

    def wait(self) -> Tensor:
        own, received = self.addends()
        assert received is not None
        return sum_into(own, received)
