"""Softmax cross-entropy over one rank's part of the vocabulary, in two passes over the logits.

Legend: n tokens, V_r this rank's vocabulary rows.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .dispatch import fused_kernels, runs_fused

__all__ = ["combined", "gradient_", "scaled", "scaled_", "statistics"]


def statistics(logits: Tensor, local_targets: Tensor) -> Tensor:
    """[3, n] fp32 (or the logits' wider dtype): maximum, sum of exp(logit - maximum), logit of the target.

    Args:
        logits: [n, V_r]. local_targets: [n] int64, counted from this rank's first row; outside 0 .. V_r - 1 the third is 0.
    """
    if runs_fused(logits) and logits.dtype != torch.float64:
        return fused_kernels().cross_entropy_statistics(logits, local_targets)  # type: ignore[no-any-return]
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    top = wide.max(dim=-1).values
    mine = (local_targets >= 0) & (local_targets < logits.shape[-1])
    picked = wide.gather(-1, torch.where(mine, local_targets, 0).unsqueeze(-1)).squeeze(-1) * mine
    return torch.stack([top, (wide - top.unsqueeze(-1)).exp_().sum(-1), picked])


def combined(everyones: Tensor, targets: Tensor, ignore_index: int) -> tuple[Tensor, Tensor, Tensor]:
    """(losses, logs of the sums of exp over the whole vocabulary, 1 where a token counts and 0 elsewhere), each [n].

    Args:
        everyones: [t, 3, n], every rank's `statistics`. targets: [n] int64, of the whole vocabulary. What does not count loses 0.
    """
    if runs_fused(everyones) and everyones.dtype == torch.float32:
        return fused_kernels().cross_entropy_combined(everyones, targets, ignore_index)  # type: ignore[no-any-return]
    tops, sums, picked = everyones.unbind(1)
    top = tops.max(0).values
    log_sum = (sums * (tops - top).exp_()).sum(0).log_()
    counted = targets != ignore_index
    losses = torch.where(counted, log_sum + (top - picked.sum(0)), 0.0)
    return losses, log_sum + top, counted.to(log_sum.dtype)


def gradient_(logits: Tensor, local_targets: Tensor, log_sum: Tensor, scale: Tensor) -> Tensor:
    """Overwrites logits [n, V_r] with scale * (exp(logits - log_sum) - one_hot(local_targets)); returns them.

    Args:
        log_sum: [n], log of the sum of exp over the whole vocabulary. scale: [n], 0 for tokens that do not count.
    """
    if runs_fused(logits) and logits.dtype != torch.float64:
        return fused_kernels().cross_entropy_gradient_(logits, local_targets, log_sum, scale)  # type: ignore[no-any-return]
    mine = (local_targets >= 0) & (local_targets < logits.shape[-1])
    wide = logits.to(log_sum.dtype).sub_(log_sum.unsqueeze(-1)).exp_()
    index = torch.where(mine, local_targets, 0).unsqueeze(-1)
    wide.scatter_add_(-1, index, -mine.unsqueeze(-1).to(wide.dtype))
    # 0 * inf: a token that does not count must not bring in what its logits overflowed to.
    wide.mul_(scale.unsqueeze(-1)).masked_fill_((scale == 0).unsqueeze(-1), 0.0)
    return wide if wide is logits else logits.copy_(wide)


def scaled(x: Tensor, factor: Tensor, dtype: torch.dtype) -> Tensor:
    """x * factor (a scalar tensor) in `dtype`, rounded once from the wider of x's and the factor's dtype."""
    if runs_fused(x) and x.dtype != torch.float64 and x.is_contiguous():
        return fused_kernels().scaled(x, factor, dtype)  # type: ignore[no-any-return]
    return x.to(torch.promote_types(x.dtype, factor.dtype)).mul(factor).to(dtype)


def scaled_(x: Tensor, factor: Tensor) -> Tensor:
    """x * factor (a scalar tensor) in place; left as it is where the factor is 1 to within a millionth, without reading x."""
    if runs_fused(x) and x.dtype != torch.float64 and x.is_contiguous():
        fused_kernels().scaled_(x, factor)
        return x
    return x.copy_(scaled(x, factor, x.dtype))
