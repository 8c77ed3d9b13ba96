"""Column- and row-parallel linears.

Legend: b batch, s sequence, T = b*s tokens, t tp_size, c = ceil(T/t), h hidden, _r this rank's part.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from ..errors import SeqParError
from ..kernels.addition import PassedGradient
from .deferred import GatedProduct, NormedRows, UnsummedRows
from .early import RowsMark
from .handles import Handle, is_deepspeeds
from .norm import Remake, remake_of
from .products import ColumnParallel, RowParallel, cast_for_autocast
from .region import ShardingState, TokenRegion
from .token_handles import GatheredInput

__all__ = [
    "ColumnParallelLinear", "RowParallelLinear", "between_users_hooks", "call_past_deepspeed", "column_parallel",
    "has_hooks_beside_deepspeeds",
]  # fmt: skip


def column_parallel(
    rows: Tensor, region: TokenRegion, members: Sequence[nn.Linear], remake: Remake | None = None
) -> list[Tensor]:
    """Outputs [b, s, out_r] of all members from one gather of `rows` (in `region.local_shape`), which `remake` computes again."""
    parameters = [*(m.weight for m in members), *(m.bias for m in members)]
    columns = [m for m in members if isinstance(m, ColumnParallelLinear)]
    together = all(m.outputs_live_together for m in columns)
    copied = not together and all(m.outputs_are_short_lived for m in columns)
    autocast = torch.is_autocast_enabled(rows.device.type)
    norm_weight, eps = None, 0.0
    if isinstance(rows, NormedRows) and not autocast:
        norm_weight, eps, rows = rows.weight, rows.eps, rows.source
    elif isinstance(rows, Handle):
        rows = rows.materialise(ColumnParallelLinear.__name__)
        remake = remake_of(rows)
    plain: Any = nullcontext()
    if autocast:
        before, (rows, *parameters) = rows, cast_for_autocast(rows, *parameters)  # type: ignore[assignment]
        remake = remake if rows is before else None  # autocast changed it
        plain = torch.autocast(rows.device.type, enabled=False)
    with plain:
        passed = early = None
        if norm_weight is not None and rows.requires_grad and torch.is_grad_enabled():
            passed = PassedGradient()
            passed.offer(rows)
            mark = RowsMark.of(rows)
            early = None if mark is None or region.early is None else (region.early, mark)
        sharing = (together, copied)
        arguments = (rows, norm_weight, region, len(members), eps, remake, sharing, passed, early)
        return list(ColumnParallel.apply(*arguments, *parameters))  # type: ignore[no-untyped-call]


def _users_own(
    hooks: Mapping[int, Callable[..., Any]], with_kwargs: Mapping[int, bool]
) -> list[tuple[Callable[..., Any], bool]]:
    """(hook, takes keyword arguments) of every hook that is not DeepSpeed's."""
    return [(h, n in with_kwargs) for n, h in hooks.items() if not is_deepspeeds(h)]


def has_hooks_beside_deepspeeds(module: nn.Module) -> bool:
    """Whether forward hooks that are not DeepSpeed's stand on `module`."""
    before = _users_own(module._forward_pre_hooks, module._forward_pre_hooks_with_kwargs)
    return bool(before or _users_own(module._forward_hooks, module._forward_hooks_with_kwargs))


def call_past_deepspeed(module: nn.Module, input: Tensor, *args: Any, **kwargs: Any) -> Any:
    """`module(input, ...)` with all forward hooks but DeepSpeed's."""
    return between_users_hooks(module, input, lambda x: module.forward(x, *args, **kwargs))


def between_users_hooks(module: nn.Module, input: Tensor, compute: Callable[[Tensor], Any]) -> Any:
    """`compute(input)` as `module`'s forward, between all its forward hooks but DeepSpeed's."""
    if not (module._forward_pre_hooks or module._forward_hooks):
        return compute(input)
    for hook, takes_kwargs in _users_own(module._forward_pre_hooks, module._forward_pre_hooks_with_kwargs):
        changed = hook(module, (input,), {}) if takes_kwargs else hook(module, (input,))
        changed = changed[0] if takes_kwargs and changed is not None else changed
        if changed is not None:
            (input,) = changed if isinstance(changed, tuple) else (changed,)
    output = compute(input)
    for hook, takes_kwargs in _users_own(module._forward_hooks, module._forward_hooks_with_kwargs):
        changed = hook(module, (input,), {}, output) if takes_kwargs else hook(module, (input,), output)
        output = output if changed is None else changed
    return output


