"""The vocabulary-parallel embedding. Legend: b, s, h, c = ceil(b*s/t), V vocabulary, _r this rank's part."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import embedding

from .handles import TokenShard
from .region import ShardingState, TokenRegion

__all__ = ["VocabParallelEmbedding"]


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
        state = self.seqpar
        region = state.region
        if region is None or self.is_made_whole or input.shape != (region.batch, region.seq):
            region = TokenRegion(1, input.numel(), False, state.groups)
        allowed = ((input >= 0) & (input < self.num_embeddings)).all()
        if input.device.type == "cpu" and not allowed:
            bad = input[(input < 0) | (input >= self.num_embeddings)]
            raise IndexError(f"input id {int(bad[0])} is outside the vocabulary of {self.num_embeddings}")
        torch._assert_async(allowed, f"an input id is outside the vocabulary of {self.num_embeddings}")
        local_ids = input - self.vocab_start
        mine = (local_ids >= 0) & (local_ids < self.weight.shape[0])
        padding = None
        if self.padding_idx is not None and 0 <= self.padding_idx - self.vocab_start < self.weight.shape[0]:
            padding = self.padding_idx - self.vocab_start
        found = embedding(torch.where(mine, local_ids, 0), self.weight, padding)
        partial = found * mine.unsqueeze(-1).to(found.dtype)
        local = region.local_of_partial(partial.reshape(region.tokens, -1))
        return local if region.cut else local.view(*input.shape, -1)
