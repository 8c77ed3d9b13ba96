"""Rows of a part of a table, and their gradients.

Legend: n ids, V_r rows of the part, w width.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .dispatch import SUMMED_IN_FP32, fused_kernels, runs_fused

__all__ = ["rows_into", "sums_of_rows"]


def rows_into(out: Tensor, weight: Tensor, ids: Tensor) -> Tensor:
    """out [n, w] = the rows of weight [V_r, w] at ids [n] int64, zero where an id is outside 0 .. V_r - 1. Returns `out`."""
    if runs_fused(weight) and weight.is_contiguous() and out.is_contiguous():
        fused_kernels().rows_into(out, weight, ids.contiguous())
        return out
    mine = (ids >= 0) & (ids < weight.shape[0])
    torch.index_select(weight, 0, torch.where(mine, ids, 0), out=out)
    return out.masked_fill_(~mine.unsqueeze(-1), 0)


def sums_of_rows(dy: Tensor, ids: Tensor, count: int) -> Tensor:
    """[count, w], row i the sum of the rows of dy [n, w] whose id is i; ids [n] int64 in 0 .. count, of which `count` itself is left out.

    On GPUs below float64 in fp32, rounded once, in the tokens' order: the same each time.
    """
    if not (runs_fused(dy) and dy.dtype in SUMMED_IN_FP32 and count < 2**31):
        # One row more, for what is not to be counted: torch leaves that out, and adds nothing.
        return torch.ops.aten.embedding_dense_backward(dy, ids, count + 1, count, False)[:count]  # type: ignore[no-any-return]
    ordered, order = torch.sort(ids.to(torch.int32), stable=True)
    out = dy.new_zeros((count, dy.shape[1]))
    fused_kernels().sum_runs(out, dy.contiguous(), ordered, order)
    return out
