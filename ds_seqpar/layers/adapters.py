"""Low-rank adapters beside sharded linears: what they communicate has the width of the rank, not of the hidden states.

    beside a column-parallel linear     down [r, in] whole, on this rank's rows; its output [c, r] is gathered to [T, r]
                                        up [out, r] -> [out_r, r], an ordinary linear
    beside a row-parallel linear        down [r, in] -> [r, in_r], a RowParallelLinear: [T, r] is reduce-scattered to [c, r]
                                        up [out, r] whole, an ordinary linear on this rank's rows
    beside an embedding                 lookup [r, V] -> [r, V_r]: [T, r] is reduce-scattered to [c, r]
                                        mix [h, r] whole, on this rank's rows

Legend: T tokens, t tp_size, c = ceil(T/t), r rank, _r this rank's part. The gradient of a whole factor is partial.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..errors import SeqParError
from .embedding import rows_of_vocabulary
from .handles import Handle
from .linear import call_past_deepspeed
from .passages import HidesHandles
from .region import ShardingState
from .token_handles import GatheredInput, TokenShard

__all__ = ["AdapterDown", "PassesHandles", "TakesHandles", "VocabParallelLookup"]


class TakesHandles:
    """A module without parameters of its own (a wrapper, a dropout) that may be given a handle: its block's input, a gated product.

    DeepSpeed's ZeRO-3 hooks would put the handle through autograd functions below Python, and have nothing to fetch here.
    """

    def __call__(self, input: Tensor, *args: Any, **kwargs: Any) -> Any:
        """Past DeepSpeed's hooks with a handle; as ever with a tensor."""
        if not isinstance(input, Handle):
            return super().__call__(input, *args, **kwargs)  # type: ignore[misc]
        return call_past_deepspeed(self, input, *args, **kwargs)  # type: ignore[arg-type]


class PassesHandles(HidesHandles):
    """A module without parameters of its own that hands its input to one of several others, and their output on."""

    def __call__(self, input: Tensor, *args: Any, **kwargs: Any) -> Any:
        """Past all hooks with a handle, which has no gradient that they could follow; as ever with a tensor."""
        if isinstance(input, Handle):
            return super(HidesHandles, self).forward(input, *args, **kwargs)  # type: ignore[misc]
        return super().__call__(input, *args, **kwargs)


class AdapterDown(nn.Linear):
    """The down projection beside a column-parallel linear: GatheredInput [b, s, in] -> [b, s, r] on every rank.

    dweight is partial (each rank saw c rows) and is summed over the group; dx is reduce-scattered at width r. A plain tensor
    inside a block, equal on every rank, is multiplied whole: its gradient is partial for the same sum.
    """

    seqpar: ShardingState

    def __call__(self, input: Tensor) -> Tensor:
        """The gather stands outside the module's hooks, which see plain tensors."""
        if isinstance(input, GatheredInput):
            return input.region.full_for_partial(super().__call__(input.rows()))
        state = self.seqpar
        if torch.is_grad_enabled() and not (state.sequence_parallel and state.in_block):
            raise SeqParError(
                "an adapter of a column-parallel linear was given a tensor that is not its block's input; with "
                '"sequence_parallel": false an adapter can have no dropout'
            )
        return super().__call__(input)  # type: ignore[no-any-return]


class LookedUp(TokenShard):
    """Rows [b, s, r] of an adapter's lookup; multiplied with its mix [r, h], whose gradient is summed, they stay a shard."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if getattr(func, "__name__", "") in ("matmul", "__matmul__") and isinstance(args[0], LookedUp):
            rows, mix = args
            if type(mix) in (Tensor, nn.Parameter) and rows.is_untouched():
                return TokenShard(rows.source @ mix, rows.region, rows.state)
        return super().__torch_function__(func, types, args, kwargs)


class VocabParallelLookup:
    """An embedding's adapter: ids [b, s] -> its lookup's rows, of which each rank knows those of its part of the vocabulary."""

    seqpar: ShardingState

    def _embed(self, input: Tensor, weight: Tensor, *_: Any, **__: Any) -> Tensor:
        """ids [b, s], weight [V_r, r] -> [b, s, r], this rank's tokens of it where the model's tokens are cut."""
        base = self.get_base_layer()  # type: ignore[attr-defined]
        local, region = rows_of_vocabulary(input, weight, self.seqpar, base)
        return LookedUp(local, region, self.seqpar) if region.cut else local.view(*input.shape, -1)
