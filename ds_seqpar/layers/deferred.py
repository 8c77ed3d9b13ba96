"""Handles of what need not be computed: the next layer makes it a part of its own work, and keeps less for backward.

Legend: h hidden, c = ceil(b*s/t), p = the peers whose part was received.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..kernels.addition import sum_with
from ..kernels.dispatch import is_plain
from .early import RowsMark
from .handles import Handle, name_of, refuse_outside_graph
from .region import ShardingState

__all__ = ["GatedActivation", "GatedProduct", "NormedRows", "UnsummedRows"]


class _Deferred(Handle):
    """Not a part of anything: a tensor of this rank that is not computed until somebody needs it as such."""

    _elementwise: set[str] = set()

    def _count(self, name: str) -> None:
        pass

    @classmethod
    def of(cls, source: Tensor, state: ShardingState, requires_grad: bool | None = None) -> Any:
        """The handle of a function of `source` that has its shape; `requires_grad` if not as `source`."""
        region = state.region
        assert region is not None, "made in a layer, by a forward that is running"
        return cls._make(tuple(source.shape), source, region, state, source.dtype, requires_grad)


class GatedActivation(_Deferred):
    """act(gate); multiplied with a tensor of its shape it becomes a GatedProduct."""

    act: str
    compute: Callable[[Tensor], Tensor]

    def _gather(self) -> Tensor:
        return self.compute(self.source)

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if name_of(func)[0] in ("mul", "__mul__", "__rmul__", "multiply") and len(args) == 2 and not kwargs:
            gate, up = args if isinstance(args[0], GatedActivation) else args[::-1]
            alike = is_plain(up) and up.shape == gate.shape and up.dtype == gate.dtype
            if alike and gate.is_untouched() and gate._grad_mode == torch.is_grad_enabled():
                product: GatedProduct = GatedProduct.of(gate.source, gate.state)
                product.up, product.act, product.compute = up, gate.act, gate.compute
                return product
        return super().__torch_function__(func, types, args, kwargs)


class GatedProduct(_Deferred):
    """act(gate) * up; a row-parallel linear takes it apart, keeps gate and up, and makes the product again in backward."""

    up: Tensor
    act: str
    compute: Callable[[Tensor], Tensor]

    def _gather(self) -> Tensor:
        return self.compute(self.source) * self.up


class NormedRows(_Deferred):
    """RMS norm of this rank's rows, `source` [1, c, h], with `weight` [h]: a sharded block makes it a part of its products."""

    weight: Tensor
    eps: float
    compute: Callable[[], Tensor]

    @classmethod
    def of_norm(cls, x: Tensor, weight: Tensor, eps: float, state: ShardingState, compute: Callable[[], Tensor]) -> Any:
        """The handle of rms_norm(x, weight, eps), which is what `compute` returns."""
        handle = cls.of(x, state, requires_grad=x.requires_grad or weight.requires_grad)
        handle.weight, handle.eps, handle.compute = weight, eps, compute
        return handle

    def _autograd(self, name: str) -> Any:
        if name == "requires_grad":
            return self.source.requires_grad or self.weight.requires_grad
        return getattr(self.materialise(), name)

    def _gather(self) -> Tensor:
        return self.compute()


class UnsummedRows(_Deferred):
    """What a row-parallel linear makes of this rank's rows, `source` in the region's local shape, before what was `received`
    [p, c, h] for them is added: the layer's code adds its residual, and all is one pass."""

    received: Tensor | None

    @classmethod
    def of_addends(cls, own: Tensor, received: Tensor | None, state: ShardingState) -> Any:
        """The handle of their sum; `own` has the gradient's history of both."""
        handle = cls.of(own, state)
        handle.received = received
        return handle

    def _gather(self) -> Tensor:
        return self._marked(sum_with(self.source, self.received, None))

    def _marked(self, total: Tensor) -> Tensor:
        mark = RowsMark.of(self.source)
        if mark is not None:
            mark.put(total)
        return total

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = name_of(func)[0]
        if name in ("add", "__add__", "__radd__") and len(args) == 2 and not kwargs:
            rows, residual = args if isinstance(args[0], UnsummedRows) else args[::-1]
            alike = is_plain(residual) and residual.shape == rows.shape and residual.dtype == rows.dtype
            if alike and rows.is_untouched() and rows._grad_mode == torch.is_grad_enabled():
                refuse_outside_graph(rows)
                return rows._marked(sum_with(rows.source, rows.received, residual))
        if name == "dropout" and isinstance(args[0], UnsummedRows) and not _drops(*args[1:], **(kwargs or {})):
            return args[0]
        return super().__torch_function__(func, types, args, kwargs)


def _drops(p: float = 0.5, training: bool = True, inplace: bool = False) -> bool:
    """Whether torch's dropout with these arguments would change anything."""
    return bool(p and training)
