"""Blocks beside attention and MLP with shared gathers: mixtures of experts, and blocks that every rank repeats.

    block           its code sees                its output is             replicated parameters in it
    SummedBlock     all T tokens, gathered once  a partial sum, reduce-    partial: the block's gradient on a rank is a part
                                                 scattered once
    ExpertsBlock    as SummedBlock; also the choices and weights that were made on this rank's tokens are gathered
    WholeBlock      all T tokens                 equal on every rank       full

Legend: b batch, s sequence, T = b*s tokens, h hidden, c = ceil(T/t), k choices a token.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear
from torch.utils._pytree import tree_map

from ..comm.regions import copy_for_partial, share_of_replicated
from ..errors import SeqParError
from .boundaries import ShardedBlock
from .region import ShardingState, TokenRegion
from .surgery import parameters_of
from .token_handles import GatheredInput, TokenShard

__all__ = [
    "ExpertsBlock",
    "FirstRankOnly",
    "HeadInputs",
    "InnerModule",
    "PartialSumLinear",
    "ReplicatedModule",
    "Router",
    "SummedBlock",
    "WholeBlock",
    "added_once",
    "draws_random_numbers",
]


def draws_random_numbers(module: nn.Module) -> bool:
    """True if dropout, jitter or noise is switched on anywhere in `module`."""
    for part in module.modules():
        if isinstance(part, nn.Dropout) and part.p > 0:
            return True
        for name, value in vars(part).items():
            if isinstance(value, float) and value > 0 and any(w in name for w in ("dropout", "jitter", "noise")):
                return True
    return False


class _AlikeBlock(ShardedBlock):
    """A block whose random numbers must be equal on every rank."""

    draws: bool
    takes_its_input_again = False

    def _region(self) -> TokenRegion:
        region = self.seqpar.region
        if region is None:
            raise SeqParError(f"{type(self).__name__} was called outside a forward of its model")
        return region

    @contextmanager
    def _alike(self) -> Iterator[None]:
        random = self.seqpar.random
        alike = self.draws and self.training  # type: ignore[attr-defined]
        with random.fork(random.agreed_seed(), per_rank=False) if alike else nullcontext():
            yield

    def _original(self, *args: Any, **kwargs: Any) -> Any:
        return super(ShardedBlock, self).forward(*args, **kwargs)  # type: ignore[misc]


def _first(output: Any, change: Callable[[Tensor], Tensor]) -> Any:
    return type(output)((change(output[0]), *output[1:])) if isinstance(output, tuple | list) else change(output)


class SummedBlock(_AlikeBlock):
    """Gathers its input once; its code's output is a partial sum over the ranks and is reduce-scattered once."""

    def forward(self, local: Tensor, *args: Any, **kwargs: Any) -> Any:
        """local [1, c, h] -> what the block returns, its first output local too."""
        region, state = self._region(), self.seqpar
        outer, state.in_block = state.in_block, True
        try:
            with self._alike():
                output = self._original(region.full_for_partial(local), *args, **kwargs)
        finally:
            state.in_block = outer
        return _first(output, lambda x: region.local_of_partial(x.reshape(region.tokens, -1)))


class ExpertsBlock(_AlikeBlock):
    """Experts that the layer itself calls with [c, h] tokens and the [c, k] choices and weights made on them."""

    def forward(self, local: Tensor, *choices: Tensor, **kwargs: Any) -> Tensor:
        """[c, h] and its choices -> [c, h]."""
        region = self._region()

        def whole(x: Any) -> Any:
            return region.full_for_partial(x.unsqueeze(0)).view(region.tokens, -1) if isinstance(x, Tensor) else x

        output = self._original(whole(local), *map(whole, choices), **{k: whole(v) for k, v in kwargs.items()})
        return region.local_of_partial(output.reshape(region.tokens, -1)).view(local.shape)


class WholeBlock(_AlikeBlock):
    """Every rank runs the whole block on all tokens; exact for any block, but nothing of it is divided."""

    def forward(self, local: Tensor, *args: Any, **kwargs: Any) -> Any:
        """local [1, c, h] -> what the block returns, its first output local too."""
        region = self._region()
        if any(isinstance(x, Tensor) and x.shape == local.shape for x in (*args, *kwargs.values())) and region.cut:
            raise SeqParError(
                f"{type(self).__name__} is repeated whole by every rank, but takes more than one tensor of this rank's tokens; its "
                "model type needs a data file that says what becomes of it"
            )
        full = region.full_for_replicated(local)
        with self._alike():
            output = self._original(full, *args, **kwargs)
        return _first(output, lambda x: region.local_of_replicated(x.reshape(region.batch, region.seq, -1)))


