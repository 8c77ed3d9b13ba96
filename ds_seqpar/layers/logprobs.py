"""Per-token figures of a vocabulary-parallel head (log-probabilities, entropy), in chunks: [T, V_r] logits never exist at once.

Legend: T tokens, t tp_size, c = ceil(T/t), h hidden, V vocabulary, V_r this rank's rows, n tokens of a chunk.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.functional import linear, pad
from torch.utils.checkpoint import checkpoint

from ..comm.collectives import all_reduce
from ..comm.regions import reduce_partial
from .region import TokenRegion

__all__ = ["TokenFigures", "vocab_parallel_token_figures"]


class TokenFigures(NamedTuple):
    """[T] each, on every rank; fp32 (or wider) but `is_top1`. The first two are differentiable.

    log_probs: log softmax(z)[target]                 entropy: -sum_v p_v log p_v
    log_sum_sq_probs: log sum_v p_v^2                  mean_logits: mean over v of z_v
    is_top1: whether the target is the first largest
    """

    log_probs: Tensor
    entropy: Tensor
    log_sum_sq_probs: Tensor
    mean_logits: Tensor
    is_top1: Tensor


def vocab_parallel_token_figures(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    region: TokenRegion,
    *,
    vocab_start: int,
    vocab_size: int,
    chunk_tokens: int,
    transforms: Sequence[Callable[[Tensor], Tensor]] = (),
) -> TokenFigures:
    """The figures of z = transforms(hidden @ weight.T + bias) for every token; logits are made again in backward.

    Args:
        hidden: [region.rows, h], this rank's rows.
        weight: [V_r, h], rows vocab_start .. vocab_start + V_r of the head. bias: [V_r] or None.
        targets: [T] int64 in 0 .. V-1, equal on every rank.
        chunk_tokens: logits of this many tokens exist at a time.
        transforms: elementwise functions of the logits in fp32 (a scale, a softcap, a temperature).
    """
    t = region.groups.tp_size if region.cut else 1
    lined_up = pad(targets, (0, t * region.rows - targets.numel())).view(t, region.rows)
    step = max(1, chunk_tokens // t)
    chunks = []
    for start in range(0, region.rows, step):
        rows = slice(start, min(start + step, region.rows))
        wanted = lined_up[:, rows].reshape(-1)
        act = functools.partial(_chunk, wanted, region, tuple(transforms), vocab_start, vocab_size)
        figures = checkpoint(act, hidden[rows], weight, bias, use_reentrant=False)
        chunks.append([x.view(t, -1) for x in figures])
    return TokenFigures(*(torch.cat(parts, dim=1).reshape(-1)[: region.tokens] for parts in zip(*chunks, strict=True)))


def _chunk(
    targets: Tensor, region: TokenRegion, transforms: Any, vocab_start: int, vocab_size: int, rows: Tensor,
    weight: Tensor, bias: Tensor | None,
) -> tuple[Tensor, ...]:  # fmt: skip
    group = region.groups.tp_group
    piece = TokenRegion(1, targets.numel(), region.cut, region.groups, region.exchange)
    x = piece.full_for_partial(rows.unsqueeze(0))[0]
    z = linear(x, weight, bias)
    z = z.to(torch.promote_types(z.dtype, torch.float32))  # [n, V_r]
    for transform in transforms:
        z = transform(z)
    local = targets - vocab_start
    mine = (local >= 0) & (local < z.shape[-1])
    index = torch.where(mine, local, 0).unsqueeze(-1)
    with torch.no_grad():
        highest = z.max(dim=-1)
        top = all_reduce(highest.values, group, dist.ReduceOp.MAX)
        first = torch.where(highest.values == top, highest.indices + vocab_start, vocab_size)
        is_top1 = all_reduce(first, group, dist.ReduceOp.MIN) == targets
        squares = all_reduce((z - top.unsqueeze(-1)).mul_(2).exp_().sum(-1), group)
        mean = all_reduce(z.sum(-1), group) / vocab_size
    exps = (z - top.unsqueeze(-1)).exp()
    parts = torch.stack([exps.sum(-1), (exps * z).sum(-1), z.gather(-1, index).squeeze(-1) * mine])
    total, weighted, at_target = reduce_partial(parts, group).unbind(0)
    log_z = top + total.log()
    return at_target - log_z, log_z - weighted / total, squares.log() - 2 * total.detach().log(), mean, is_top1
