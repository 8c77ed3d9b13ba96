"""Sums of rows that came from several ranks, in one pass.

Legend: c rows, w width, p parts received.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from .dispatch import fused_kernels, runs_fused

__all__ = ["sum_into", "sum_with"]

_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def sum_into(own: Tensor, received: Tensor) -> Tensor:
    """own [c, w] += every part of received [p, c, w], both contiguous; fp32 arithmetic on GPUs, rounded once. Returns `own`."""
    return _sum(own, received, None, own)


def _sum(own: Tensor, received: Tensor | None, residual: Tensor | None, out: Tensor) -> Tensor:
    given = [x for x in (own, received, residual) if x is not None]
    fits = own.dtype in _DTYPES and all(x.is_contiguous() and x.dtype == own.dtype for x in given)
    if runs_fused(own) and fits:
        fused_kernels().sum_parts(own, received, residual, out)
        return out
    total = own if out is own else own.clone()
    for part in received.unbind(0) if received is not None else ():
        total += part
    if residual is None:
        return total
    return torch.add(residual, total.view(residual.shape))


class _SumWith(Function):
    @staticmethod
    def forward(ctx: Any, own: Tensor, received: Tensor | None, residual: Tensor | None) -> Tensor:
        ctx.own_shape = own.shape
        return _sum(own, received, residual, own.new_empty(own.shape if residual is None else residual.shape))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, None, Tensor | None]:
        wants = ctx.needs_input_grad
        return dy.view(ctx.own_shape) if wants[0] else None, None, dy if wants[2] else None


def sum_with(own: Tensor, received: Tensor | None, residual: Tensor | None) -> Tensor:
    """own [c, w] + the parts of received [p, c, w] + residual (of as many elements, whose shape the result has).

    Differentiable in `own`, which stands for the sum of itself and what was received, and in `residual`.
    """
    return _SumWith.apply(own, received, residual)  # type: ignore[no-any-return, no-untyped-call]
