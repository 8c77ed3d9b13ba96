"""Rows of a part of a table.

Legend: n ids, V_r rows of the part, w width.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .dispatch import fused_kernels, runs_fused

__all__ = ["rows_into"]


def rows_into(out: Tensor, weight: Tensor, ids: Tensor) -> Tensor:
    """out [n, w] = the rows of weight [V_r, w] at ids [n] int64, zero where an id is outside 0 .. V_r - 1. Returns `out`."""
    if runs_fused(weight) and weight.is_contiguous() and out.is_contiguous():
        fused_kernels().rows_into(out, weight, ids.contiguous())
        return out
    mine = (ids >= 0) & (ids < weight.shape[0])
    torch.index_select(weight, 0, torch.where(mine, ids, 0), out=out)
    return out.masked_fill_(~mine.unsqueeze(-1), 0)
