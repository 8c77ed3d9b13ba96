"""Rotary position embedding in one pass, q or k at a time.

Legend: b batch, n heads, s sequence, d head size.
Source: Su et al. 2021, arXiv:2104.09864, in the half-split layout of Hugging Face's `rotate_half`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from .dispatch import fused_kernels, runs_fused

__all__ = ["rotate"]


def _rotated(x: Tensor, cos: Tensor, sin: Tensor, inverse: bool) -> Tensor:
    if runs_fused(x) and x.stride(-1) == 1:
        return fused_kernels().rotate(x, cos, sin, inverse)  # type: ignore[no-any-return]
    cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
    if inverse:
        first, second = (x * sin).chunk(2, dim=-1)
        return x * cos + torch.cat((second, -first), dim=-1)
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-second, first), dim=-1) * sin


class _Rotate(Function):
    @staticmethod
    def forward(ctx: Any, cos: Tensor, sin: Tensor, *xs: Tensor) -> tuple[Tensor, ...]:
        ctx.save_for_backward(cos, sin)
        return tuple(_rotated(x, cos, sin, False) for x in xs)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *dys: Tensor) -> tuple[Tensor | None, ...]:
        cos, sin = ctx.saved_tensors
        return None, None, *(_rotated(dy, cos, sin, True) for dy in dys)


def rotate(cos: Tensor, sin: Tensor, *xs: Tensor) -> tuple[Tensor, ...]:
    """x * cos + rotate_half(x) * sin of every x [b, n, s, d] (any strides, kept); cos, sin [b or 1, s, d] get no gradient."""
    return _Rotate.apply(cos, sin, *xs)  # type: ignore[no-any-return, no-untyped-call]
