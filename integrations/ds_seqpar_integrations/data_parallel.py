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


def gather(data: Any, tp_size: int) -> Any:
    """Every tensor in `data`, rows of all data-parallel ranks one after the other, as accelerate's gather does over the world."""

    def rows(x: Tensor) -> Tensor:
        x = (x.materialise("gather") if isinstance(x, Handle) else x).detach()
        return _each_once(x.reshape(1) if x.dim() == 0 else x, tp_size).flatten(0, 1)

    return recursively_apply(rows, data, error_on_other_type=True)


def reduce(data: Any, tp_size: int, reduction: str = "mean") -> Any:
    """Every tensor in `data`, summed (or its mean, or its maximum) over the data-parallel ranks."""

    def reduced(x: Tensor) -> Tensor:
        everyone = _each_once(x.detach(), tp_size)
        if reduction == "max":
            return everyone.amax(0)
        return everyone.sum(0) if reduction == "sum" else everyone.sum(0) / len(everyone)

    return recursively_apply(reduced, data, error_on_other_type=True)


def gather_object(objects: list[Any], tp_size: int) -> list[Any]:
    """The lists of all data-parallel ranks, one after the other."""
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, objects)
    return [x for theirs in everyone[::tp_size] for x in theirs]


def _each_once(x: Tensor, tp_size: int) -> Tensor:
    """x [...] of every data-parallel rank, [ranks, ...]."""
    shares = data_parallel_group()
    if shares is not None:
        return all_gather(x.unsqueeze(0), shares)
    world = dist.group.WORLD  # no model was sharded yet
    assert world is not None
    return all_gather(x.unsqueeze(0), world)[::tp_size]


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
