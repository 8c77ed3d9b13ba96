"""RMS norms: fused where the module is measured to be one, and cut where its dimension is (OLMo-2's q and k norms)."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..comm.regions import copy_for_partial, reduce_partial
from ..kernels.rms_norm import rms_norm, rms_norm_into
from .deferred import NormedRows
from .handles import Handle
from .region import ShardingState

__all__ = ["CutRMSNorm", "FusedRMSNorm", "Remake", "remake_of", "rms_norm_epsilon"]


@dataclass(frozen=True)
class Remake:
    """How a cheap tensor is computed again in backward, so that what it is `made_of` is kept and it is not.

    `into(memory, *made_of)` writes it to contiguous memory of as many elements.
    """

    into: Callable[..., object]
    made_of: tuple[Tensor, ...]  # the first is of the tensor's own shape and dtype


def remake_of(x: Tensor) -> Remake | None:
    """The Remake that the module which made `x` attached to it."""
    return getattr(x, "_seqpar_remake", None)


def rms_norm_epsilon(module: nn.Module) -> float | None:
    """The epsilon with which `module` equals torch's rms_norm with its weight, by measurement; None for any other module."""
    weight = module._parameters.get("weight")
    if isinstance(module, CutRMSNorm) or weight is None or weight.dim() != 1 or len(module._parameters) != 1:
        return None
    named = (getattr(module, name, None) for name in ("variance_epsilon", "eps", "epsilon"))
    eps = next((value for value in named if isinstance(value, float)), None)
    if eps is None or len(inspect.signature(module.forward).parameters) != 1:
        return None
    generator = torch.Generator().manual_seed(0)
    own = torch.randn(weight.shape, generator=generator)
    for scale in (1.0, eps**0.5):  # at the second the epsilon decides half of the result
        x = scale * torch.randn(3, *weight.shape, generator=generator)
        try:
            with torch.no_grad():
                y = torch.func.functional_call(module, {"weight": own}, (x,))
        except (RuntimeError, TypeError, ValueError, IndexError, AttributeError):
            return None
        if not isinstance(y, Tensor) or not torch.allclose(y, rms_norm(x, own, eps), 1e-5, 1e-6):
            return None
    return eps


class FusedRMSNorm:
    """Put before a module of which `rms_norm_epsilon` is known: one fused kernel, which keeps its input and one number a row.

    Products of its output keep the norm's input instead and compute the output again (see Remake); a block that it stands before
    makes the norm a part of its products (see NormedRows).
    """

    seqpar: ShardingState
    weight: nn.Parameter
    fused_eps: float
    weight_is_partial: bool  # its gradient is this rank's part of a sum
    stands_before_blocks: bool = False  # a layer's own, whose output a sharded block takes

    def forward(self, hidden_states: Tensor) -> Tensor:
        """[..., h] -> [..., h]; fp32 arithmetic inside, rounded once."""
        if not torch.is_grad_enabled():
            return super().forward(hidden_states)  # type: ignore[misc, no-any-return]
        x = hidden_states.materialise() if isinstance(hidden_states, Handle) else hidden_states
        eps, state, weight = self.fused_eps, self.seqpar, self.weight
        if self.weight_is_partial:
            weight = state.partial.summed(self.weight)  # type: ignore[assignment]
        # In float64 the modules themselves compute in fp32, and are right to be compared with.
        if x.dtype != weight.dtype or x.dtype is torch.float64 or torch.is_autocast_enabled(x.device.type):
            wide = x.to(torch.float32)
            return weight * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)).to(x.dtype)

        def compute() -> Tensor:
            normed = rms_norm(x, weight, eps)
            # ZeRO-3 takes the weight away after this forward and brings it back too late.
            kept = weight.detach().clone() if hasattr(self.weight, "ds_id") else weight.detach()
            remake = Remake(lambda memory, x, weight: rms_norm_into(memory, x, weight, eps), (x.detach(), kept))
            normed._seqpar_remake = remake  # type: ignore[attr-defined]
            return normed

        region = state.region
        before_block = self.stands_before_blocks and region is not None and region.cut and x.is_contiguous()
        if before_block and id(self) not in region.watched:  # type: ignore[union-attr]
            return NormedRows.of_norm(x, weight, eps, state, compute)  # type: ignore[no-any-return]
        return compute()


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
