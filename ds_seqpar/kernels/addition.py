"""Sums of rows that came from several ranks, in one pass.

Legend: c rows, w width, p parts received.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from .dispatch import SUMMED_IN_FP32, fused_kernels, runs_fused

__all__ = ["PassedGradient", "sum_into", "sum_with"]


def sum_into(own: Tensor, received: Tensor) -> Tensor:
    """own [c, w] += every part of received [p, c, w], both contiguous; fp32 arithmetic on GPUs, rounded once. Returns `own`."""
    return _sum(own, received, None, own)


def _sum(own: Tensor, received: Tensor | None, residual: Tensor | None, out: Tensor) -> Tensor:
    given = [x for x in (own, received, residual) if x is not None]
    fits = own.dtype in SUMMED_IN_FP32 and all(x.is_contiguous() and x.dtype == own.dtype for x in given)
    if runs_fused(own) and fits:
        fused_kernels().sum_parts(own, received, residual, out)
        return out
    total = own if out is own else own.clone()
    for part in received.unbind(0) if received is not None else ():
        total += part
    if residual is None:
        return total
    return torch.add(residual, total.view(residual.shape))


class PassedGradient:
    """The gradient that rows get by their way past a block, handed to the block's first node, which adds it to its own of them.

    Rows x go into a block, by its norm, and past it, as its residual; autograd would add the two gradients in a pass of its own. The
    node by which x goes in says so (`offer`) and keeps this as its `passed`; the sum behind the block, if the block's output leads
    back to that node, claims it, puts its gradient here and gives x none. So that node runs after it in every backward pass that
    wants a gradient of x.
    """

    _FAR = 64  # nodes between the sum and the block's first; further, the two stay apart

    def __init__(self) -> None:
        self._claimed = False
        self._put: tuple[int, Tensor] | None = None

    def offer(self, x: Tensor) -> None:
        """Lets the sum behind the block find this by the rows."""
        x._seqpar_passed = self  # type: ignore[attr-defined]

    @classmethod
    def claim(cls, residual: Tensor | None, output: Tensor) -> PassedGradient | None:
        """What is offered for `residual`, if `output` was made of what the node that offers it made, and nobody claimed it."""
        passed: PassedGradient | None = getattr(residual, "_seqpar_passed", None)
        if passed is None or passed._claimed or not torch.is_grad_enabled():
            return None
        passed._claimed = passed._is_before(output.grad_fn)
        return passed if passed._claimed else None

    def _is_before(self, node: Any) -> bool:
        ahead: list[Any] = [node]
        seen: set[Any] = set()
        while ahead and len(seen) < self._FAR:
            node = ahead.pop()
            if node is None or node in seen:
                continue
            if getattr(node, "passed", None) is self:
                return True
            seen.add(node)
            ahead += [following for following, _ in node.next_functions]
        return False

    def put(self, gradient: Tensor) -> None:
        """In the backward pass that is running."""
        self._put = (torch._C._current_graph_task_id(), gradient)

    def take(self) -> Tensor | None:
        """What this backward pass put here; a pass that wanted no gradient of the rows may have left its own."""
        put, self._put = self._put, None
        return put[1] if put is not None and put[0] == torch._C._current_graph_task_id() else None


class _SumWith(Function):
    @staticmethod
    def forward(
        ctx: Any, own: Tensor, received: Tensor | None, residual: Tensor | None, passed: PassedGradient | None
    ) -> Tensor:
        ctx.own_shape, ctx.handed = own.shape, passed
        return _sum(own, received, residual, own.new_empty(own.shape if residual is None else residual.shape))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, None, Tensor | None, None]:
        wants_own, _, wants_residual, _ = ctx.needs_input_grad
        if ctx.handed is not None:
            ctx.handed.put(dy)
            wants_residual = False
        return dy.view(ctx.own_shape) if wants_own else None, None, dy if wants_residual else None, None


def sum_with(own: Tensor, received: Tensor | None, residual: Tensor | None) -> Tensor:
    """own [c, w] + the parts of received [p, c, w] + residual (of as many elements, whose shape the result has).

    Differentiable in `own`, which stands for the sum of itself and what was received, and in `residual`.
    """
    return _SumWith.apply(own, received, residual, PassedGradient.claim(residual, own))  # type: ignore[no-any-return, no-untyped-call]
