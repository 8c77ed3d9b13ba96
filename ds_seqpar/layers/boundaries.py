"""The borders inside a model that a forward crosses: layer, block, token-wise module.

Each is a mixin put before the Hugging Face class. `__call__` converts outside the module's hooks and `forward` inside
them, so that DeepSpeed's ZeRO-3 hooks only ever see plain tensors with their autograd history.

Legend: b batch, s sequence, h hidden, c = ceil(b*s/t).
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from ..comm.regions import share_of_replicated, whole_of_share
from ..errors import SeqParError
from .attention import fastest_attention
from .deferred import NormedRows, UnsummedRows
from .norm import remake_of
from .random import seed_of_state
from .region import ShardingState, TokenRegion
from .rotary import within_sharded_block
from .surgery import parameters_of
from .token_handles import GatheredInput, TokenShard

__all__ = ["ShardedBlock", "ShardedLayer", "TokenDropout", "TokenwiseModule"]


class TokenwiseModule:
    """A module outside the layers that treats each token alone (the final norm, a head's linear): acts on the shard of a
    TokenShard.

    Its gradients are parts that are summed over the group. Where every rank has the input whole (a pooled token) each rank
    contributes its share of the gradient that all of them compute alike. `summed` names the parameters whose gradients are summed
    as this module's code uses them, so that other code may use the same parameter on whole activations.
    """

    seqpar: ShardingState
    summed: tuple[str, ...] = ()

    def __call__(self, input: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """TokenShard -> TokenShard; a plain [b, s, h] of the running forward too, while training; other tensors as before."""
        with self.seqpar.hooks_see_rows():
            return self._called(super().__call__, input, *args, **kwargs)  # type: ignore[misc]

    def _called(self, call: Callable[..., Any], input: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        state = self.seqpar
        if isinstance(input, TokenShard):
            output = call(input.local(), *args, **kwargs)
            narrower = input._expected or output.shape[-1] < input.shape[-1]
            return TokenShard(output, input.region, state, meant_whole=narrower)
        if not (state.sequence_parallel and torch.is_grad_enabled()):
            return call(input, *args, **kwargs)  # type: ignore[no-any-return]
        if state.hook_spans is not None and _is_own_rows(input, state.region):  # of a hook, which was shown them
            return call(input, *args, **kwargs)  # type: ignore[no-any-return]
        if _is_all_tokens(input, state.region):
            assert state.region is not None
            return TokenShard(call(state.region.local_of_replicated(input), *args, **kwargs), state.region, state)
        group = state.groups.tp_group
        return share_of_replicated(call(whole_of_share(input, group), *args, **kwargs), group)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The module's own, with the parameters that are summed in place of those that it holds."""
        if not (self.summed and torch.is_grad_enabled()):
            return super().forward(*args, **kwargs)  # type: ignore[misc]
        values = self.seqpar.partial.all_summed([getattr(self, name) for name in self.summed])
        shown = vars(self)  # found before the module's parameters are
        try:
            shown.update(zip(self.summed, values, strict=True))
            return super().forward(*args, **kwargs)  # type: ignore[misc]
        finally:
            for name in self.summed:
                shown.pop(name, None)


class TokenDropout:
    """Dropout outside the layers: other masks on every rank for tokens that are held in parts, the same for what all have."""

    seqpar: ShardingState

    def __call__(self, input: Tensor) -> Tensor:
        """TokenShard -> TokenShard; a plain [b, s, h] of the running forward too, while training; other tensors as before."""
        call, state = super().__call__, self.seqpar  # type: ignore[misc]
        region = state.region
        if isinstance(input, TokenShard):
            # Within a forward the stream is this rank's already.
            alone = state.random.fork(seed_of_state(), per_rank=True) if region is None else nullcontext()
            with alone:
                return TokenShard(call(input.local()), input.region, state, meant_whole=input._expected)
        if region is not None and not region.cut:
            return call(input)  # type: ignore[no-any-return]
        if state.sequence_parallel and torch.is_grad_enabled() and _is_all_tokens(input, region):
            assert region is not None
            return TokenShard(call(region.local_of_replicated(input)), region, state)
        if not (self.training and self.p):  # type: ignore[attr-defined]
            return call(input)  # type: ignore[no-any-return]
        with state.random.fork(state.random.agreed_seed(), per_rank=False):
            return call(input)  # type: ignore[no-any-return]


def _is_all_tokens(x: Tensor, region: TokenRegion | None) -> bool:
    return region is not None and x.dim() == 3 and tuple(x.shape[:2]) == (region.batch, region.seq)


def _is_own_rows(x: Tensor, region: TokenRegion | None) -> bool:
    rows = x.dim() == 3 and region is not None and region.cut and tuple(x.shape[:2]) == region.local_shape(1)[:2]
    return rows and not _is_all_tokens(x, region)


class ShardedBlock:
    """Attention or MLP: entered with the region's local tensor, which its own code sees as a GatheredInput [b, s, h]."""

    seqpar: ShardingState
    input_name: str
    recomputable: bool
    has_heads: bool
    takes_its_input_again: bool = True

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The input goes positionally, where ZeRO-3's hooks look for it."""
        if not args and self.input_name in kwargs:
            args = (kwargs.pop(self.input_name),)
        call = functools.partial(super().__call__, **kwargs)  # type: ignore[misc]
        state = self.seqpar
        replayed = state.recompute_mlp and self.recomputable and torch.is_grad_enabled() and self.training  # type: ignore[attr-defined]
        same = tuple(i for i, x in enumerate(args) if i and x is args[0])
        if same and self.takes_its_input_again:  # such as an attention's keys and values; hooks may make them other objects
            args, call = tuple(None if i in same else x for i, x in enumerate(args)), functools.partial(call, _same=same)
        if args and isinstance(args[0], NormedRows) and (replayed or id(self) in args[0].region.watched):
            args = (args[0].materialise(), *args[1:])
        if replayed:
            region = state.region

            def replay(*inputs: Any) -> Any:
                with state.within(region):
                    return call(*inputs)

            return checkpoint(replay, *args, use_reentrant=False)
        return call(*args)

    def forward(self, local: Tensor, *args: Any, _same: tuple[int, ...] = (), **kwargs: Any) -> Any:
        """local [1, c, h] (or [b, s, h] where tokens are not cut) -> what the block returns, its output local too.

        `_same`: places of arguments that are the first one once more.
        """
        state, region = self.seqpar, self.seqpar.region
        if region is None:
            raise SeqParError(
                f"{type(self).__name__} was called outside a forward of its model; a recomputed layer must go through "
                "gradient_checkpointing_enable() or the recompute field of the ds_seqpar key"
            )
        if isinstance(local, NormedRows):
            handle = GatheredInput.of_normed(local)
        else:
            handle = GatheredInput(local, region, state, remake_of(local))
        args = tuple(handle if i in _same else x for i, x in enumerate(args, 1)) if _same else args
        drops_heads = not region.cut and self.training and state.groups.tp_size > 1  # type: ignore[attr-defined]
        outer, state.in_block, state.block_forked, state.block_left = state.in_block, True, drops_heads, False
        state.sums_rows_later = not outer and torch.is_grad_enabled() and id(self) not in region.watched
        try:
            fork = state.random.fork(seed_of_state(), per_rank=True) if drops_heads else nullcontext()
            attention = fastest_attention(local.device, region.seq) if self.has_heads else nullcontext()
            with fork, attention, within_sharded_block():
                output = super().forward(handle, *args, **kwargs)  # type: ignore[misc]
        finally:
            state.in_block, state.block_forked, state.sums_rows_later = outer, False, False
            state.block_left = False
        state.found_apart |= handle.unused()  # such as the keys of a cross-attention
        if local.dim() == 2 and not region.cut and isinstance(output, Tensor) and output.dim() == 3:
            return output.flatten(0, 1)  # the layer's code takes tokens in one dimension, as OPT's does
        return output


class ShardedLayer:
    """A decoder layer: between its blocks it runs on this rank's tokens; its input and output are TokenShards.

    `token_inputs` names further arguments of its forward that hold something for each token, [b, s, ...] or [b, 1, s, ...].
    """

    seqpar: ShardingState
    token_inputs: tuple[str, ...] = ()

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """TokenShard or full [b, s, h], the first argument -> TokenShard (or, where tokens are not cut, [b, s, h])."""
        region, begin = self.seqpar.region, self.seqpar.begin
        first, *names = parameters_of(super().forward.__func__)  # type: ignore[misc]
        hidden_states, *rest = args or (kwargs.pop(first),)
        if region is None and begin is not None:
            region = begin(*hidden_states.shape[:2])
        if region is None:
            raise SeqParError(f"{type(self).__name__} was called outside a forward of its model")
        if isinstance(hidden_states, TokenShard):
            local = hidden_states.local()
        else:
            local = region.local_of_replicated(hidden_states)
        rest = [self._local(name, x, region) for name, x in zip(names, rest, strict=False)]
        kwargs = {name: self._local(name, x, region) for name, x in kwargs.items()}
        with self.seqpar.hooks_see_rows():
            output = super().__call__(local, *rest, _region=region, **kwargs)  # type: ignore[misc]
        if isinstance(output, tuple | list):
            return type(output)((self._wrapped(output[0], region), *output[1:]))
        return self._wrapped(output, region)

    def _local(self, name: str, x: Any, region: TokenRegion) -> Any:
        if isinstance(x, TokenShard):
            return x.local()
        if name not in self.token_inputs or not isinstance(x, Tensor):
            return x
        if x.dim() > 2 and x.shape[1] == 1 and tuple(x.shape[:2]) != (region.batch, region.seq):
            return region.local_of_replicated(x.transpose(1, 2)).transpose(1, 2) if region.cut else x
        return region.local_of_replicated(x)

    def _wrapped(self, local: Tensor, region: TokenRegion) -> Tensor:
        return TokenShard(local, region, self.seqpar) if region.cut else local

    def forward(self, *args: Any, _region: TokenRegion, **kwargs: Any) -> Any:
        """The region travels as an argument, so a recompute during backward stands where its forward stood."""
        state = self.seqpar
        with state.within(_region), state.partial.in_layer(self):  # type: ignore[arg-type]
            output = super().forward(*args, **kwargs)  # type: ignore[misc]
            if isinstance(output, tuple | list) and isinstance(output[0], UnsummedRows):
                return type(output)((output[0].materialise(), *output[1:]))
            return output.materialise() if isinstance(output, UnsummedRows) else output