class Router:
    """Chooses experts from all tokens, alike on every rank: what leaves its hooks (recorded logits, for the auxiliary loss)
    has the complete gradient, and so have its parameters.

    Its input stands in a SummedBlock, whose backward sums over the ranks: each rank contributes its share. What the block's
    code makes of its outputs differs between ranks in its gradient, which is summed here.
    """

    seqpar: ShardingState

    def __call__(self, input: Tensor, *args: Any, **kwargs: Any) -> Any:
        group = self.seqpar.groups.tp_group
        output = super().__call__(share_of_replicated(input, group), *args, **kwargs)  # type: ignore[misc]

        def leave(x: Any) -> Any:
            return copy_for_partial(x, group) if isinstance(x, Tensor) and x.requires_grad else x

        return tree_map(leave, output)


class InnerModule:
    """A replicated linear or norm inside a block. Given the block's input it acts on this rank's tokens, and its output is
    gathered where it is used: a latent is narrower than what it is made of. Its gradient is partial either way."""

    seqpar: ShardingState

    def __call__(self, input: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """GatheredInput [b, s, w] -> GatheredInput [b, s, w']; a plain tensor as before."""
        call = super().__call__  # type: ignore[misc]
        if not isinstance(input, GatheredInput):
            return call(input, *args, **kwargs)  # type: ignore[no-any-return]
        if not (input.region.cut and input.is_untouched()):
            return call(input.materialise(type(self).__name__), *args, **kwargs)  # type: ignore[no-any-return]
        output = call(input.source, *args, **kwargs)
        return GatheredInput(output, input.region, input.state, meant_whole=True)


class ReplicatedModule:
    """A module between layers that mixes tokens: takes them whole, alike on every rank."""

    seqpar: ShardingState

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        def real(x: Any) -> Any:
            return x.materialise(type(self).__name__) if isinstance(x, TokenShard) else x

        args, kwargs = tree_map(real, (args, kwargs))
        return super().__call__(*args, **kwargs)  # type: ignore[misc]


class FirstRankOnly:
    """An expert without parameters in a SummedBlock: the first rank alone contributes it to the sum."""

    seqpar: ShardingState

    def __call__(self, *args: Any, **kwargs: Any) -> Tensor:
        return on_first_rank(super().__call__(*args, **kwargs), self.seqpar)  # type: ignore[misc]


class PartialSumLinear(nn.Linear):
    """This rank's columns of a linear in a SummedBlock, which sums its output; the bias is added by the first rank.

    weight [out, in] -> [out, in_r]      input [..., in_r] -> output [..., out], a partial sum      db is partial
    """

    seqpar: ShardingState

    def forward(self, input: Tensor) -> Tensor:
        """[..., in_r] -> [..., out]."""
        bias = None if self.bias is None else on_first_rank(self.bias, self.seqpar)
        return linear(input, self.weight, bias)


@functools.cache
def added_once(key: str) -> type:
    """A mixin in which the parameter `key` [...] reads as zeros on every rank but the first of the group."""

    def read(module: Any) -> Tensor:
        return on_first_rank(module._parameters[key], module.seqpar)

    return type("AddedOnce", (), {key: property(read)})


class HeadInputs:
    """A block that is given something for every head (an alibi): takes this rank's heads of it.

    `head_inputs` names the arguments and where their heads are: "heads" in the first dimension, "batch x heads" in the first with
    the batch, "batch, heads" in the second, where 1 stands for all of them; "all" is given whole to every head. What the ranks' heads
    give an argument as its gradient is summed.
    """

    seqpar: ShardingState
    head_inputs: dict[str, str]
    heads: tuple[int, tuple[int, int]]  # how many, and the range of this rank's

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        names = parameters_of(type(self).forward)  # type: ignore[attr-defined]
        args = (*map(self._mine, names, args), *args[len(names) :])
        return super().__call__(*args, **{name: self._mine(name, x) for name, x in kwargs.items()})  # type: ignore[misc]

    def _mine(self, name: str, x: Any) -> Any:
        layout, (number, (start, stop)) = self.head_inputs.get(name), self.heads
        if layout is None or not isinstance(x, Tensor):
            return x
        if x.requires_grad and torch.is_grad_enabled():
            x = copy_for_partial(x, self.seqpar.groups.tp_group)
        if layout == "all":
            return x
        if layout == "batch x heads":
            by_head: Tensor = x.unflatten(0, (-1, number))
            return by_head[:, start:stop].flatten(0, 1)
        if layout == "heads":
            return x[start:stop]
        return x if x.shape[1] == 1 else x[:, start:stop]


def on_first_rank(parameter: Tensor, state: ShardingState) -> Tensor:
    """`parameter` on the first rank of the group and zeros elsewhere; still a function of it, so that every rank's hook runs."""
    return parameter * float(state.groups.tp_rank == 0)
