"""How T flattened tokens lie over t ranks: rank r owns rows [r*c, (r+1)*c), c = ceil(T/t).

The last rank's rows may run past T: those dead rows are zero where they enter and dropped where they leave, so
nobody outside this file meets them.
"""

from __future__ import annotations

import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.nn.functional import pad

from .collectives import all_gather, reduce_scatter

__all__ = [
    "gather_rows",
    "own_rows",
    "reduce_scatter_rows",
    "rows_per_rank",
]


def rows_per_rank(tokens: int, tp_size: int) -> int:
    """c = ceil(T/t)."""
    return -(-tokens // tp_size)


def _padded(x: Tensor, group: ProcessGroup) -> Tensor:
    """x [T, ...] -> [t*c, ...], zero rows at the end; x itself where none are needed."""
    t = dist.get_world_size(group)
    dead = rows_per_rank(x.shape[0], t) * t - x.shape[0]
    return pad(x, (0, 0) * (x.dim() - 1) + (0, dead)) if dead else x


def gather_rows(shard: Tensor, tokens: int, group: ProcessGroup) -> Tensor:
    """[c, ...] -> [T, ...]."""
    full = all_gather(shard, group)
    return full if full.shape[0] == tokens else full[:tokens]


def reduce_scatter_rows(full: Tensor, group: ProcessGroup) -> Tensor:
    """[T, ...] -> [c, ...], summed over the ranks."""
    return reduce_scatter(_padded(full, group), group)


def own_rows(full: Tensor, group: ProcessGroup) -> Tensor:
    """[T, ...] -> this rank's [c, ...], in memory of its own so that the full tensor can go."""
    rows = rows_per_rank(full.shape[0], dist.get_world_size(group))
    start = rows * dist.get_rank(group)
    mine = full[start : start + rows]
    if mine.shape[0] < rows:
        return pad(mine, (0, 0) * (full.dim() - 1) + (0, rows - mine.shape[0]))
    return mine.clone()
