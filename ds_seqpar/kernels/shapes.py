"""Stand-ins of the Triton kernels for fake tensors: the same results in shape, dtype and memory, the same bytes read and written."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = [
    "copied_rows", "cross_entropy_combined", "cross_entropy_gradient_", "cross_entropy_statistics", "gated", "gated_backward", "rms_norm",
    "rms_norm_backward", "rotate", "rows_into", "scaled", "scaled_", "sum_parts", "sum_runs",
]  # fmt: skip


def gated(gate: Tensor, up: Tensor, act: str) -> Tensor:
    """See gating.gated."""
    return gate * up


def gated_backward(dproduct: Tensor, gate: Tensor, up: Tensor, act: str) -> tuple[Tensor, Tensor, Tensor]:
    """See gating.gated_backward."""
    dproduct = dproduct.contiguous()
    # Views, where Triton's are tensors of their own: fake tensors never let go of a storage that was set.
    dgate, dup = gate.new_empty((gate.shape[0], 2 * gate.shape[1])).chunk(2, dim=1)
    return dgate.copy_(gate), dup.copy_(up), dproduct.mul_(1.0)


def rms_norm(x: Tensor, weight: Tensor, eps: float, out: Tensor) -> Tensor:
    """See triton_kernels.rms_norm."""
    out.copy_(x.view(out.shape))
    return x.new_empty(x.numel() // x.shape[-1], dtype=torch.float32)


def rms_norm_backward(
    dy: Tensor, x: Tensor, weight: Tensor, root: Tensor, wants_dweight: bool, more: Tensor | None = None,
    beside: Tensor | None = None, also: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """See triton_kernels.rms_norm_backward."""
    for read in (more, beside):
        if read is not None:
            read.amax()
    if also is not None:
        also.fill_(0.0)
    return torch.add(dy.view(x.shape), x), torch.empty_like(weight) if wants_dweight else None


def rotate(x: Tensor, cos: Tensor, sin: Tensor, inverse: bool, out: Tensor | None = None) -> Tensor:
    """See rotary.rotate."""
    out = torch.empty_like(x) if out is None else out
    return (out if out.stride(-1) == 1 else x.new_empty(x.shape)).copy_(x)


def rows_into(out: Tensor, weight: Tensor, ids: Tensor) -> None:
    """See lookup.rows_into."""
    torch.index_select(weight, 0, ids, out=out)


def cross_entropy_statistics(logits: Tensor, local_targets: Tensor) -> Tensor:
    """See cross_entropy.statistics."""
    return logits.amax(-1).to(torch.float32).expand(3, -1).contiguous()


def cross_entropy_combined(everyones: Tensor, targets: Tensor, ignore_index: int) -> tuple[Tensor, Tensor, Tensor]:
    """See cross_entropy.combined."""
    first = everyones.amax((0, 1))
    return first, torch.empty_like(first), torch.empty_like(first)


def cross_entropy_gradient_(logits: Tensor, local_targets: Tensor, log_sum: Tensor, scale: Tensor) -> Tensor:
    """See cross_entropy.gradient_."""
    return logits.mul_(1.0)


def scaled(x: Tensor, factor: Tensor, dtype: torch.dtype) -> Tensor:
    """See cross_entropy.scaled."""
    return torch.empty_like(x, dtype=dtype).copy_(x)


def scaled_(x: Tensor, factor: Tensor) -> None:
    """See cross_entropy.scaled_: of a mean's gradients nothing is read."""


def sum_parts(own: Tensor, received: Tensor | None, residual: Tensor | None, out: Tensor) -> None:
    """See triton_kernels.sum_parts."""
    out.copy_(own.view(out.shape))
    for read in (received, residual):
        if read is not None:
            read.amax()


def copied_rows(out: Tensor, x: Tensor) -> None:
    """See triton_kernels.copied_rows."""
    out.copy_(x)


def sum_runs(out: Tensor, dy: Tensor, ordered: Tensor, order: Tensor) -> None:
    """See triton_kernels.sum_runs."""
    dy.amax()
    out[: dy.shape[0]].fill_(0.0)
