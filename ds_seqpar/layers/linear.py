"""Column- and row-parallel linears, and the vocabulary-parallel head.

Legend: b batch, s sequence, T = b*s tokens, t tp_size, c = ceil(T/t), h hidden, V vocabulary, _r this rank's part.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import Function
from torch.autograd.function import once_differentiable
from torch.nn.functional import linear

from ..comm.collectives import all_reduce
from ..comm.regions import gather_columns
from ..comm.tokens import gather_rows, gather_rows_async, reduce_scatter_rows, reduce_scatter_rows_async
from ..errors import SeqParError
from .handles import GatheredInput, ShardedLogits, TokenShard
from .region import ShardingState, TokenRegion

__all__ = ["ColumnParallelLinear", "RowParallelLinear", "VocabParallelHead", "column_parallel"]


class _ColumnParallel(Function):
    """n linears over one input: [c, h] -> n x [T, out_r]; see ColumnParallelLinear."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, region: TokenRegion, n: int, *parameters: Tensor | None) -> tuple[Tensor, ...]:
        weights, biases = parameters[:n], parameters[n:]
        group = region.groups.tp_group
        full = gather_rows(x, region.tokens, group) if region.cut else x
        ctx.region, ctx.n = region, n
        wants_dw = any(ctx.needs_input_grad[3 : 3 + n])
        ctx.save_for_backward(x if wants_dw else None, *weights)
        return tuple(linear(full, w, b) for w, b in zip(weights, biases, strict=True))  # type: ignore[arg-type]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *dys: Tensor) -> tuple[Tensor | None, ...]:
        region, n = ctx.region, ctx.n
        group = region.groups.tp_group
        x, *weights = ctx.saved_tensors
        wants_dx, wants_dw, wants_db = (
            ctx.needs_input_grad[0],
            ctx.needs_input_grad[3 : 3 + n],
            ctx.needs_input_grad[3 + n :],
        )
        gathering = gather_rows_async(x, group) if region.cut and region.overlap and any(wants_dw) else None
        dx = reducing = None
        if wants_dx:
            dx = dys[0] @ weights[0]
            for dy, weight in zip(dys[1:], weights[1:], strict=True):
                dx.addmm_(dy, weight)
            if region.cut and region.overlap:
                reducing = reduce_scatter_rows_async(dx, group)
            elif not region.summed_later:
                dx = reduce_scatter_rows(dx, group) if region.cut else all_reduce(dx, group)
        full = x
        if any(wants_dw) and region.cut:
            full = gathering.wait()[: region.tokens] if gathering else gather_rows(x, region.tokens, group)
        dws = [dy.t() @ full if wanted else None for dy, wanted in zip(dys, wants_dw, strict=True)]
        dbs = [dy.sum(0) if wanted else None for dy, wanted in zip(dys, wants_db, strict=True)]
        if reducing is not None:
            dx = reducing.wait()
        return dx, None, None, *dws, *dbs


class _RowParallel(Function):
    """[T, in_r] -> [c, out], without the bias; see RowParallelLinear."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, region: TokenRegion) -> Tensor:
        ctx.region = region
        ctx.save_for_backward(x if ctx.needs_input_grad[1] else None, weight)
        partial, group = x @ weight.t(), region.groups.tp_group
        return reduce_scatter_rows(partial, group) if region.cut else all_reduce(partial, group)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        region = ctx.region
        x, weight = ctx.saved_tensors
        if region.cut:
            dy = gather_rows(dy, region.tokens, region.groups.tp_group)
        dx = dy @ weight if ctx.needs_input_grad[0] else None
        dw = dy.t() @ x if ctx.needs_input_grad[1] else None
        return dx, dw, None


def _autocast(x: Tensor, *parameters: Tensor | None) -> list[Tensor | None]:
    """What F.linear would do under torch.autocast, outside our autograd functions so that backward sees one dtype."""
    device = x.device.type
    if not torch.is_autocast_enabled(device):
        return [x, *parameters]
    dtype = torch.get_autocast_dtype(device)
    return [p if p is None else p.to(dtype) for p in (x, *parameters)]


def column_parallel(local: Tensor, region: TokenRegion, members: Sequence[nn.Linear]) -> list[Tensor]:
    """Outputs [b, s, out_r] of all members from one gather of `local` (in `region.local_shape`)."""
    weights, biases = [m.weight for m in members], [m.bias for m in members]
    x, *parameters = _autocast(local, *weights, *biases)
    assert x is not None
    with torch.autocast(x.device.type, enabled=False):
        outputs = _ColumnParallel.apply(x.reshape(region.rows, -1), region, len(members), *parameters)  # type: ignore[no-untyped-call]
    return [out.view(region.batch, region.seq, -1) for out in outputs]


def _users_own(
    hooks: Mapping[int, Callable[..., Any]], with_kwargs: Mapping[int, bool]
) -> list[tuple[Callable[..., Any], bool]]:
    """(hook, takes keyword arguments) of every hook that is not DeepSpeed's."""
    return [
        (h, n in with_kwargs) for n, h in hooks.items() if not getattr(h, "__module__", "").startswith("deepspeed.")
    ]


