"""The vocabulary-parallel embedding. Legend: b, s, h, c = ceil(b*s/t), V vocabulary, _r this rank's part."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from ..comm.collectives import all_reduce
from ..errors import SeqParError
from ..kernels.lookup import rows_into, sums_of_rows
from .region import ShardingState, TokenRegion
from .token_handles import TokenShard

__all__ = ["VocabParallelEmbedding", "rows_of_vocabulary"]


class VocabParallelEmbedding(nn.Embedding):
    """This rank's rows of an embedding; the rows found are reduce-scattered over the tokens.

        weight [V, h] -> [V_r, h]      ids [b, s] -> TokenShard of [b, s, h] (this rank holds [1, c, h])
        forward y = reduce_scatter(own rows, zero elsewhere)    dw from all_gather(dy), complete

    Outside a forward of the model, or where tokens are not cut, the result is [b, s, h] on every rank. So it is, first, for a
    class that goes on with parameters of its own (`is_made_whole`): their gradients are complete on every rank.
    `num_embeddings` and `padding_idx` keep their meaning over the whole vocabulary.
    """

    seqpar: ShardingState
    vocab_start: int
    is_made_whole: bool = False

    def __call__(self, *args: Any, **kwargs: Any) -> Tensor:
        """ids -> embeddings; a shard leaves wrapped, after the module's hooks have seen it plain."""
        with self.seqpar.hooks_see_rows():
            output = super().__call__(*args, **kwargs)
        region, ids = self.seqpar.region, args[0] if args else kwargs["input"]
        if region is None or not region.cut or ids.shape != (region.batch, region.seq):
            return output  # type: ignore[no-any-return]
        return TokenShard(region.local_of_replicated(output) if self.is_made_whole else output, region, self.seqpar)

    def forward(self, input: Tensor) -> Tensor:
        """ids [b, s] -> [1, c, h] or [b, s, h]."""
        local, region = rows_of_vocabulary(input, self.weight, self.seqpar, self, whole=self.is_made_whole)
        return local if region.cut else local.view(*input.shape, -1)


def rows_of_vocabulary(
    ids: Tensor, weight: Tensor, state: ShardingState, embedding: nn.Embedding, *, whole: bool = False
) -> tuple[Tensor, TokenRegion]:
    """weight [V_r, w], this rank's part of a table over `embedding`'s vocabulary -> (its rows of `ids`, where they lie).

    The rows [T, w] are a sum over the ranks: [1, c, w] where the running forward cuts its tokens and not `whole`, else all of them.
    Raises IndexError for an id outside the vocabulary (on a GPU, a device-side assertion), SeqParError for ids on another device.
    """
    if ids.device != weight.device:
        raise SeqParError(
            f"input ids are on {ids.device}, the embedding on {weight.device}; move the batch to the model's device"
        )
    region, number = state.region, embedding.num_embeddings
    if region is None or whole or ids.shape != (region.batch, region.seq):
        region = TokenRegion(1, ids.numel(), False, state.groups)
    allowed = ((ids >= 0) & (ids < number)).all()
    if ids.device.type == "cpu" and not allowed:
        bad = ids[(ids < 0) | (ids >= number)]
        raise IndexError(f"input id {int(bad[0])} is outside the vocabulary of {number}")
    torch._assert_async(allowed, f"an input id is outside the vocabulary of {number}")
    local_ids = (ids - embedding.vocab_start).reshape(-1)  # type: ignore[operator]
    padding = embedding.padding_idx
    skipped = None if padding is None else int(padding - embedding.vocab_start)  # type: ignore[operator]
    rows = _RowsOfVocabulary.apply(weight, local_ids, skipped, region)  # type: ignore[no-untyped-call]
    return rows.view(region.local_shape(weight.shape[-1])), region


class _RowsOfVocabulary(Function):
    """weight [V_r, w], ids [T] counted from its first row -> [c, w], or [T, w] where tokens are not cut: the sum over the ranks of the
    rows that each has. `skipped` is an id whose row gets no gradient."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, ids: Tensor, skipped: int | None, region: TokenRegion) -> Tensor:
        ctx.region, ctx.skipped, ctx.count = region, skipped, weight.shape[0]
        ctx.save_for_backward(ids)
        if not region.cut:
            return all_reduce(
                rows_into(weight.new_empty((ids.numel(), weight.shape[1])), weight, ids), region.groups.tp_group
            )
        scattering = region.transport.scatter(region.tokens, weight.shape[1], weight)
        for rows, memory in scattering.parts():
            rows_into(memory, weight, ids[rows])
        return scattering.wait()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None, None, None]:
        region, (ids,) = ctx.region, ctx.saved_tensors
        gathering = region.transport.gather(dy, region.tokens) if region.cut else None
        mine = (ids >= 0) & (ids < ctx.count)
        if ctx.skipped is not None:
            mine &= ids != ctx.skipped
        places = torch.where(mine, ids, ctx.count)
        dw = sums_of_rows(dy if gathering is None else gathering.whole(), places, ctx.count)
        if gathering is not None:
            gathering.release()
        return dw, None, None, None
