"""The vocabulary-parallel embedding. Legend: b, s, h, c = ceil(b*s/t), V vocabulary, _r this rank's part."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import embedding as lookup

from .handles import TokenShard
from .region import ShardingState, TokenRegion

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
    Raises IndexError for an id outside the vocabulary (on a GPU, a device-side assertion).
    """
    region, number = state.region, embedding.num_embeddings
    if region is None or whole or ids.shape != (region.batch, region.seq):
        region = TokenRegion(1, ids.numel(), False, state.groups)
    allowed = ((ids >= 0) & (ids < number)).all()
    if ids.device.type == "cpu" and not allowed:
        bad = ids[(ids < 0) | (ids >= number)]
        raise IndexError(f"input id {int(bad[0])} is outside the vocabulary of {number}")
    torch._assert_async(allowed, f"an input id is outside the vocabulary of {number}")
    start = embedding.vocab_start
    local_ids = ids - start  # type: ignore[operator]
    mine = (local_ids >= 0) & (local_ids < weight.shape[0])
    padding = None
    if embedding.padding_idx is not None and 0 <= embedding.padding_idx - start < weight.shape[0]:  # type: ignore[operator]
        padding = int(embedding.padding_idx - start)  # type: ignore[operator]
    found = lookup(torch.where(mine, local_ids, 0), weight, padding)
    partial = found * mine.unsqueeze(-1).to(found.dtype)
    return region.local_of_partial(partial.reshape(region.tokens, -1)), region
