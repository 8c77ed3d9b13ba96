"""Column- and row-parallel linears, and the vocabulary-parallel head.

Legend: b batch, s sequence, T = b*s tokens, t tp_size, c = ceil(T/t), h hidden, V vocabulary, _r this rank's part.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import Function
from torch.autograd.function import once_differentiable
from torch.nn.functional import linear

from ..comm.collectives import all_reduce
from ..comm.regions import gather_columns
from ..errors import SeqParError
from ..kernels.addition import PassedGradient
from ..kernels.adjacent import Room, copy_rows, joined, parted, reshaped
from ..kernels.gating import gated, gated_backward
from ..kernels.rms_norm import rms_norm_gradients, rms_norm_into
from .deferred import GatedProduct, NormedRows, UnsummedRows
from .early import EarlyGatherings, RowsMark
from .handles import Handle
from .logits import ShardedLogits
from .norm import Remake, remake_of
from .region import ShardingState, TokenRegion
from .token_handles import GatheredInput, TokenShard

__all__ = ["ColumnParallelLinear", "RowParallelLinear", "VocabParallelHead", "call_past_deepspeed", "column_parallel"]

# A sibling this many times narrower than another makes a slow product of its own, the slower in parts: in forward it waits for
# all rows; in backward one copy of all siblings' gradients is cheaper.
_NARROW = 2


class _ColumnParallel(Function):
    """n linears over one input in the region's local shape [.., h] -> n x [b, s, out_r]; see ColumnParallelLinear.

    With `norm_weight` [h] the input is x's RMS norm with it and `eps`, written where the peers read it from and made again in
    backward, whose gradient is made of what the ranks sent each other. `remake` and its tensors `made_of`, if given, compute x
    again in backward, and are kept in its place. `sharing`: whether the outputs may share memory, which lives as long as any of them;
    otherwise all but the last of three or more may (queries and keys end with their rotation, values stay), and whether these end so
    soon that they may hold the last one's columns, too. What shares memory is one product if its weights are adjacent. `passed`, with
    a norm: what else x gets is added to its gradient here. `early`, with a norm: where the gradient of x is gathered as it is made,
    for the linear that made the rows of this mark.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        norm_weight: Tensor | None,
        region: TokenRegion,
        n: int,
        eps: float,
        remake: Remake | None,
        sharing: tuple[bool, bool],
        passed: PassedGradient | None,
        early: tuple[EarlyGatherings, RowsMark] | None,
        *parameters: Tensor | None,
    ) -> tuple[Tensor, ...]:
        weights, biases = parameters[:n], parameters[n:]
        # Its function alone: the node lives until the loss does, and what it is made of would live as long.
        ctx.region, ctx.n, ctx.eps, ctx.remake = region, n, eps, None if remake is None else remake.into
        ctx.passed, ctx.early = passed, early
        ctx.shape = tuple(x.shape)
        root: Tensor | None = None

        def normed(memory: Tensor) -> None:
            nonlocal root
            root = rms_norm_into(memory, x, norm_weight, eps)  # type: ignore[arg-type]

        gathering: Any = None
        if norm_weight is not None:
            gathering = region.transport.gather_made(x.view(region.rows, -1), normed, region.tokens)
        wants_dw = any(ctx.needs_input_grad[9 : 9 + n])
        if norm_weight is not None:
            kept = [x] if wants_dw or ctx.needs_input_grad[0] or ctx.needs_input_grad[1] else []
        else:
            kept = [] if not wants_dw else [x] if remake is None else list(remake.made_of)
        ctx.save_for_backward(*weights, norm_weight, root, *kept)
        lead = (region.batch, region.seq)
        ctx.has_room = False
        if not region.cut:
            x = x.reshape(*lead, -1)
            return tuple(linear(x, w, b) for w, b in zip(weights, biases, strict=True))  # type: ignore[arg-type]
        ys, products, apart = _outputs(x, weights, biases, lead, *sharing)  # type: ignore[arg-type]
        widest = max(y.shape[1] for y, _, _ in products)
        if gathering is None:
            gathering = region.transport.gather(x.reshape(region.rows, -1), region.tokens)
        for rows, arrived in gathering.arrivals():
            for y, w, b in products:
                if y.shape[1] * _NARROW > widest:
                    _product_into(y[rows], arrived, w, b)
        for y, w, b in products:
            if y.shape[1] * _NARROW <= widest:
                _product_into(y, gathering.whole(), w, b)
        gathering.release()
        if apart is not None:
            copy_rows(ys[-1].view(region.tokens, -1), apart)
            Room.offer(products[0][0])  # the gradients of the others may leave room for the last one's
        ctx.has_room = apart is not None
        return tuple(ys)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *dys: Tensor) -> tuple[Tensor | None, ...]:
        region, n = ctx.region, ctx.n
        dys = tuple(dy.reshape(region.tokens, dy.shape[-1]) for dy in dys)
        saved = ctx.saved_tensors  # once: a recomputed tensor can be unpacked only once
        weights, norm_weight, root, kept = saved[:n], saved[n], saved[n + 1], saved[n + 2 :]
        wants_dw, wants_db = ctx.needs_input_grad[9 : 9 + n], ctx.needs_input_grad[9 + n :]
        wants_dx = ctx.needs_input_grad[0] or ctx.needs_input_grad[1]
        joint_dy, joint_weight = joined(dys, 1), joined(weights, 0)
        if joint_dy is None and ctx.has_room:
            joint_dy = Room.filled(dys)
        if region.cut and min(d.shape[1] for d in dys) * _NARROW <= max(d.shape[1] for d in dys):
            joint_dy = torch.cat(dys, dim=1) if joint_dy is None else joint_dy
            joint_weight = torch.cat(weights, dim=0) if joint_weight is None else joint_weight
        lefts, rights = (dys, weights) if joint_dy is None or joint_weight is None else ([joint_dy], [joint_weight])
        x = None if not kept else kept[0].reshape(region.rows, -1)
        gathering = None
        if norm_weight is not None and any(wants_dw):
            gathering = region.transport.gather_made(
                x, lambda memory: rms_norm_into(memory, kept[0], norm_weight, ctx.eps), region.tokens
            )
        elif norm_weight is not None:
            pass
        elif x is not None and ctx.remake is not None and region.cut:
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
        dnorm = None
        if scattering is not None and norm_weight is not None:
            wants_dnorm = ctx.needs_input_grad[1]
            own, received = scattering.addends()
            beside = None if ctx.passed is None else ctx.passed.take()

            def make(memory: Tensor | None) -> Tensor:
                nonlocal dnorm
                given, dnorm = rms_norm_gradients(
                    own, received, kept[0], norm_weight, root, ctx.eps, wants_dnorm, beside, memory
                )
                return given

            if (
                ctx.early is None or beside is None
            ):  # autograd would add the residual's gradient: not what the linear gets
                dx = make(None)
            else:
                gatherings, mark = ctx.early
                dx = gatherings.start(mark, region.transport, kept[0].view(region.rows, -1), region.tokens, make)
        elif scattering is not None:
            dx = scattering.wait()
        if dx is not None:
            dx = reshaped(dx, ctx.shape)
        return dx, dnorm, None, None, None, None, None, None, None, *dws, *dbs