class ColumnParallelLinear(nn.Linear):
    """This rank's rows of a linear's weight; the block's input is gathered once for it and its siblings.

        weight [out, in] -> [out_r, in]      input a GatheredInput [b, s, in] -> output [b, s, out_r]
        forward  y = all_gather(x) @ w.T + b    saves the shard x, or what x is made of, never the gathered input
        backward dx = reduce_scatter(sum over siblings of dy @ w), under which the wgrads run
                 dw = dy.T @ all_gather(x), the re-gather runs under the dgrads; db = dy.sum(0); both complete

    A plain tensor [b, s, in], equal on every rank, is taken as ordinary tensor parallelism: dx is all-reduced, except inside
    a block, where what the block's code made of its input came from a gather that sums dx itself.
    Source: Korthikanti et al. 2022, arXiv:2205.05198, section 4.2.
    """

    seqpar: ShardingState
    siblings: tuple[ColumnParallelLinear, ...] = ()
    outputs_live_together: bool = False  # its siblings' outputs are kept for backward as long as its own
    outputs_are_short_lived: bool = False  # none but the last sibling's is kept

    def as_linear(self) -> Any:
        """What the grouped computation takes the weight [out_r, in] and the bias from."""
        return self

    def __call__(self, input: Tensor) -> Tensor:
        """[b, s, in] or its handle -> [b, s, out_r].

        With a handle, DeepSpeed's hooks are left out: the block fetches and releases this weight with its siblings'. Other
        hooks run; they see the handle.
        """
        if not isinstance(input, GatheredInput):
            return super().__call__(input)  # type: ignore[no-any-return]
        return call_past_deepspeed(self, input)  # type: ignore[no-any-return]

    def forward(self, input: Tensor) -> Tensor:
        """As `__call__`, below the hooks."""
        if isinstance(input, GatheredInput):
            return input.column(self)
        own, state = self.as_linear(), self.seqpar
        if state.in_block:  # the gradient of what the block's code made is a part already
            return linear(input, own.weight, own.bias)
        region = TokenRegion(1, input.numel() // input.shape[-1], False, state.groups)
        output = column_parallel(input, region, [own])[0]
        return output.view(*input.shape[:-1], -1)


class RowParallelLinear(nn.Linear):
    """This rank's columns of a linear's weight; its output is reduce-scattered over the tokens.

        weight [out, in] -> [out, in_r]      input [b, s, in_r] -> output [1, c, out]
        forward  y = reduce_scatter(x @ w.T) + b
        backward dx = all_gather(dy) @ w     dw = all_gather(dy).T @ x, complete
                 db is partial (each rank sees c rows) and is summed over the group

    Where tokens are not cut, the output is all-reduced to [b, s, out] and db is complete.
    Source: Korthikanti et al. 2022, arXiv:2205.05198, section 4.2.
    """

    seqpar: ShardingState

    def __call__(self, input: Tensor) -> Tensor:
        """[b, s, in_r] -> [1, c, out] or [b, s, out]. A gated product stays two tensors, which hooks of DeepSpeed's see plain."""
        if not isinstance(input, GatedProduct) or not input.is_untouched() or has_hooks_beside_deepspeeds(self):
            return super().__call__(input.materialise() if isinstance(input, Handle) else input)  # type: ignore[no-any-return]
        return super().__call__(input.source, input.up, input.act)  # type: ignore[no-any-return]

    def forward(self, input: Tensor, up: Tensor | None = None, act: str | None = None) -> Tensor:
        """[b, s, in_r] -> the region's local shape with `out` columns; the input is act(input) * up where those are given."""
        region, tokens = self.seqpar.region, input.numel() // input.shape[-1]
        self.seqpar.block_left = self.seqpar.in_block
        if region is None or region.tokens != tokens:
            if self.seqpar.sequence_parallel and torch.is_grad_enabled():
                expected = (
                    "no forward of the model is running" if region is None else f"this forward has {region.tokens}"
                )
                raise SeqParError(
                    f"a row-parallel linear was given {tokens} tokens but {expected}; its bias would get a wrong gradient"
                )
            region = TokenRegion(1, tokens, False, self.seqpar.groups)
        x: Tensor | None = input.materialise() if isinstance(input, Handle) else input
        weight: Tensor | None = self.weight
        bias: Tensor | None = self.bias
        plain: Any = nullcontext()
        if torch.is_autocast_enabled(input.device.type):
            x, up, weight, bias = cast_for_autocast(input, up, weight, bias)
            plain = torch.autocast(input.device.type, enabled=False)
        later = RowsMark() if _may_sum_later(self, region, bias) else None
        with plain:
            output: Any = RowParallel.apply(x, up, act, weight, region, later)  # type: ignore[no-untyped-call]
        if later is not None:
            own, received = output
            if own.requires_grad:
                later.put(own)
            return UnsummedRows.of_addends(own, received, self.seqpar)  # type: ignore[no-any-return]
        if not region.cut and self.seqpar.block_forked:
            self.seqpar.block_forked = False
            self.seqpar.random.leave()  # what follows is equal on every rank again
        output = output if bias is None else output + bias
        return output if region.cut else output.view(*input.shape[:-1], -1)  # type: ignore[no-any-return]


def _may_sum_later(linear: Any, region: TokenRegion, bias: Tensor | None) -> bool:
    """Whether nobody but the layer's own code sees the output, which adds it to its residual."""
    return linear.seqpar.sums_rows_later and region.cut and bias is None
