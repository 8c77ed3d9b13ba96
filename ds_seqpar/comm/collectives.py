"""Raw collectives: each returns a new tensor, takes any strides, and names its group.

Legend: t = group size, n = rows. World size 1 takes the same path.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

__all__ = ["Pending", "all_gather", "all_gather_async", "all_reduce", "reduce_scatter", "reduce_scatter_async"]

# torch 2.13 renamed both and warns about the old names; 2.11 knows only those.
_all_gather: Callable[..., Any] = getattr(dist, "all_gather_single", dist.all_gather_into_tensor)
_reduce_scatter: Callable[..., Any] = getattr(dist, "reduce_scatter_single", dist.reduce_scatter_tensor)


class Pending:
    """A collective in flight; `wait()` returns its result. Holds its input until then."""

    def __init__(self, work: Any, result: Tensor, source: Tensor) -> None:
        self._work, self._result, self._source = work, result, source

    def wait(self) -> Tensor:
        """The result, ordered before whatever the caller does next on its stream."""
        if self._work is not None:
            self._work.wait()
            self._work = None
        return self._result


def all_gather_async(x: Tensor, group: ProcessGroup) -> Pending:
    """Starts gathering x [n, ...] from all ranks into [t*n, ...], rank by rank."""
    x = x.contiguous()
    out = x.new_empty((x.shape[0] * dist.get_world_size(group), *x.shape[1:]))
    return Pending(_all_gather(out, x, group=group, async_op=True), out, x)


def all_gather(x: Tensor, group: ProcessGroup) -> Tensor:
    """x [n, ...] of all ranks as [t*n, ...], rank by rank."""
    x = x.contiguous()
    out = x.new_empty((x.shape[0] * dist.get_world_size(group), *x.shape[1:]))
    _all_gather(out, x, group=group)
    return out


def reduce_scatter_async(x: Tensor, group: ProcessGroup) -> Pending:
    """Starts summing x [t*n, ...] over all ranks; this rank's rows of the sum are [n, ...]."""
    x = x.contiguous()
    out = x.new_empty((x.shape[0] // dist.get_world_size(group), *x.shape[1:]))
    return Pending(_reduce_scatter(out, x, group=group, async_op=True), out, x)


def reduce_scatter(x: Tensor, group: ProcessGroup) -> Tensor:
    """This rank's rows [n, ...] of the sum of x [t*n, ...] over all ranks."""
    x = x.contiguous()
    out = x.new_empty((x.shape[0] // dist.get_world_size(group), *x.shape[1:]))
    _reduce_scatter(out, x, group=group)
    return out


def all_reduce(x: Tensor, group: ProcessGroup, op: Any = dist.ReduceOp.SUM) -> Tensor:
    """The sum (or `op`) of x over all ranks, on every rank, in a new tensor."""
    out = x.clone(memory_format=torch.contiguous_format)
    dist.all_reduce(out, op=op, group=group)
    return out
