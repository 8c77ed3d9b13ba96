"""A run as its data-parallel ranks see it: a tensor-parallel group is one process, and each of its rows counts once."""

from __future__ import annotations

from typing import Any

import torch.distributed as dist
from accelerate.utils import recursively_apply
from torch import Tensor

from ds_seqpar.comm.collectives import all_gather
from ds_seqpar.engine import data_parallel_group
from ds_seqpar.layers.handles import Handle

__all__ = ["DataParallelView", "gather", "gather_object", "reduce"]


def gather(data: Any) -> Any:
    """Every tensor in `data`, rows of all data-parallel ranks one after the other, as accelerate's gather does over the world."""
    group = data_parallel_group()

    def rows(x: Tensor) -> Tensor:
        x = (x.materialise("gather") if isinstance(x, Handle) else x).detach()
        return all_gather(x.reshape(1) if x.dim() == 0 else x, group)

    return recursively_apply(rows, data, error_on_other_type=True)


def gather_object(objects: list[Any]) -> list[Any]:
    """The lists of all data-parallel ranks, one after the other."""
    everyone: list[Any] = [None] * dist.get_world_size(data_parallel_group())
    dist.all_gather_object(everyone, objects, group=data_parallel_group())
    return [x for theirs in everyone for x in theirs]


def reduce(data: Any, reduction: str = "mean", scale: float = 1.0) -> Any:
    """Every tensor in `data`, summed (or its mean, or its maximum) over the data-parallel ranks; `scale` is accelerate's, for XLA."""
    group = data_parallel_group()

    def reduced(x: Tensor) -> Tensor:
        x = x.detach().clone()
        if reduction == "none":
            return x
        dist.all_reduce(x, dist.ReduceOp.MAX if reduction == "max" else dist.ReduceOp.SUM, group=group)
        return x / dist.get_world_size(group) if reduction == "mean" else x

    return recursively_apply(reduced, data, error_on_other_type=True)


class DataParallelView:
    """An Accelerator whose ranks are the data-parallel ones; everything else is the Accelerator's own."""

    def __init__(self, accelerator: Any, tp_size: int) -> None:
        self._accelerator, self._tp_size = accelerator, tp_size

    def __getattr__(self, name: str) -> Any:
        return getattr(self._accelerator, name)

    @property
    def process_index(self) -> int:
        """The data-parallel rank."""
        return int(self._accelerator.process_index // self._tp_size)

    @property
    def num_processes(self) -> int:
        """How many data-parallel ranks there are."""
        return int(self._accelerator.num_processes // self._tp_size)

    gather, reduce = staticmethod(gather), staticmethod(reduce)
