"""Runs one step of a sharded model on fake tensors, and counts: bytes that live and why, products, traffic, communication.

The layers' own code runs, so what is counted is what they do; no formula of a model or a layer is written down anywhere.
Tensors have shapes and no memory: a step of any size takes a second.
"""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

__all__ = ["Segment", "Tracker", "Work"]

BLOCK = 512
"""Bytes to which CUDA's caching allocator rounds."""


@dataclass
class Work:
    """What a stretch of a step does. FLOPs count a multiply and an add as two; causal attention counts half its square."""

    gemm_flops: float = 0.0
    attention_flops: float = 0.0
    attention_backward_flops: float = 0.0
    traffic_bytes: float = 0.0  # read and written by everything else
    moved_bytes: float = 0.0  # received from other ranks of the tensor-parallel group, by what overlaps
    moves: int = 0
    waited_bytes: float = 0.0  # by collectives that nothing hides
    waits: int = 0
    operations: int = 0  # that the host launches, but for what a transfer's overlap adds

    def plus(self, other: Work, times: float = 1.0) -> Work:
        """self + times * other."""
        mine, theirs = vars(self), vars(other)
        return Work(**{name: mine[name] + times * theirs[name] for name in mine})


@dataclass
class Segment:
    """A stretch of a step: a layer's forward or backward, or what lies around the layers. Bytes.

    `grew` is what stays when it ends, by why it is there (negative: what was let go); `peak` is the highest above its start;
    `gradients` is how much of `grew` became parameters' gradients.
    """

    name: str
    peak: int = 0
    grew: Counter[str] = field(default_factory=Counter)
    gradients: int = 0
    work: Work = field(default_factory=Work)

    @property
    def growth(self) -> int:
        """All that stays, gradients too."""
        return sum(self.grew.values())