def _sum_of_products(out: Tensor, lefts: Sequence[Tensor], rights: Sequence[Tensor]) -> Tensor:
    """out = sum of left @ right."""
    for i, (left, right) in enumerate(zip(lefts, rights, strict=True)):
        if i == 0:
            torch.mm(left, right, out=out)
        else:
            out.addmm_(left, right)
    return out


Product = tuple[Tensor, Tensor, Tensor | None]
"""Where to [T, out], weight.T, bias."""


def _outputs(
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    lead: tuple[int, int],
    together: bool,
    copied: bool,
) -> tuple[list[Tensor], list[Product], Tensor | None]:
    """Memory for the outputs [b, s, out_r], the products that fill it, and what is to be copied to the last output then.

    Outputs that may share memory are one product if their weights are adjacent. With `copied`, where the last may not and is narrow,
    it is part of the product too, and copied: a product of its own would take longer.
    """
    n, tokens = len(weights), lead[0] * lead[1]
    widths = [w.shape[0] for w in weights]
    shared = n if together else n - 1 if n > 2 else 0
    copied = copied and shared == n - 1 and widths[-1] * _NARROW <= max(widths)
    ys: list[Tensor] = []
    products: list[Product] = []
    apart = None
    for count in (n, shared) if copied else (shared,):
        joint = joined(weights[:count], 0) if count > 1 and all(b is None for b in biases[:count]) else None
        if joint is None:
            continue
        whole = x.new_empty((tokens, joint.shape[0]))
        ys += parted(whole, widths[:shared], lead)
        products.append((whole, joint.t(), None))
        if count > shared:
            ys.append(x.new_empty((*lead, widths[-1])))
            apart = whole[:, -widths[-1] :]
        break
    for w, b in list(zip(weights, biases, strict=True))[len(ys) :]:
        ys.append(x.new_empty((*lead, w.shape[0])))
        products.append((ys[-1].view(tokens, -1), w.t(), b))
    return ys, products, apart


