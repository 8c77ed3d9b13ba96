"""Handles of tokens: what stands between the layers, and what a block is given.

Legend: b batch, s sequence, h hidden, c = ceil(b*s/t).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..errors import SeqParError
from .handles import (
    ELEMENTWISE,
    SCALINGS,
    Handle,
    is_deepspeeds,
    is_shape_of,
    name_of,
    refuse_outside_graph,
    selects_everything,
)
from .region import ShardingState, TokenRegion
from .token_operations import ACTIVATIONS, ARITHMETIC, features_of, picked_tokens, rows_like

if TYPE_CHECKING:
    from .deferred import NormedRows
    from .linear import ColumnParallelLinear
    from .norm import Remake

__all__ = ["GatheredInput", "TokenShard"]


class TokenShard(Handle):
    """[b, s, h] of which this rank holds `source` [1, c, h]: embeddings, layer outputs, the last hidden state.

    Whole, it serves work that every rank repeats alike (pooling, a value head, a user's own loss). Sums with tensors that every
    rank has, features of each token, and few tokens of all are taken without making it whole.
    """

    _elementwise = ELEMENTWISE | ACTIVATIONS | {"dropout", "clone", "detach"}

    def __new__(
        cls, source: Tensor, region: TokenRegion, state: ShardingState, *, meant_whole: bool = False
    ) -> TokenShard:
        """`source` [1, c, h], any floating dtype; layers that carry several streams have [1, c, streams, h]. `meant_whole` if
        gathering it is the plan and nothing to report: it is narrower than what it was made of."""
        shape = (region.batch, region.seq, *source.shape[2:])
        handle = cls._make(shape, source, region, state, source.dtype)
        handle._expected = meant_whole
        return handle  # type: ignore[no-any-return]

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = name_of(func)[0]
        result = None
        if not kwargs and len(args) == 2 and (name == "__getitem__" or name in ARITHMETIC):
            result = _on_parts(func, name, *args)
        elif name in ("view", "reshape") and not kwargs and is_shape_of(args[0], args[1:]):
            result = args[0]
        return super().__torch_function__(func, types, args, kwargs) if result is None else result

    def over(self, source: Tensor) -> Tensor:
        return TokenShard(source, self.region, self.state, meant_whole=self._expected)

    def _may_act(self, name: str, args: Any, kwargs: dict[str, Any]) -> bool:
        # Outside a forward the ranks' generators run alike, and would give every rank's rows the same mask.
        draws = name == "dropout" and self.state.region is None
        return super()._may_act(name, args, kwargs) and not draws and not kwargs.get("inplace")

    def _lies_as(self, other: Any) -> bool:
        alike = (
            isinstance(other, TokenShard) and other.region == self.region and other.source.shape == self.source.shape
        )
        return alike and self.is_untouched() and other.is_untouched() and self._grad_mode == other._grad_mode

    def _gather(self) -> Tensor:
        return self.region.full_for_replicated(self.source)

    def _apply(self, act: Callable[[Tensor], Tensor]) -> Tensor:
        return self.over(act(self.source))

    def _hooked(self, hook: Callable[..., Any]) -> Any:
        """On this rank's rows, through which all gradients of the tokens go; a user's hook is shown those of all tokens. Collective."""
        if is_deepspeeds(hook) or not self.source.requires_grad:
            return self.source.register_hook(hook)

        def shown(grad: Tensor) -> Tensor | None:
            with torch.no_grad():
                changed = hook(self.region.full_for_replicated(grad))
                return None if changed is None else self.region.local_of_replicated(changed)

        return self.source.register_hook(shown)

    def _retains(self) -> bool:
        def keep(grad: Tensor) -> None:
            self._kept_grad = [grad.detach().clone()]

        if self.source.requires_grad:
            self._hooked(keep)
        return self.source.requires_grad

    def differentiated(self) -> tuple[Tensor, Callable[[Tensor], Tensor] | None]:
        return (self.source, self.region.full_for_replicated) if self._full is None else (self._full, None)

    def local(self) -> Tensor:
        """This rank's rows [1, c, h]: the shard, or the rows of the whole once somebody has had it in hand."""
        return self.source if self._full is None else self.region.local_of_replicated(self._full)


def _on_parts(func: Callable[..., Any], name: str, left: Any, right: Any) -> Tensor | None:
    """`func` of tokens of which the ranks hold parts, and something else, without gathering them; None if it cannot be done."""
    handles = [x for x in (left, right) if isinstance(x, TokenShard)]
    first = handles[0]
    for handle in handles:
        refuse_outside_graph(handle)
    if not all(x.is_untouched() and x.region is first.region for x in handles):
        return None
    with torch.set_grad_enabled(first._grad_mode and torch.is_grad_enabled()):
        if name == "__getitem__":
            if left is not first or selects_everything(right):
                return None
            features = features_of(first.source, right)
            if features is None:
                return picked_tokens(first.source, first.region, right)
            narrower = first._expected or features.numel() < first.source.numel()
            part = TokenShard(features, first.region, first.state, meant_whole=narrower)
            part._is_part = True
            return part
        sides = [_side(x, first) for x in (left, right)]
        return None if sides[0] is None or sides[1] is None else first.over(func(*sides))


def _side(x: Any, tokens: TokenShard) -> Tensor | None:
    """What of an operand stands beside this rank's rows of `tokens`; None if it has none, or is not a tensor of several numbers."""
    if isinstance(x, TokenShard):
        return x.source if x.shape == tokens.shape else None
    if not isinstance(x, Tensor) or isinstance(x, Handle) or x.dim() == 0:
        return None
    return rows_like(x, tokens.source, tokens.region)


def _beside_rows(left: Any, right: Any) -> tuple[Any, Any]:
    """Two addends: a block's input, where its code adds it to the block's output, as the rows beside those of the output."""

    def beside(x: Any, other: Any) -> Any:
        if not (isinstance(x, GatheredInput) and x.state.block_left and isinstance(other, Tensor)):
            return x
        alone = not isinstance(other, GatheredInput)
        return x.rows() if alone and other.shape == x.region.local_shape(x.shape[-1]) else x

    return beside(left, right), beside(right, left)


class GatheredInput(Handle):
    """The input [b, s, h] of a sharded block, of which this rank holds `source` (rows, or all where tokens are not cut).

    Column-parallel linears of the block are computed together from one gather. Whole, it serves work inside the block,
    whose gradient is a part on every rank.
    """

    _elementwise: set[str] = {"to", "float", "half", "bfloat16", "dropout", *SCALINGS}
    _allows_in_place = False
    _outputs: dict[int, Tensor]
    _alone: bool  # made of a block's input: no sibling is computed with what reads it
    _version_gathered: int
    _remake: Remake | None
    _normed: NormedRows | None = None  # what the rows will be, while nobody has asked for them
    _rows: Tensor

    def __new__(
        cls,
        source: Tensor,
        region: TokenRegion,
        state: ShardingState,
        remake: Remake | None = None,
        *,
        meant_whole: bool = False,
    ) -> GatheredInput:
        """`source` in `region.local_shape`; `remake` computes it again in backward; `meant_whole` if gathering it is the plan
        and nothing to report."""
        shape = (region.batch, region.seq, source.shape[-1])
        handle = cls._make(shape, source, region, state, source.dtype)
        handle._outputs, handle._remake, handle._alone, handle._expected = {}, remake, False, meant_whole
        return handle  # type: ignore[no-any-return]

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not kwargs and len(args) == 2 and name_of(func)[0] in ("add", "__add__", "__radd__"):
            args = _beside_rows(*args)
            if not any(isinstance(x, Handle) for x in args):  # both are rows now
                return func(*args)
        return super().__torch_function__(func, types, args, kwargs)

    def _may_act(self, name: str, args: Any, kwargs: dict[str, Any]) -> bool:
        # Where tokens are not cut every rank holds all rows, and must drop the same of them.
        # A block's own input is not scaled behind the back of the linears that share it; a latent may be.
        allowed = self.region.cut if name == "dropout" else self._expected or name not in SCALINGS
        return allowed and super()._may_act(name, args, kwargs)

    def _apply(self, act: Callable[[Tensor], Tensor]) -> Tensor:
        changed = GatheredInput(act(self.source), self.region, self.state, meant_whole=self._expected)
        changed._alone = True
        return changed

    def _lies_as(self, other: Any) -> bool:
        """Only what is meant to be gathered: a block's own input stays what its linears know it as."""
        meant = isinstance(other, GatheredInput) and self._expected and other._expected and self.region.cut
        alike = meant and other.region == self.region and other.source.shape == self.source.shape
        return alike and self.is_untouched() and other.is_untouched() and self._grad_mode == other._grad_mode

    @classmethod
    def of_normed(cls, normed: NormedRows) -> GatheredInput:
        """The input of a block whose rows are a norm that is not computed yet, and for its linears need not be."""
        region, state = normed.region, normed.state
        shape = (region.batch, region.seq, normed.shape[-1])
        handle = cls._make(shape, normed.source, region, state, normed.dtype, normed.requires_grad)
        handle._outputs, handle._remake, handle._alone, handle._expected, handle._normed = (
            {},
            None,
            False,
            False,
            normed,
        )
        return handle  # type: ignore[no-any-return]

    @property
    def source(self) -> Tensor:
        """The rows. Whoever wants them, and not only what the linears make of them, has the norm computed."""
        if self._normed is not None:
            self._rows, self._normed = self._normed.materialise(), None
            self._remake = getattr(self._rows, "_seqpar_remake", None)
        return self._rows

    @source.setter
    def source(self, rows: Tensor) -> None:
        self._rows = rows

    def _autograd(self, name: str) -> Any:
        if name == "requires_grad" and self._normed is not None:
            return self._normed._autograd(name)
        return super()._autograd(name)

    def rows(self) -> Tensor:
        """This rank's rows, `source`; refused once the gathered whole was changed in place."""
        if self._full is not None and self._full._version != self._version_gathered:
            raise SeqParError("a block's input was changed in place; let the model code clone() it first")
        return self.source

    def _gather(self) -> Tensor:
        full = self.region.full_for_partial(self.source)
        self._version_gathered = full._version
        return full

    def column(self, linear: ColumnParallelLinear) -> Tensor:
        """Output [b, s, out/t] of one column-parallel linear; its siblings' come from the same gather."""
        from .linear import column_parallel

        rows = self.rows() if self._normed is None else self._normed
        if id(linear) not in self._outputs:
            apart = self.region.apart
            siblings = () if self._alone or id(linear) in apart else linear.siblings
            done = apart.union((id(linear),), self._outputs)
            members = [linear, *(m for m in siblings if id(m) not in done)]
            outputs = column_parallel(rows, self.region, [m.as_linear() for m in members], self._remake)
            self._outputs.update({id(m): out for m, out in zip(members, outputs, strict=True)})
        return self._outputs.pop(id(linear))

    def unused(self) -> frozenset[int]:
        """Ids of sibling linears that were computed with the others but never asked for."""
        return frozenset(self._outputs)
