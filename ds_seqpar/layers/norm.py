"""RMS norm over a dimension that is cut over the group (OLMo-2's q and k norms over all heads)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..comm.regions import copy_for_partial, reduce_partial
from .region import ShardingState

__all__ = ["CutRMSNorm", "rms_epsilon"]


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


@torch.no_grad()
def rms_epsilon(module: nn.Module) -> float | None:
    """The epsilon of an RMS norm that proves to compute what CutRMSNorm does, otherwise None."""
    weight = getattr(module, "weight", None)
    epsilon = next(
        (e for a in ("variance_epsilon", "eps", "epsilon") if isinstance(e := getattr(module, a, None), float)), None
    )
    if isinstance(weight, Tensor) and epsilon is not None:
        x = torch.randn(3, weight.shape[0], generator=torch.Generator().manual_seed(0)).to(weight.device, weight.dtype)
        wide = x.to(torch.float32)
        expected = (weight * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + epsilon))).to(x.dtype)
        if torch.allclose(
            module(x), expected, rtol=64 * torch.finfo(torch.promote_types(x.dtype, torch.bfloat16)).eps, atol=1e-5
        ):
            return epsilon
    return None