class ColumnParallelLinear(nn.Linear):
    """This rank's rows of a linear's weight; the block's input is gathered once for it and its siblings.

        weight [out, in] -> [out_r, in]      input a GatheredInput [b, s, in] -> output [b, s, out_r]
        forward  y = all_gather(x) @ w.T + b    saves the shard x, never the gathered input
        backward dx = reduce_scatter(sum over siblings of dy @ w), under which the wgrads run
                 dw = dy.T @ all_gather(x), the re-gather runs under the dgrads; db = dy.sum(0); both complete

    A plain tensor [b, s, in], equal on every rank, is taken as ordinary tensor parallelism: dx is all-reduced, except inside
    a block, where what the block's code made of its input came from a gather that sums dx itself.
    Source: Korthikanti et al. 2022, arXiv:2205.05198, section 4.2.
    """

    seqpar: ShardingState
    siblings: tuple[ColumnParallelLinear, ...] = ()

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
        for hook, takes_kwargs in _users_own(self._forward_pre_hooks, self._forward_pre_hooks_with_kwargs):
            changed = hook(self, (input,), {}) if takes_kwargs else hook(self, (input,))
            changed = changed[0] if takes_kwargs and changed is not None else changed
            if changed is not None:
                (input,) = changed if isinstance(changed, tuple) else (changed,)
        output = self.forward(input)
        for hook, takes_kwargs in _users_own(self._forward_hooks, self._forward_hooks_with_kwargs):
            changed = hook(self, (input,), {}, output) if takes_kwargs else hook(self, (input,), output)
            output = output if changed is None else changed
        return output

    def forward(self, input: Tensor) -> Tensor:
        """As `__call__`, below the hooks."""
        if isinstance(input, GatheredInput):
            return input.column(self)
        tokens, state = input.numel() // input.shape[-1], self.seqpar
        region = TokenRegion(1, tokens, False, state.groups, summed_later=state.in_block)
        output = column_parallel(input, region, [self.as_linear()])[0]
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

    def forward(self, input: Tensor) -> Tensor:
        """[b, s, in_r] -> the region's local shape with `out` columns."""
        region, tokens = self.seqpar.region, input.numel() // input.shape[-1]
        if region is None or region.tokens != tokens:
            if self.seqpar.sequence_parallel and torch.is_grad_enabled():
                expected = (
                    "no forward of the model is running" if region is None else f"this forward has {region.tokens}"
                )
                raise SeqParError(
                    f"a row-parallel linear was given {tokens} tokens but {expected}; its bias would get a wrong gradient"
                )
            region = TokenRegion(1, tokens, False, self.seqpar.groups)
        x, weight, bias = _autocast(input, self.weight, self.bias)
        assert x is not None and weight is not None
        with torch.autocast(x.device.type, enabled=False):
            output: Tensor = _RowParallel.apply(x.reshape(region.tokens, -1), weight, region)  # type: ignore[no-untyped-call]
        if not region.cut and self.seqpar.block_forked:
            self.seqpar.block_forked = False
            self.seqpar.random.leave()  # what follows is equal on every rank again
        output = output if bias is None else output + bias
        return output.view(region.local_shape(output.shape[-1]) if region.cut else (*input.shape[:-1], -1))


class VocabParallelHead(nn.Linear):
    """This rank's rows of the language-model head; its logits are computed when somebody needs them.

        weight [V, h] -> [V_r, h]      input a TokenShard, or [b, s, h] equal on every rank -> ShardedLogits [b, s, V]

    The model's loss takes them in chunks (layers/loss.py); anyone else gets real logits. All work on the weight happens
    inside a call of this module, so that ZeRO-3 fetches and releases it.
    """

    seqpar: ShardingState
    vocab_size: int
    vocab_start: int
    vocab_widths: tuple[int, ...]

    def __call__(self, input: Tensor) -> Tensor:
        """Defers: returns the handle of the logits."""
        if isinstance(input, TokenShard) and input.is_untouched():
            return ShardedLogits(input.source, input.region, self)
        if isinstance(input, TokenShard):
            input = input.materialise("lm_head")
        flat = input if input.dim() == 3 else input.reshape(1, -1, input.shape[-1])
        region = TokenRegion(flat.shape[0], flat.shape[1], False, self.seqpar.groups)
        logits: Tensor = ShardedLogits(flat, region, self)
        return logits if input.dim() == 3 else logits.view(*input.shape[:-1], self.vocab_size)

    def gathered_logits(self, local: Tensor, region: TokenRegion) -> Tensor:
        """Real logits [b, s, V] on every rank; their gradient is complete on every rank."""
        return super().__call__(local, _region=region)  # type: ignore[no-any-return]

    def loss(self, local: Tensor, region: TokenRegion, labels: Tensor, **options: Any) -> tuple[Tensor, Tensor]:
        """(summed loss, counted labels), both fp32 scalars; see vocab_parallel_linear_cross_entropy."""
        return super().__call__(local, _region=region, _labels=labels, **options)  # type: ignore[no-any-return]

    def forward(  # type: ignore[override]
        self, local: Tensor, _region: TokenRegion, _labels: Tensor | None = None, **options: Any
    ) -> Any:
        """What `gathered_logits` and `loss` do, below the module's hooks."""
        from .loss import vocab_parallel_linear_cross_entropy

        hidden, weight, bias = _autocast(local, self.weight, self.bias)
        assert hidden is not None and weight is not None
        with torch.autocast(hidden.device.type, enabled=False):
            if _labels is not None:
                return vocab_parallel_linear_cross_entropy(
                    hidden.reshape(_region.rows, -1),
                    weight,
                    bias,
                    _labels,
                    _region,
                    vocab_start=self.vocab_start,
                    **options,
                )
            full = _region.full_for_partial(hidden)
            return gather_columns(linear(full, weight, bias), self.vocab_widths, _region.groups.tp_group)
