"""RMS norm over a dimension that is cut over the group (OLMo-2's q and k norms over all heads)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..comm.regions import copy_for_partial, reduce_partial
from .region import ShardingState

__all__ = ["CutRMSNorm"]


class CutRMSNorm(nn.Module):
    """RMS norm of [..., d] of which this rank holds [..., d_r]: the mean square is summed over the group.

        weight [d] -> [d_r], its gradient complete
        y = weight * x * rsqrt(sum over ranks of x^2 / d + eps), in fp32 as the module it replaces

    `norm_width` is d; `norm_eps` is eps; `norm_copies` is how many ranks hold the same columns as this one.
    """

    seqpar: ShardingState
    weight: nn.Parameter
    norm_width: int
    norm_eps: float
    norm_copies: int

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """[b, s, d_r] -> [b, s, d_r]."""
        group = self.seqpar.groups.tp_group
        x = hidden_states.to(torch.float32)
        squares = x.pow(2).sum(-1, keepdim=True) / self.norm_copies
        mean = copy_for_partial(reduce_partial(squares, group), group) / self.norm_width
        return (self.weight * (x * torch.rsqrt(mean + self.norm_eps))).to(hidden_states.dtype)