class Tracker(TorchDispatchMode):
    """Counts storages while they live, and the work of every operation. Enter it inside a FakeTensorMode.

    `rounding`: bytes to which an allocation is rounded up (BLOCK for a GPU, 1 for none).
    """

    def __init__(self, rounding: int = BLOCK) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._rounding = rounding
        self._known: dict[int, Any] = {}  # storage -> weak reference with its bytes and label
        self._unseen = 0
        self._labels = ["other"]
        self.live = 0
        self.by_label: Counter[str] = Counter()
        self.parameters: list[nn.Parameter] = []
        self.segments: list[Segment] = []
        self._start, self._start_labels, self._start_gradients = 0, Counter[str](), 0

    def begin(self, name: str) -> None:
        """Ends the running segment and starts the next."""
        self.end()
        self.segments.append(Segment(name))

    def end(self) -> None:
        """Ends the running segment."""
        gradients = self._gradient_bytes()
        if self.segments:
            segment = self.segments[-1]
            segment.grew = Counter(
                {
                    k: self.by_label[k] - self._start_labels[k]
                    for k in self.by_label
                    if self.by_label[k] != self._start_labels[k]
                }
            )
            segment.gradients = gradients - self._start_gradients
        self._start, self._start_labels, self._start_gradients = self.live, Counter(self.by_label), gradients

    @property
    def work(self) -> Work:
        """Of the running segment."""
        return self.segments[-1].work if self.segments else Work()

    def exclude(self, *tensors: Tensor) -> None:
        """These are not counted: they live before and after the step."""
        for tensor in tensors:
            self._known[tensor.untyped_storage()._cdata] = None

    @contextmanager
    def label(self, why: str) -> Iterator[None]:
        """New storages are there because of `why`."""
        self._labels.append(why)
        try:
            yield
        finally:
            self._labels.pop()

    def enter_label(self, why: str) -> None:
        """As `label`, for hooks."""
        self._labels.append(why)

    def leave_label(self) -> None:
        """Ends the innermost label."""
        if len(self._labels) > 1:
            self._labels.pop()

    @contextmanager
    def unseen(self) -> Iterator[None]:
        """Allocations of the body lie beside torch's allocator."""
        self._unseen += 1
        try:
            yield
        finally:
            self._unseen -= 1

    def attends(self, flops: float, *, backward: bool = False) -> None:
        """An attention kernel ran."""
        if backward:
            self.work.attention_backward_flops += flops
        else:
            self.work.attention_flops += flops
        self.work.operations += 1

    def multiplies(self, m: int, k: int, n: int) -> None:
        """A matrix product [m, k] @ [k, n] ran that is no operation of the fake tensors."""
        self.work.gemm_flops += 2.0 * m * k * n
        self.work.operations += 1

    def travels(self, how: str, nbytes: int) -> None:
        """This rank received `nbytes` from its group: "exchange" overlaps with products, "collective" is waited for."""
        if not nbytes:
            return
        if how == "exchange":
            self.work.moved_bytes += nbytes
            self.work.moves += 1
        else:
            self.work.waited_bytes += nbytes
            self.work.waits += 1

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        results = [x for x in tree_leaves(out) if isinstance(x, Tensor)]
        for tensor in results:
            self._see(tensor)
        self._count(func, args, kwargs, out, results)
        return out

    def _count(self, func: Any, args: Any, kwargs: Any, out: Any, results: list[Tensor]) -> None:
        if func.namespace == "prim":  # asks for a device
            return
        packet = func._overloadpacket
        counter = flop_registry.get(packet, flop_registry.get(_IN_PLACE.get(packet)))
        if counter is not None:
            flops = float(counter(*args, **kwargs, out_val=out))
            if "attention" in packet.__name__:
                self.attends(flops, backward="backward" in packet.__name__)
            else:
                self.work.gemm_flops += flops
                self.work.operations += 1
            return
        if func.namespace == "c10d":
            self.work.operations += 1
            given = [x for x in tree_leaves(args) if isinstance(x, Tensor)]
            self.travels("collective", max((x.nbytes for x in given), default=0))
            return
        if func.is_view or packet.__name__ in _FREE:
            return
        self.work.operations += 1
        if packet.__name__ == "embedding":  # reads the rows that it finds
            self.work.traffic_bytes += 2 * _bytes(results[0])
            return
        given = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        written = (
            0
            if any(r is g for r in results for g in given) and packet.__name__ != "copy_"
            else sum(map(_bytes, results))
        )
        if packet.__name__ == "copy_":
            given = given[1:]
        in_place = sum(_bytes(r) for r in results if any(r is g for g in given))
        if not results:
            in_place = sum(map(_bytes, _written_to(func, args, kwargs)))
        self.work.traffic_bytes += sum(map(_bytes, given)) + written + in_place

    def _see(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._known:
            return
        if self._unseen:
            self._known[key] = weakref.ref(storage, lambda _: self._known.pop(key, None))
            return
        nbytes = -(-storage.nbytes() // self._rounding) * self._rounding
        label = self._labels[-1]

        def freed(_: Any) -> None:
            self._known.pop(key, None)
            self.live -= nbytes
            self.by_label[label] -= nbytes

        self._known[key] = weakref.ref(storage, freed)
        self.live += nbytes
        self.by_label[label] += nbytes
        if self.segments:
            self.segments[-1].peak = max(self.segments[-1].peak, self.live - self._start)

    def _gradient_bytes(self) -> int:
        with torch.utils._python_dispatch._disable_current_modes():
            return sum(
                -(-p.grad.nbytes // self._rounding) * self._rounding for p in self.parameters if p.grad is not None
            )


_IN_PLACE = {torch.ops.aten.addmm_: torch.ops.aten.addmm, torch.ops.aten.baddbmm_: torch.ops.aten.baddbmm}
"""Products into a sum that is there already, which torch's table of FLOPs leaves out."""
_FREE = {
    "empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "detach", "set_", "record_stream", "lift_fresh",
    "_unsafe_view", "resize_", "_assert_async", "alias",
}  # fmt: skip


def _written_to(func: Any, args: Any, kwargs: Any) -> list[Tensor]:
    """The arguments that an operation without a result changes. Fused optimizers change `grads` only to unscale them."""
    declared = func._schema.arguments
    given = {declared[i].name: value for i, value in enumerate(args)} | kwargs
    written = [
        given.get(a.name) for a in declared if a.alias_info is not None and a.alias_info.is_write and a.name != "grads"
    ]
    return [x for x in tree_leaves(written) if isinstance(x, Tensor)]


def _bytes(tensor: Tensor) -> int:
    """What is read of it: a dimension that was expanded is read once."""
    size = tensor.element_size()
    for extent, stride in zip(tensor.shape, tensor.stride(), strict=True):
        size *= 1 if stride == 0 else extent
    return size
