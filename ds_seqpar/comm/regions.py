"""Autograd edges at the borders of the sequence-parallel and tensor-parallel regions.

Legend: T tokens, t group size, c = ceil(T/t) rows a rank, V vocabulary.
"Split" = every rank holds a different part, "replicated" = every rank holds the same, "partial" = the ranks' sum is meant.
Each forward is linear; each backward is its adjoint for the state (split, replicated, partial) that its name promises.

    edge                    forward                          backward
    gather_for_partial      [c, h] -> [T, h] all_gather      partial    -> reduce_scatter
    gather_for_replicated   [c, h] -> [T, h] all_gather      replicated -> own rows, no communication
    scatter                 [T, h] -> [c, h] own rows        split      -> all_gather
    reduce_scatter_partial  [T, h] -> [c, h] reduce_scatter  split      -> all_gather
    copy_for_partial        x -> x                           partial    -> all_reduce
    reduce_partial          x -> all_reduce                  replicated -> dy, no communication
    share_of_replicated     x -> x                           replicated -> dy / t, for an x whose gradient is summed
    whole_of_share          x -> x                           share      -> dy * t, the inverse of share_of_replicated
    gather_columns          [n, V_r] -> [n, V]               replicated -> own columns, no communication

Source: Korthikanti et al. 2022, arXiv:2205.05198, section 4.2.
"""

from __future__ import annotations

from typing import Any

import torch.distributed as dist
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable
from torch.distributed import ProcessGroup
from torch.nn.functional import pad

from .collectives import all_gather, all_reduce
from .tokens import gather_rows, own_rows, reduce_scatter_rows

__all__ = [
    "copy_for_partial",
    "gather_columns",
    "gather_for_partial",
    "gather_for_replicated",
    "reduce_partial",
    "reduce_scatter_partial",
    "scatter",
    "share_of_replicated",
    "whole_of_share",
]


class _GatherForPartial(Function):
    @staticmethod
    def forward(ctx: Any, shard: Tensor, tokens: int, group: ProcessGroup) -> Tensor:
        ctx.group = group
        return gather_rows(shard, tokens, group)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None, None]:
        return reduce_scatter_rows(dy, ctx.group), None, None


class _GatherForReplicated(Function):
    @staticmethod
    def forward(ctx: Any, shard: Tensor, tokens: int, group: ProcessGroup) -> Tensor:
        ctx.group = group
        full = gather_rows(shard, tokens, group)
        return (
            full.clone() if full._is_view() else full
        )  # the caller may change it in place; autograd forbids that of views

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None, None]:
        return own_rows(dy, ctx.group), None, None


class _Scatter(Function):
    @staticmethod
    def forward(ctx: Any, full: Tensor, group: ProcessGroup) -> Tensor:
        ctx.group, ctx.tokens = group, full.shape[0]
        return own_rows(full, group)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None]:
        return gather_rows(dy, ctx.tokens, ctx.group), None


class _ReduceScatterPartial(Function):
    @staticmethod
    def forward(ctx: Any, partial: Tensor, group: ProcessGroup) -> Tensor:
        ctx.group, ctx.tokens = group, partial.shape[0]
        return reduce_scatter_rows(partial, group)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None]:
        return gather_rows(dy, ctx.tokens, ctx.group), None


class _CopyForPartial(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: ProcessGroup) -> Tensor:
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None]:
        return all_reduce(dy, ctx.group), None


class _ReducePartial(Function):
    @staticmethod
    def forward(ctx: Any, partial: Tensor, group: ProcessGroup) -> Tensor:
        return all_reduce(partial, group)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None]:
        return dy, None


class _ShareOfReplicated(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: ProcessGroup) -> Tensor:
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None]:
        return dy / dist.get_world_size(ctx.group), None


class _WholeOfShare(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: ProcessGroup) -> Tensor:
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None]:
        return dy * dist.get_world_size(ctx.group), None


class _GatherColumns(Function):
    @staticmethod
    def forward(ctx: Any, mine: Tensor, widths: tuple[int, ...], group: ProcessGroup) -> Tensor:
        rank, widest = dist.get_rank(group), max(widths)
        ctx.start, ctx.width = sum(widths[:rank]), widths[rank]
        padded = pad(mine, (0, widest - mine.shape[-1]))
        parts = all_gather(padded.unsqueeze(0), group)  # [t, n, widest]
        whole = mine.new_empty((*mine.shape[:-1], sum(widths)))
        for part, out in zip(parts, whole.split(widths, dim=-1), strict=True):
            out.copy_(part[..., : out.shape[-1]])
        return whole

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None, None]:
        return dy.narrow(-1, ctx.start, ctx.width).contiguous(), None, None


def gather_for_partial(shard: Tensor, tokens: int, group: ProcessGroup) -> Tensor:
    """[c, h] -> [T, h], for work whose gradient differs between ranks (heads, columns, vocabulary are cut)."""
    return _GatherForPartial.apply(shard, tokens, group)  # type: ignore[no-any-return, no-untyped-call]


def gather_for_replicated(shard: Tensor, tokens: int, group: ProcessGroup) -> Tensor:
    """[c, h] -> [T, h], for work that every rank repeats alike, so that each already has the whole gradient."""
    return _GatherForReplicated.apply(shard, tokens, group)  # type: ignore[no-any-return, no-untyped-call]


def scatter(full: Tensor, group: ProcessGroup) -> Tensor:
    """[T, h] replicated -> [c, h] own rows."""
    return _Scatter.apply(full, group)  # type: ignore[no-any-return, no-untyped-call]


def reduce_scatter_partial(partial: Tensor, group: ProcessGroup) -> Tensor:
    """[T, h] partial sums -> [c, h] own rows of their sum."""
    return _ReduceScatterPartial.apply(partial, group)  # type: ignore[no-any-return, no-untyped-call]


def copy_for_partial(x: Tensor, group: ProcessGroup) -> Tensor:
    """x replicated, entering work whose gradient differs between ranks (plain tensor parallelism's f)."""
    return _CopyForPartial.apply(x, group)  # type: ignore[no-any-return, no-untyped-call]


def reduce_partial(partial: Tensor, group: ProcessGroup) -> Tensor:
    """Partial sums -> their sum on every rank (plain tensor parallelism's g)."""
    return _ReducePartial.apply(partial, group)  # type: ignore[no-any-return, no-untyped-call]


def share_of_replicated(x: Tensor, group: ProcessGroup) -> Tensor:
    """x equal on every rank, entering work that every rank repeats alike, where the gradients of x are summed later."""
    return _ShareOfReplicated.apply(x, group)  # type: ignore[no-any-return, no-untyped-call]


def whole_of_share(x: Tensor, group: ProcessGroup) -> Tensor:
    """x equal on every rank, entering work between it and a later share_of_replicated: parameters there get a share each."""
    return _WholeOfShare.apply(x, group)  # type: ignore[no-any-return, no-untyped-call]


def gather_columns(mine: Tensor, widths: tuple[int, ...], group: ProcessGroup) -> Tensor:
    """This rank's columns [n, V_r] -> all columns [n, V]; `widths` are every rank's V_r, which may differ."""
    return _GatherColumns.apply(mine, widths, group)  # type: ignore[no-any-return, no-untyped-call]
