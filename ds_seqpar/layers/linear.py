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
from ..errors import SeqParError
from ..kernels.adjacent import joined, parted
from ..kernels.gating import gated, gated_backward
from .handles import GatedProduct, GatheredInput, Handle, ShardedLogits, TokenShard
from .norm import Remake
from .region import ShardingState, TokenRegion

__all__ = ["ColumnParallelLinear", "RowParallelLinear", "VocabParallelHead", "call_past_deepspeed", "column_parallel"]

_NARROW = (
    2  # a sibling this many times narrower than another makes a slow product of its own: one copy of all is cheaper
)


class _ColumnParallel(Function):
    """n linears over one input: [c, h] -> n x [T, out_r]; see ColumnParallelLinear.

    `remake` and its tensors `made_of`, if given, compute x again in backward, and are kept in its place. `together`: the
    outputs may share memory, which lives as long as any of them; then weights that are adjacent in memory are one product.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        region: TokenRegion,
        n: int,
        remake: Remake | None,
        together: bool,
        *parameters: Tensor | None,
    ) -> tuple[Tensor, ...]:
        weights, biases = parameters[:n], parameters[n:]
        # Its function alone: the node lives until the loss does, and what it is made of would live as long.
        ctx.region, ctx.n, ctx.remake = region, n, None if remake is None else remake.into
        wants_dw = any(ctx.needs_input_grad[5 : 5 + n])
        kept = [] if not wants_dw else [x] if remake is None else remake.made_of
        ctx.save_for_backward(*weights, *kept)
        if not region.cut:
            return tuple(linear(x, w, b) for w, b in zip(weights, biases, strict=True))  # type: ignore[arg-type]
        ys = [x.new_empty((region.tokens, w.shape[0])) for w in weights]  # type: ignore[union-attr]
        products = list(zip(ys, weights, biases, strict=True))
        joint = joined(weights, 0) if together and not any(b is not None for b in biases) else None  # type: ignore[arg-type]
        if joint is not None:
            whole = x.new_empty((region.tokens, joint.shape[0]))
            ys, products = parted(whole, [w.shape[0] for w in weights]), [(whole, joint, None)]  # type: ignore[union-attr]
        gathering = region.transport.gather(x, region.tokens)
        for rows, arrived in gathering.arrivals():
            for y, w, b in products:
                _linear_into(y[rows], arrived, w, b)  # type: ignore[arg-type]
        gathering.release()
        return tuple(ys)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *dys: Tensor) -> tuple[Tensor | None, ...]:
        region, n = ctx.region, ctx.n
        saved = ctx.saved_tensors  # once: a recomputed tensor can be unpacked only once
        weights, kept = saved[:n], saved[n:]
        wants_dx, wants_dw, wants_db = (
            ctx.needs_input_grad[0],
            ctx.needs_input_grad[5 : 5 + n],
            ctx.needs_input_grad[5 + n :],
        )
        joint_dy, joint_weight = joined(dys, 1), joined(weights, 0)
        if region.cut and min(d.shape[1] for d in dys) * _NARROW <= max(d.shape[1] for d in dys):
            joint_dy = torch.cat(dys, dim=1) if joint_dy is None else joint_dy
            joint_weight = torch.cat(weights, dim=0) if joint_weight is None else joint_weight
        lefts, rights = (dys, weights) if joint_dy is None or joint_weight is None else ([joint_dy], [joint_weight])
        x = None if not kept else kept[0].reshape(region.rows, -1)
        gathering = None
        if x is not None and ctx.remake is not None and region.cut:
            gathering = region.transport.gather_made(x, lambda memory: ctx.remake(memory, *kept), region.tokens)
        elif x is not None and ctx.remake is not None:
            x = torch.empty_like(x)
            ctx.remake(x, *kept)
        elif x is not None and region.cut:
            gathering = region.transport.gather(x, region.tokens)
        dx = scattering = None
        if wants_dx and region.cut:
            scattering = region.transport.scatter(region.tokens, weights[0].shape[1], dys[0])
            for rows, memory in scattering.parts():
                _sum_of_products(memory, [left[rows] for left in lefts], rights)
        elif wants_dx:
            dx = _sum_of_products(dys[0].new_empty((region.tokens, weights[0].shape[1])), lefts, rights)
            dx = dx if region.summed_later else all_reduce(dx, region.groups.tp_group)
        full: Any = gathering.whole() if gathering is not None else x
        if joint_dy is not None and all(wants_dw):
            dws: Sequence[Tensor | None] = (joint_dy.t() @ full).split([dy.shape[1] for dy in dys])
        else:
            dws = [dy.t() @ full if wanted else None for dy, wanted in zip(dys, wants_dw, strict=True)]
        if gathering is not None:
            del full, x
            gathering.release()
        dbs = [dy.sum(0) if wanted else None for dy, wanted in zip(dys, wants_db, strict=True)]
        if scattering is not None:
            dx = scattering.wait()
        return dx, None, None, None, None, *dws, *dbs


def _linear_into(out: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    if bias is None:
        torch.mm(x, weight.t(), out=out)
    else:
        torch.addmm(bias, x, weight.t(), out=out)


def _sum_of_products(out: Tensor, lefts: Sequence[Tensor], rights: Sequence[Tensor]) -> Tensor:
    """out = sum of left @ right."""
    for i, (left, right) in enumerate(zip(lefts, rights, strict=True)):
        if i == 0:
            torch.mm(left, right, out=out)
        else:
            out.addmm_(left, right)
    return out


class _RowParallel(Function):
    """[T, in_r] -> [c, out], without the bias; see RowParallelLinear. With `act`, the input is act(x) * up, made again in backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, up: Tensor | None, act: str | None, weight: Tensor, region: TokenRegion) -> Tensor:
        ctx.region, ctx.act = region, act
        ctx.save_for_backward(x if act or ctx.needs_input_grad[3] else None, up, weight)
        if act is not None and up is not None:
            x = gated(x, up, act)
        if not region.cut:
            return all_reduce(x @ weight.t(), region.groups.tp_group)
        scattering = region.transport.scatter(region.tokens, weight.shape[0], x)
        for rows, memory in scattering.parts():
            torch.mm(x[rows], weight.t(), out=memory)
        return scattering.wait()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        region = ctx.region
        x, up, weight = ctx.saved_tensors
        wants_dx = ctx.needs_input_grad[0] or ctx.needs_input_grad[1]
        gathering = region.transport.gather(dy, region.tokens) if region.cut else None
        dx = None
        if wants_dx:
            dx = dy.new_empty((region.tokens, weight.shape[1]))
            for rows, arrived in gathering.arrivals() if gathering is not None else [(slice(0, region.tokens), dy)]:
                torch.mm(arrived, weight, out=dx[rows])
                del arrived
        dup = None
        if up is not None:
            if dx is None:
                x = gated(x, up, ctx.act)
            else:
                dx, dup, x = gated_backward(dx, x, up, ctx.act)
        dw = None
        if ctx.needs_input_grad[3]:
            full = gathering.whole() if gathering is not None else dy
            dw = full.t() @ x
            del full
        if gathering is not None:
            gathering.release()
        return dx, dup, None, dw, None


