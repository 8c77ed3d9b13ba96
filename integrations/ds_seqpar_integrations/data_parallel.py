"""A run as its data-parallel ranks see it: a tensor-parallel group is one process, and each of its rows counts once."""

from __future__ import annotations

import functools
import random
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from accelerate.utils import recursively_apply
from torch import Tensor

from ds_seqpar.comm.collectives import all_gather
from ds_seqpar.engine import data_parallel_group
from ds_seqpar.layers.handles import Handle

__all__ = ["DataParallelView", "draw_alike", "gather", "gather_object", "reduce"]


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


def draw_alike(data_loader: Any, tp_size: int) -> None:
    """Random collators and data sets draw alike on the ranks of a group, in workers and in the main process. Collective.

    A loader seeds its workers, torch's, NumPy's and Python's generators in them, from torch's main generator; transformers'
    `seed_worker` adds the rank, which has to be the data-parallel one. Ranks of other groups keep their own random numbers.
    """
    _take_states_of_the_first(tp_size)
    init = getattr(data_loader, "worker_init_fn", None)
    if not isinstance(init, functools.partial) or getattr(data_loader, "_is_accelerate_prepared", False):
        return
    if init.func.__module__ == "transformers.trainer_utils" and "rank" in init.keywords:
        by_share = {**init.keywords, "rank": init.keywords["rank"] // tp_size}
        data_loader.worker_init_fn = functools.partial(init.func, *init.args, **by_share)


def _take_states_of_the_first(tp_size: int) -> None:
    mine = (random.getstate(), np.random.get_state(), torch.get_rng_state())
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, mine)
    rank = dist.get_rank()
    ours, numpys, torchs = everyone[rank - rank % tp_size]
    random.setstate(ours)
    np.random.set_state(numpys)
    torch.set_rng_state(torchs)


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
