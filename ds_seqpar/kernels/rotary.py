"""Rotary position embedding in one pass, q or k at a time.

Legend: b batch, n heads, s sequence, d head size.
Source: Su et al. 2021, arXiv:2104.09864, in the half-split layout of Hugging Face's `rotate_half`.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from .adjacent import Room
from .dispatch import fused_kernels, runs_fused

__all__ = ["rotate"]


def _rotated(x: Tensor, cos: Tensor, sin: Tensor, inverse: bool, out: Tensor | None = None) -> Tensor:
    if runs_fused(x) and x.stride(-1) == 1:
        return fused_kernels().rotate(x, cos, sin, inverse, out)  # type: ignore[no-any-return]
    cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
    if inverse:
        first, second = (x * sin).chunk(2, dim=-1)
        y = x * cos + torch.cat((second, -first), dim=-1)
    else:
        first, second = x.chunk(2, dim=-1)
        y = x * cos + torch.cat((-second, first), dim=-1) * sin
    return y if out is None else out.copy_(y)


def _lies_in_rows_of(width: int, x: Tensor) -> bool:
    """Whether x [b, n, s, d] is columns of a memory [b*s, width]."""
    _, heads, seq, d = x.shape
    last = x.storage_offset() + (heads - 1) * x.stride(1) + d
    apart = heads == 1 or x.stride(1) >= d
    return (x.stride(0), x.stride(2), x.stride(3)) == (seq * width, width, 1) and apart and last <= width


class _Rotate(Function):
    """Where room beside the inputs was offered (see Room), the gradients lie in memory as these do, with such room beside them."""

    @staticmethod
    def forward(ctx: Any, cos: Tensor, sin: Tensor, *xs: Tensor) -> tuple[Tensor, ...]:
        ctx.save_for_backward(cos, sin)
        width = Room.beside(*xs)
        ends = sorted((x.storage_offset(), x.storage_offset() + x.shape[1] * x.stride(1)) for x in xs)
        disjoint = all(end <= start for (_, end), (start, _) in pairwise(ends))
        fits = width is not None and disjoint and all(_lies_in_rows_of(width, x) for x in xs)
        ctx.width = width if fits else None
        ctx.layouts = [(x.shape, x.stride(), x.storage_offset()) for x in xs]
        return tuple(_rotated(x, cos, sin, False) for x in xs)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *dys: Tensor) -> tuple[Tensor | None, ...]:
        cos, sin = ctx.saved_tensors
        if ctx.width is None:
            return None, None, *(_rotated(dy, cos, sin, True) for dy in dys)
        batch, _, seq, _ = dys[0].shape
        whole = dys[0].new_empty((batch * seq, ctx.width))
        Room.offer(whole)
        outs = [whole.as_strided(*layout) for layout in ctx.layouts]
        return None, None, *(_rotated(dy, cos, sin, True, out) for dy, out in zip(dys, outs, strict=True))


def rotate(cos: Tensor, sin: Tensor, *xs: Tensor) -> tuple[Tensor, ...]:
    """x * cos + rotate_half(x) * sin of every x [b, n, s, d] (any strides, kept); cos, sin [b or 1, s, d] get no gradient."""
    return _Rotate.apply(cos, sin, *xs)  # type: ignore[no-any-return, no-untyped-call]
