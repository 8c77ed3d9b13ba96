"""What takes the place of GPUs, other ranks and values while a model of fake tensors runs one step.

A CPU-only torch cannot run autograd on fake CUDA tensors, so they are fake CPU tensors that answer as a GPU's would, and the
few operations whose CUDA form keeps something else for backward are replaced by that form.

Legend: T tokens, t tp_size, c = ceil(T/t), b batch, n heads, s sequence, d head size.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd import Function
from torch.distributed import ProcessGroup
from torch.overrides import TorchFunctionMode

from ..comm.exchange import Gathering, Scattering
from ..comm.symmetric import ENOUGH_SLOTS, GRAIN, Slot, SymmetricMemory
from ..comm.tokens import rows_per_rank
from ..errors import PlanError
from ..groups import ParallelGroups
from ..kernels.addition import sum_into
from ..kernels.dispatch import shapes_only

if TYPE_CHECKING:
    from .trace import Tracker

__all__ = ["AlikeInputs", "ModelledExchange", "NoRandom", "OwnMemory", "as_on_gpu", "fake_groups", "truthful"]


@contextmanager
def fake_groups(tp_size: int, tp_rank: int = 0) -> Iterator[ParallelGroups]:
    """Groups of ranks that are not there, in a process of its own process group: collectives return at once, without values.

    What runs in them are fake tensors, whose warning about data_ptr() is kept back: ours is only compared with itself.
    Raises PlanError if torch.distributed is in use: planning belongs into a process of its own.
    """
    from torch.testing._internal.distributed.fake_pg import FakeStore

    if dist.is_initialized():
        raise PlanError(
            "planning needs a process of its own, and torch.distributed is initialised in this one; run `python -m ds_seqpar plan`"
        )
    dist.init_process_group("fake", store=FakeStore(), rank=tp_rank, world_size=tp_size)
    try:
        group = dist.group.WORLD
        assert group is not None
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Accessing the data pointer of FakeTensor")
            yield ParallelGroups(group, group, tp_size, tp_rank)
    finally:
        dist.destroy_process_group()


class AlikeInputs:
    """In place of InputGuard: there are no other ranks to compare with."""

    any_hooked = any_users_hooks = False

    def check(self, args: Any, kwargs: Any, **about: bool) -> int:
        """Any seed will do."""
        return 0

    def everyones(self, mine: Any) -> list[Any]:
        """This rank alone."""
        return [mine]


class NoRandom:
    """In place of ParallelRandom: nothing is drawn."""

    def fork(self, seed: int, *, per_rank: bool) -> Any:
        """No stream."""
        return nullcontext()

    def agreed_seed(self) -> int:
        """Any seed will do."""
        return 0

    def leave(self) -> None:
        """Nothing was entered."""


class _Truthful(TorchFunctionMode):
    """A check of values that are not there is taken to have passed, and what follows a failed one is not run."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is Tensor.__bool__:
            return True
        return func(*args, **(kwargs or {}))


def truthful() -> TorchFunctionMode:
    """The mode that every trace runs in."""
    return _Truthful()


class _Attention(Function):
    """SDPA's flash and cuDNN kernels as far as memory and work go: keep q, k, v, the output and one fp32 number a row and head."""

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, work: float, tracker: Tracker
    ) -> Tensor:
        out = q.new_empty((*q.shape[:-1], v.shape[-1]))
        out = q.new_empty((q.shape[0], q.shape[2], q.shape[1], v.shape[-1])).transpose(1, 2) if q.dim() == 4 else out
        statistics = q.new_empty(q.shape[:-1], dtype=torch.float32)
        ctx.save_for_backward(q, k, v, bias, out, statistics)
        ctx.work, ctx.tracker = work, tracker
        tracker.attends(work)
        return out

    @staticmethod
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, bias, _, statistics = ctx.saved_tensors
        ctx.tracker.attends(2.5 * ctx.work, backward=True)
        rows = torch.empty_like(statistics)  # the sum of dout * out a row
        grads = [torch.empty_like(x) if wanted else None for x, wanted in zip((q, k, v), ctx.needs_input_grad)]
        dbias = torch.empty_like(bias) if ctx.needs_input_grad[3] else None
        del rows
        return (*grads, dbias, None, None)