def _autocast(x: Tensor, *parameters: Tensor | None) -> list[Tensor | None]:
    """What F.linear would do under torch.autocast, outside our autograd functions so that backward sees one dtype."""
    device = x.device.type
    if not torch.is_autocast_enabled(device):
        return [x, *parameters]
    dtype = torch.get_autocast_dtype(device)
    return [p if p is None else p.to(dtype) for p in (x, *parameters)]


def column_parallel(
    local: Tensor, region: TokenRegion, members: Sequence[nn.Linear], remake: Remake | None = None
) -> list[Tensor]:
    """Outputs [b, s, out_r] of all members from one gather of `local` (in `region.local_shape`), which `remake` computes again."""
    weights, biases = [m.weight for m in members], [m.bias for m in members]
    x, *parameters = _autocast(local, *weights, *biases)
    assert x is not None
    remake = remake if x is local else None  # autocast changed it
    together = all(m.outputs_live_together for m in members if isinstance(m, ColumnParallelLinear))
    with torch.autocast(x.device.type, enabled=False):
        outputs = _ColumnParallel.apply(x.reshape(region.rows, -1), region, len(members), remake, together, *parameters)  # type: ignore[no-untyped-call]
    return [out.view(region.batch, region.seq, -1) for out in outputs]


def _users_own(
    hooks: Mapping[int, Callable[..., Any]], with_kwargs: Mapping[int, bool]
) -> list[tuple[Callable[..., Any], bool]]:
    """(hook, takes keyword arguments) of every hook that is not DeepSpeed's."""
    return [
        (h, n in with_kwargs) for n, h in hooks.items() if not getattr(h, "__module__", "").startswith("deepspeed.")
    ]


