"""What can be done with tokens that are held in parts without gathering them: sums, features of each token, few tokens of all.

Each function returns None where it cannot, and the caller then gathers. They decide by shapes and indices, which are equal on
every rank. Legend: b batch, s sequence, T = b*s tokens, c = ceil(T/t), n tokens that are picked.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..comm.regions import reduce_partial
from .region import TokenRegion

__all__ = ["ACTIVATIONS", "ARITHMETIC", "features_of", "picked_tokens", "rows_like"]

ACTIVATIONS = {
    "gelu", "relu", "silu", "tanh", "sigmoid", "mish", "elu", "leaky_relu", "relu6", "hardtanh", "softplus", "square", "abs",
}  # fmt: skip
"""Functions of each number alone that are finite at zero, which is what rows beyond the last token hold."""

ARITHMETIC = {"add", "__add__", "__radd__", "sub", "__sub__", "mul", "__mul__", "__rmul__", "multiply"}
"""Without division: rows beyond the last token hold zeros."""


def rows_like(other: Tensor, source: Tensor, region: TokenRegion) -> Tensor | None:
    """This rank's rows of a tensor that is combined with tokens [b, s, ...], of which it holds `source` [1, c, ...].

    `other` is equal on every rank and broadcasts to the tokens without widening them: [s, h], [1, s, h], [b, s, 1]. One that
    has a gradient and no token dimension is not taken, because its gradient here would be a part.
    """
    features = source.shape[2:]
    lacking = len(features) + 2 - other.dim()
    if lacking < 0:
        return None
    shape = (1,) * lacking + tuple(other.shape)
    tokens, rest = shape[:2], shape[2:]
    fits = all(mine in (1, whole) for mine, whole in zip(tokens, (region.batch, region.seq), strict=True))
    if not fits or any(mine not in (1, whole) for mine, whole in zip(rest, features, strict=True)):
        return None
    if tokens == (1, 1) and region.tokens > 1:
        return None if other.requires_grad else other.reshape(shape)
    return region.local_of_replicated(other.reshape(shape).expand(region.batch, region.seq, *rest))


def features_of(source: Tensor, index: Any) -> Tensor | None:
    """[1, c, ...] of each token alone, for an index that takes all tokens: x[:, :, -1], x[..., 2:4] of [b, s, h]."""
    parts = list(index) if isinstance(index, tuple) else [index]
    if any(not (part is Ellipsis or isinstance(part, slice | int)) or isinstance(part, bool) for part in parts):
        return None
    if parts.count(Ellipsis) > 1:
        return None
    if Ellipsis in parts:
        at = parts.index(Ellipsis)
        parts[at : at + 1] = [slice(None)] * (source.dim() - len(parts) + 1)
    if len(parts) < 3 or not all(map(_takes_all, parts[:2])):
        return None
    return source[tuple(parts)]


def picked_tokens(source: Tensor, region: TokenRegion, index: Any) -> Tensor | None:
    """[..., h], equal on every rank: few of the tokens [b, s, h], by position or mask; None if they are many.

    x[:, 0], x[arange, last], x[mask]: the ranks that hold a token contribute it to an all-reduce of [n, h]; backward gives each
    token's gradient to its rank, without communication.
    """
    parts = index if isinstance(index, tuple) else (index,)
    taken, dims = [], 0
    for part in parts:
        if dims == 2:
            break
        if not isinstance(part, int | slice | Tensor) or isinstance(part, bool):
            return None
        dims += part.dim() if isinstance(part, Tensor) and part.dtype is torch.bool else 1
        taken.append(part)
    if dims > 2 or not all(part is Ellipsis or _takes_all(part) for part in parts[len(taken) :]):
        return None
    positions = torch.arange(region.tokens, device=source.device).view(region.batch, region.seq)[tuple(taken)]
    if 2 * positions.numel() > region.tokens:
        return None
    rows = source.reshape(region.rows, -1)
    local = positions.reshape(-1) - region.rows * region.groups.tp_rank
    mine = (local >= 0) & (local < region.rows)
    held = torch.where(mine.unsqueeze(-1), rows[torch.where(mine, local, 0)], 0.0)
    return reduce_partial(held, region.groups.tp_group).view(*positions.shape, *source.shape[2:])


def _takes_all(part: Any) -> bool:
    return isinstance(part, slice) and part in (slice(None), slice(0, None))