class _FusedNorm(Function):
    """CUDA's rms_norm: keeps the input, the weight and one fp32 number a row."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor | None) -> Tensor:
        statistics = x.new_empty((*x.shape[:-1], 1), dtype=torch.promote_types(x.dtype, torch.float32))
        ctx.save_for_backward(x, weight, statistics)
        return torch.empty_like(x).copy_(x)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, Tensor | None]:
        x, weight, _ = ctx.saved_tensors
        dx = torch.empty_like(x).copy_(dy + x)
        dweight = None
        if weight is not None and ctx.needs_input_grad[1]:
            dweight = (dy.reshape(-1, dy.shape[-1])[:1] * x.reshape(-1, x.shape[-1])[:1]).sum(0)
        return dx if ctx.needs_input_grad[0] else None, dweight


class _AsOnGpu(TorchFunctionMode):
    """Fake CPU tensors that answer as CUDA's; see the head of this file."""

    def __init__(self, tracker: Tracker) -> None:
        super().__init__()
        self._tracker = tracker
        self._instead: dict[Any, Callable[..., Any]] = {
            torch.nn.functional.scaled_dot_product_attention: self._attention,
            torch.nn.functional.rms_norm: lambda x, shape, weight=None, eps=None: _FusedNorm.apply(x, weight),  # type: ignore[no-untyped-call]
            torch.nn.functional.dropout: self._dropout,
            torch.dropout: self._dropout,
            torch.mm: self._mm,
            torch.addmm: self._addmm,
        }

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if getattr(func, "__name__", "") == "__get__" and getattr(func, "__self__", None) is Tensor.is_cuda:
            return True
        return self._instead.get(func, func)(*args, **kwargs)

    def _attention(
        self, query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, dropout_p: float = 0.0,
        is_causal: bool = False, scale: float | None = None, enable_gqa: bool = False,
    ) -> Tensor:  # fmt: skip
        rows, columns, heads = query.shape[-2], key.shape[-2], query.shape[:-2].numel()
        work = 2.0 * heads * rows * columns * (query.shape[-1] + value.shape[-1]) * (0.5 if is_causal else 1.0)
        return _Attention.apply(query, key, value, attn_mask, work, self._tracker)  # type: ignore[no-any-return, no-untyped-call]

    def _dropout(self, input: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:
        return torch.native_dropout(input, p, training)[0] if training and p else input

    def _mm(self, a: Tensor, b: Tensor, out_dtype: torch.dtype | None = None, *, out: Tensor | None = None) -> Tensor:
        if out_dtype is None:
            return torch.mm(a, b, out=out) if out is not None else torch.mm(a, b)
        self._tracker.multiplies(a.shape[0], a.shape[1], b.shape[1])
        return a.new_empty((a.shape[0], b.shape[1]), dtype=out_dtype)

    def _addmm(
        self, total: Tensor, a: Tensor, b: Tensor, out_dtype: torch.dtype | None = None, **kwargs: Any
    ) -> Tensor:
        if out_dtype is None:
            return torch.addmm(total, a, b, **kwargs)
        self._tracker.multiplies(a.shape[0], a.shape[1], b.shape[1])
        return total


@contextmanager
def as_on_gpu(tracker: Tracker) -> Iterator[None]:
    """Fake tensors on the CPU keep, make and move what they would on a GPU."""
    with ExitStack() as stack:
        stack.enter_context(shapes_only())
        stack.enter_context(_AsOnGpu(tracker))
        yield


class OwnMemory(SymmetricMemory):
    """For rank 0 alone on a real GPU: this GPU's own memory in place of every peer's, and a barrier that launches `wait`.

    The host does what it does with peers, and the GPU copies as much, though not over the links.
    """

    def __init__(self, group: ProcessGroup, wait: Callable[[], None]) -> None:
        super().__init__(group)
        self._wait = wait

    def _meet(self) -> None:
        self._wait()

    def _allocate(self, nbytes: int) -> Slot:
        # The peers' is another: torch launches no copy from a place to itself.
        mine, theirs = (
            torch.empty(-(-nbytes // GRAIN) * GRAIN, dtype=torch.uint8, device=self.stream.device) for _ in range(2)
        )
        self._slots.append(Slot(mine, _OwnHandle(mine, theirs)))
        return self._slots[-1]


class _OwnHandle:
    """As that of a rendezvous."""

    def __init__(self, mine: Tensor, theirs: Tensor) -> None:
        self._mine, self._theirs = mine, theirs

    def get_buffer(self, rank: int, shape: tuple[int, ...], dtype: torch.dtype, offset: int) -> Tensor:
        memory = self._theirs if rank else self._mine
        return memory.view(dtype)[offset : offset + math.prod(shape)].view(shape)


@dataclass(eq=False)
class _Slot:
    """As symmetric.Slot, of which only the size is there."""

    nbytes: int
    in_use: bool = True
    unread: bool = False


class ModelledExchange:
    """In place of Exchange: the copy engines' memory, by the rule of comm/symmetric.py, and every byte that travels.

    Slots of symmetric memory lie beside torch's allocator; `symmetric_bytes` is what they grow to.
    """

    def __init__(self, group: ProcessGroup, tracker: Tracker) -> None:
        self.size, self.tracker = dist.get_world_size(group), tracker
        self._slots: list[_Slot] = []  # the one given back longest ago comes first

    @property
    def symmetric_bytes(self) -> int:
        """Bytes of peer memory held."""
        return sum(slot.nbytes for slot in self._slots)

    def take(self, nbytes: int) -> _Slot:
        """As SymmetricMemory.take."""
        fitting = [slot for slot in self._slots if not slot.in_use and slot.nbytes >= nbytes]
        slot = next((slot for slot in fitting if slot.unread), None)
        if slot is None and fitting and len(self._slots) >= ENOUGH_SLOTS:
            self.barrier()
            slot = fitting[0]
        if slot is None:
            self._slots = [slot for slot in self._slots if slot.in_use or slot.nbytes >= nbytes]
            slot = _Slot(-(-nbytes // GRAIN) * GRAIN)
            self._slots.append(slot)
        slot.in_use, slot.unread = True, False
        return slot

    def give_back(self, slot: _Slot) -> None:
        """As SymmetricMemory.give_back."""
        slot.in_use = False
        self._slots.remove(slot)
        self._slots.append(slot)

    def barrier(self) -> None:
        """As SymmetricMemory.barrier."""
        for slot in self._slots:
            slot.unread = slot.unread or not slot.in_use

    def gather_made(self, like: Tensor, make: Callable[[Tensor], None], tokens: int) -> Gathering:
        """As Exchange.gather_made."""
        with self.tracker.unseen():
            memory = torch.empty_like(like, memory_format=torch.contiguous_format)
        make(memory)
        return _Gathering(self, memory, tokens)

    def gather(self, shard: Tensor, tokens: int) -> Gathering:
        """As Exchange.gather."""
        return _Gathering(self, shard, tokens)

    def scatter(self, tokens: int, width: int, like: Tensor) -> Scattering:
        """As Exchange.scatter."""
        return _Scattering(self, tokens, width, like)


class _Gathering:
    def __init__(self, by: ModelledExchange, shard: Tensor, tokens: int) -> None:
        self._by, self._tokens = by, tokens
        self._slot = by.take(by.size * shard.nbytes) if by.size > 1 else None
        by.barrier()
        with by.tracker.unseen():
            self._full = shard.new_empty((by.size * shard.shape[0], *shard.shape[1:]))
        by.tracker.travels("exchange", (by.size - 1) * shard.nbytes)

    def arrivals(self) -> Iterator[tuple[slice, Tensor]]:
        yield slice(0, self._tokens), self.whole()

    def whole(self) -> Tensor:
        return self._full[: self._tokens]

    def release(self) -> None:
        del self._full
        if self._slot is not None:
            self._by.give_back(self._slot)


class _Scattering:
    def __init__(self, by: ModelledExchange, tokens: int, width: int, like: Tensor) -> None:
        self._by, self._tokens, self._like, self._width = by, tokens, like, width
        self._rows = rows_per_rank(tokens, by.size)

    def parts(self) -> Iterator[tuple[slice, Tensor]]:
        by, like, part = self._by, self._like, self._rows * self._width * self._like.element_size()
        self._slot = by.take(part * (by.size - 1)) if by.size > 1 else None
        self._own = like.new_empty((self._rows, self._width))
        with by.tracker.unseen():
            memory = like.new_empty((self._tokens, self._width))
        yield slice(0, self._tokens), memory
        by.barrier()
        self._received = like.new_empty((by.size - 1, self._rows, self._width))
        by.tracker.travels("exchange", (by.size - 1) * part)

    def addends(self) -> tuple[Tensor, Tensor | None]:
        if self._slot is not None:
            self._by.give_back(self._slot)
        return self._own, self._received if self._by.size > 1 else None

    def wait(self) -> Tensor:
        own, received = self.addends()
        return own if received is None else sum_into(own, received)