def _has_users_hooks(module: nn.Module) -> bool:
    before = _users_own(module._forward_pre_hooks, module._forward_pre_hooks_with_kwargs)
    return bool(before or _users_own(module._forward_hooks, module._forward_hooks_with_kwargs))


def call_past_deepspeed(module: nn.Module, input: Tensor, *args: Any, **kwargs: Any) -> Any:
    """`module(input, ...)` with all forward hooks but DeepSpeed's."""
    for hook, takes_kwargs in _users_own(module._forward_pre_hooks, module._forward_pre_hooks_with_kwargs):
        changed = hook(module, (input,), {}) if takes_kwargs else hook(module, (input,))
        changed = changed[0] if takes_kwargs and changed is not None else changed
        if changed is not None:
            (input,) = changed if isinstance(changed, tuple) else (changed,)
    output = module.forward(input, *args, **kwargs)
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

    def __call__(self, input: Tensor) -> Tensor:
        """[b, s, in_r] -> [1, c, out] or [b, s, out]. A gated product stays two tensors, which hooks of DeepSpeed's see plain."""
        if not isinstance(input, GatedProduct) or not input.is_untouched() or _has_users_hooks(self):
            return super().__call__(input.materialise() if isinstance(input, Handle) else input)  # type: ignore[no-any-return]
        return super().__call__(input.source, input.up, input.act)  # type: ignore[no-any-return]

    def forward(self, input: Tensor, up: Tensor | None = None, act: str | None = None) -> Tensor:
        """[b, s, in_r] -> the region's local shape with `out` columns; the input is act(input) * up where those are given."""
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
        x, up, weight, bias = _autocast(input, up, self.weight, self.bias)
        assert x is not None and weight is not None
        flat = [None if part is None else part.reshape(region.tokens, -1) for part in (x, up)]
        with torch.autocast(x.device.type, enabled=False):
            output: Tensor = _RowParallel.apply(*flat, act, weight, region)  # type: ignore[no-untyped-call]
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

    def token_figures(self, local: Tensor, region: TokenRegion, targets: Tensor, **options: Any) -> Any:
        """TokenFigures of every token; see vocab_parallel_token_figures."""
        return super().__call__(local, _region=region, _labels=targets, _figures=True, **options)

    def forward(  # type: ignore[override]
        self, local: Tensor, _region: TokenRegion, _labels: Tensor | None = None, _figures: bool = False, **options: Any
    ) -> Any:
        """What `gathered_logits`, `loss` and `token_figures` do, below the module's hooks."""
        from .logprobs import vocab_parallel_token_figures
        from .loss import vocab_parallel_linear_cross_entropy

        hidden, weight, bias = _autocast(local, self.weight, self.bias)
        assert hidden is not None and weight is not None
        with torch.autocast(hidden.device.type, enabled=False):
            if _labels is not None:
                act = vocab_parallel_token_figures if _figures else vocab_parallel_linear_cross_entropy
                return act(
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
