"""RMS norm and its gradients, each in one pass over the rows.

Legend: n rows, h hidden.  Source: Zhang and Sennrich 2019, arXiv:1910.07467.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from .dispatch import SUMMED_IN_FP32, fused_kernels, runs_fused

__all__ = ["rms_norm", "rms_norm_gradients", "rms_norm_into"]

_WIDEST = 16384  # a row is held in registers


class _RMSNorm(Function):
    """Keeps x and one fp32 number a row, as torch's own."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        out = torch.empty_like(x)
        root = fused_kernels().rms_norm(x, weight, eps, out)
        ctx.save_for_backward(x, weight, root)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor | None, None]:
        x, weight, root = ctx.saved_tensors
        dx, dweight = fused_kernels().rms_norm_backward(dy.contiguous(), x, weight, root, ctx.needs_input_grad[1])
        return dx, dweight, None


def _fits(x: Tensor, weight: Tensor) -> bool:
    alike = x.dtype == weight.dtype and x.dtype in SUMMED_IN_FP32
    return runs_fused(x) and alike and x.is_contiguous() and weight.is_contiguous() and x.shape[-1] <= _WIDEST


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * weight for x [..., h], weight [h] of one dtype; fp32 arithmetic, rounded once."""
    if not _fits(x, weight):
        return torch.nn.functional.rms_norm(x, x.shape[-1:], weight, eps)
    return _RMSNorm.apply(x, weight, eps)  # type: ignore[no-any-return, no-untyped-call]


def rms_norm_into(out: Tensor, x: Tensor, weight: Tensor, eps: float) -> Tensor | None:
    """`rms_norm` without gradients, written to contiguous memory of as many elements; what `rms_norm_gradients` takes as `root`."""
    if not _fits(x, weight):
        out.copy_(torch.nn.functional.rms_norm(x, x.shape[-1:], weight, eps).view(out.shape))
        return None
    return fused_kernels().rms_norm(x, weight, eps, out)  # type: ignore[no-any-return]


def rms_norm_gradients(
    dy: Tensor,
    more: Tensor | None,
    x: Tensor,
    weight: Tensor,
    root: Tensor | None,
    eps: float,
    wants_dweight: bool,
    beside: Tensor | None = None,
    also: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """(dx, dweight or None) where the output's gradient is dy + every part of `more` [p, ...], and `rms_norm_into` gave `root`.

    `beside`, of as many elements as x, is added to dx: what else x gets. dx is written to `also` too, contiguous and as large.
    """
    if root is not None:
        more, beside = (None if part is None else part.contiguous() for part in (more, beside))
        gradients = fused_kernels().rms_norm_backward(
            dy.contiguous(), x, weight, root, wants_dweight, more, beside, also
        )
        return gradients  # type: ignore[no-any-return]
    dy = dy if more is None else dy + more.sum(0)
    with torch.enable_grad():
        x, weight = x.detach().requires_grad_(), weight.detach().requires_grad_()
        y = torch.nn.functional.rms_norm(x, x.shape[-1:], weight, eps)
    dx, dweight = torch.autograd.grad(y, (x, weight), dy.view(y.shape))
    dx = dx if beside is None else dx + beside.reshape(dx.shape)
    if also is not None:
        also.copy_(dx.view(also.shape))
    return dx, dweight if wants_dweight else None