def _product_into(out: Tensor, x: Tensor, transposed: Tensor, bias: Tensor | None) -> None:
    if bias is None:
        torch.mm(x, transposed, out=out)
    else:
        torch.addmm(bias, x, transposed, out=out)


class _RowParallel(Function):
    """[b, s, in_r] -> the region's local shape, without the bias; see RowParallelLinear.

    With `act`, the input is act(x) * up, made again in backward. With `later`, the mark of the rows, there are two outputs, what this
    rank made of its rows and what it received for them, and the result is their sum; the second gets no gradient.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        up: Tensor | None,
        act: str | None,
        weight: Tensor,
        region: TokenRegion,
        later: RowsMark | None,
    ) -> Any:
        ctx.region, ctx.act, ctx.shape, ctx.mark = region, act, x.shape, later
        ctx.set_materialize_grads(False)  # zeros for what was received would be as large as the gradient
        ctx.save_for_backward(x if act or ctx.needs_input_grad[3] else None, up, weight)
        x = x.reshape(region.tokens, -1)
        if act is not None and up is not None:
            x = gated(x, up.reshape(region.tokens, -1), act)
        shape = region.local_shape(weight.shape[0])
        if not region.cut:
            return reshaped(all_reduce(x @ weight.t(), region.groups.tp_group), shape)
        scattering = region.transport.scatter(region.tokens, weight.shape[0], x)
        transposed = weight.t()
        for rows, memory in scattering.parts():
            torch.mm(x[rows], transposed, out=memory)
        if later is None:
            return reshaped(scattering.wait(), shape)
        own, received = scattering.addends()
        if received is not None:
            ctx.mark_non_differentiable(received)
        return reshaped(own, shape), received

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor, _: Any = None) -> tuple[Tensor | None, ...]:
        region = ctx.region
        x, up, weight = ctx.saved_tensors
        x = None if x is None else x.reshape(region.tokens, -1)
        up = None if up is None else up.reshape(region.tokens, -1)
        dy = dy.reshape(region.rows, -1)
        wants_dx = ctx.needs_input_grad[0] or ctx.needs_input_grad[1]
        gathering = None
        if region.cut:
            gathering = None if region.early is None else region.early.take(ctx.mark, dy)
            gathering = gathering or region.transport.gather(dy, region.tokens)
        dx = None
        if wants_dx:
            dx = dy.new_empty((region.tokens, weight.shape[1]))
            for rows, arrived in gathering.arrivals() if gathering is not None else [(slice(0, region.tokens), dy)]:
                torch.mm(arrived, weight, out=dx[rows])
                del arrived
        dup = None
        if up is not None:
            if dx is None:
                x = gated(x, up, ctx.act)  # type: ignore[arg-type]
            else:
                dx, dup, x = gated_backward(dx, x, up, ctx.act)  # type: ignore[arg-type]
        dw = None
        if ctx.needs_input_grad[3]:
            full = gathering.whole() if gathering is not None else dy
            dw = full.t() @ x
            del full
        if gathering is not None:
            gathering.release()
        dx, dup = (None if part is None else part.view(ctx.shape) for part in (dx, dup))
        return dx, dup, None, dw, None, None


def _autocast(x: Tensor, *parameters: Tensor | None) -> list[Tensor | None]:
    """What F.linear would do under torch.autocast, outside our autograd functions so that backward sees one dtype."""
    device = x.device.type
    if not torch.is_autocast_enabled(device):
        return [x, *parameters]
    dtype = torch.get_autocast_dtype(device)
    return [p if p is None else p.to(dtype) for p in (x, *parameters)]


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
        before, (rows, *parameters) = rows, _autocast(rows, *parameters)  # type: ignore[assignment]
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
        return list(_ColumnParallel.apply(*arguments, *parameters))  # type: ignore[no-untyped-call]


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
    if not (module._forward_pre_hooks or module._forward_hooks):
        return module.forward(input, *args, **kwargs)
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
        x: Tensor | None = input.materialise() if isinstance(input, Handle) else input
        weight: Tensor | None = self.weight
        bias: Tensor | None = self.bias
        plain: Any = nullcontext()
        if torch.is_autocast_enabled(input.device.type):
            x, up, weight, bias = _autocast(input, up, weight, bias)
            plain = torch.autocast(input.device.type, enabled=False)
        later = RowsMark() if _may_sum_later(self, region, bias) else None
        with plain:
            output: Any = _RowParallel.apply(x, up, act, weight, region, later)  # type: ignore[no-untyped-call]
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
