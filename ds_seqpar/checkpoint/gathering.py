"""A cut parameter made whole, and cut again. Imports torch, comm and plan only."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.nn.functional import pad

from ..comm.collectives import all_gather
from ..plan.cuts import Cut

__all__ = ["gather_parameter", "part_of", "whole_of"]


def gather_parameter(local: Tensor, cut: Cut, group: ProcessGroup) -> Tensor:
    """Every rank's part of a parameter -> the whole, on every rank; exact, any dtype. Collective over `group`."""
    sizes = [cut.local_size(rank) for rank in range(dist.get_world_size(group))]
    mine, dim = local.detach(), cut.dim % local.dim()
    if short := max(sizes) - mine.shape[dim]:
        mine = pad(mine, (0, 0) * (mine.dim() - 1 - dim) + (0, short))
    parts = all_gather(mine.unsqueeze(0), group)
    if dim == 0 and cut.in_order:
        return parts.flatten(0, 1)
    return whole_of([part.narrow(dim, 0, size) for part, size in zip(parts, sizes, strict=True)], cut)


def part_of(whole: Tensor, cut: Cut, rank: int) -> Tensor:
    """A rank's part of a whole tensor, contiguous, in memory of its own."""
    parts = [whole.narrow(cut.dim, start, stop - start) for start, stop in cut.ranges[rank]]
    return torch.cat(parts, dim=cut.dim) if len(parts) > 1 else parts[0].clone(memory_format=torch.contiguous_format)


def whole_of(parts: Sequence[Tensor], cut: Cut) -> Tensor:
    """The inverse of `part_of`: every rank's part -> the whole. Raises ValueError if a part has another size."""
    shape = list(parts[0].shape)
    shape[cut.dim] = cut.size
    whole = parts[0].new_empty(shape)
    for rank, part in enumerate(parts):
        if part.shape[cut.dim] != cut.local_size(rank):
            raise ValueError(
                f"part {rank} has {part.shape[cut.dim]} indices in dimension {cut.dim}, not {cut.local_size(rank)}"
            )
        offset = 0
        for start, stop in cut.ranges[rank]:
            whole.narrow(cut.dim, start, stop - start).copy_(part.narrow(cut.dim, offset, stop - start))
            offset += stop - start
    return whole
