"""What column- and row-parallel linears compute, as autograd functions.

Legend: b batch, s sequence, T = b*s tokens, t tp_size, c = ceil(T/t), h hidden, _r this rank's part.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable
from torch.nn.functional import linear

from ..comm.collectives import all_reduce
from ..comm.exchange import Gathering, Scattering
from ..kernels.addition import PassedGradient
from ..kernels.adjacent import Room, copy_rows, joined, parted, reshaped
from ..kernels.gating import gated, gated_backward
from ..kernels.rms_norm import rms_norm_gradients, rms_norm_into
from .early import EarlyGatherings, RowsMark
from .norm import Remake
from .region import TokenRegion

__all__ = ["ColumnParallel", "RowParallel", "cast_for_autocast"]

# A sibling this many times narrower than another makes a slow product of its own, the slower in parts: in forward it waits for
# all rows; in backward one copy of all siblings' gradients is cheaper.
_NARROW = 2


class ColumnParallel(Function):
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
        x, gathering = _input_again(ctx, kept, norm_weight, any(wants_dw))
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
            dx, dnorm = _norm_gradients(ctx, scattering, kept[0], norm_weight, root)
        elif scattering is not None:
            dx = scattering.wait()
        if dx is not None:
            dx = reshaped(dx, ctx.shape)
        return dx, dnorm, None, None, None, None, None, None, None, *dws, *dbs


def _input_again(
    ctx: Any, kept: Sequence[Tensor], norm_weight: Tensor | None, wants_dw: bool
) -> tuple[Tensor | None, Gathering | None]:
    """This rank's rows of the linears' input, or what they are made of, and their gathering where tokens are cut; for dw alone."""
    region = ctx.region
    if not kept or not wants_dw:
        return None, None
    x = kept[0].reshape(region.rows, -1)
    if norm_weight is not None:
        return x, region.transport.gather_made(
            x, lambda memory: rms_norm_into(memory, kept[0], norm_weight, ctx.eps), region.tokens
        )
    if ctx.remake is None:
        return x, region.transport.gather(x, region.tokens) if region.cut else None
    if region.cut:
        return x, region.transport.gather_made(x, lambda memory: ctx.remake(memory, *kept), region.tokens)
    x = torch.empty_like(x)
    ctx.remake(x, *kept)
    return x, None


def _norm_gradients(
    ctx: Any, scattering: Scattering, x: Tensor, norm_weight: Tensor, root: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """(gradient of what was normed, gradient of the norm's weight), from what the ranks send each other."""
    region = ctx.region
    own, received = scattering.addends()
    beside = None if ctx.passed is None else ctx.passed.take()
    dnorm: Tensor | None = None

    def make(memory: Tensor | None) -> Tensor:
        nonlocal dnorm
        dx, dnorm = rms_norm_gradients(
            own, received, x, norm_weight, root, ctx.eps, ctx.needs_input_grad[1], beside, memory
        )
        return dx

    # Without `beside` autograd would add the residual's gradient, and this is not what the linear gets.
    if ctx.early is None or beside is None:
        return make(None), dnorm
    gatherings, mark = ctx.early
    dx = gatherings.start(mark, region.transport, x.view(region.rows, -1), region.tokens, make)
    return dx, dnorm


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


class RowParallel(Function):
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


def cast_for_autocast(x: Tensor, *parameters: Tensor | None) -> list[Tensor | None]:
    """What F.linear would do under torch.autocast, outside our autograd functions so that backward sees one dtype."""
    device = x.device.type
    if not torch.is_autocast_enabled(device):
        return [x, *parameters]
    dtype = torch.get_autocast_dtype(device)
    return [p if p is None else p.to(dtype) for p in (x, *parameters)]
