"""Fused, chunked, vocabulary-parallel linear + cross-entropy: [T, V_r] logits exist at once only where that takes no more memory.

Legend: T tokens, t tp_size, c = ceil(T/t), h hidden, V_r this rank's vocabulary rows, k rows a chunk takes from each rank.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable
from torch.nn.functional import pad

from ..comm.collectives import all_gather, all_reduce
from ..kernels.cross_entropy import combined, gradient_, scaled, scaled_, statistics
from .logits import ShardedLogits
from .region import TokenRegion

__all__ = ["CausalLMLoss", "cross_entropy_of", "vocab_parallel_linear_cross_entropy"]

Transforms = tuple[Callable[[Tensor], Tensor], ...]


@dataclass(frozen=True)
class _Options:
    region: TokenRegion
    vocab_start: int
    vocab_size: int
    chunk_tokens: int
    ignore_index: int
    transforms: Transforms


class _LinearCrossEntropy(Function):
    """Gradients are made in forward, chunk by chunk, and scaled in backward: no logits are kept or computed twice.

    In bfloat16 they are made of the mean over the counted tokens, which is what most losses are: then nothing is left to scale.
    """

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, options: _Options
    ) -> tuple[Tensor, Tensor]:
        group, cut = options.region.groups.tp_group, options.region.cut
        wants_dx, wants_dw, wants_db = ctx.needs_input_grad[:3]
        wide = torch.promote_types(weight.dtype, torch.float32)
        options = replace(options, chunk_tokens=_tokens_at_once(weight, options, wants_dw))
        # One product rounds once, whatever it is summed in. A sum over tokens can overflow in float16.
        one_chunk = _rows_at_once(options) >= options.region.rows
        at_once = one_chunk and weight.dtype is torch.bfloat16
        dx = torch.empty_like(hidden) if wants_dx and not one_chunk else None
        dw = None
        db = torch.zeros_like(bias, dtype=wide) if wants_db and bias is not None else None
        total = torch.zeros((), dtype=wide, device=hidden.device)
        counted = (targets != options.ignore_index).sum().to(wide)
        share = (
            1.0 / counted.clamp_min(1.0) if weight.dtype is torch.bfloat16 else None
        )  # others' range or digits are for the sum
        for rows, wanted, x in _gathered_chunks(hidden, targets, options):
            logits = torch.nn.functional.linear(x, weight, bias)
            losses, dlogits = _chunk_loss(logits, wanted, options, wants_dx or wants_dw or wants_db, share)
            total += losses
            scattering = None
            if wants_dx and cut:
                scattering = options.region.transport.scatter(wanted.numel(), weight.shape[1], dlogits)
                for part, memory in scattering.parts():
                    torch.mm(dlogits[part], weight, out=memory)
            if wants_dw:
                first = weight.dtype if at_once else wide
                dw = _product(dlogits.t(), x, first) if dw is None else _accumulate(dw, dlogits.t(), x)
            if db is not None:
                db += dlogits.sum(0)
            if wants_dx:
                dx_here = dlogits @ weight if scattering is None else scattering.wait()
                if dx is None:
                    dx = dx_here
                else:
                    dx[rows] = dx_here
        if dx is not None and not cut:
            dx = all_reduce(dx, group)
        # Kept until backward, so in the weight's own dtype where that cannot overflow.
        dw = dw if not wants_dw or dw is not None else torch.zeros_like(weight)
        dw = dw.to(weight.dtype) if dw is not None and weight.dtype is torch.bfloat16 else dw
        ctx.save_for_backward(dx, dw, db, counted)
        ctx.dtypes, ctx.of_mean = (weight.dtype, None if bias is None else bias.dtype), share is not None
        ctx.mark_non_differentiable(counted)
        return total, counted

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dloss: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        dx, dw, db, counted = ctx.saved_tensors
        dloss = torch.where(counted > 0, dloss, 0.0)  # a mean over no label is NaN with zero gradients, as in torch
        if ctx.of_mean:
            dloss = dloss * counted.clamp_min(1.0)
        weight_dtype, bias_dtype = ctx.dtypes
        if ctx.of_mean and not _graph_is_kept():
            dx, dw = (None if part is None else scaled_(part, dloss) for part in (dx, dw))
        else:
            dx = None if dx is None else scaled(dx, dloss, dx.dtype)
            dw = None if dw is None else scaled(dw, dloss, weight_dtype)
        db = None if db is None else scaled(db, dloss, bias_dtype)
        return dx, dw, db, None, None


def _graph_is_kept() -> bool:
    """Whether the backward pass that is running may be followed by another through the same nodes."""
    ask = getattr(torch._C._autograd, "_get_current_graph_task_keep_graph", None)
    return True if ask is None else bool(ask())


def _tokens_at_once(weight: Tensor, options: _Options, wants_dw: bool) -> int:
    """How many tokens a chunk has: all, where their logits take no more memory than a chunk's and the wide sum of chunks' dw do."""
    region, width = options.region, weight.element_size()
    tokens = region.rows * (region.groups.tp_size if region.cut else 1)  # with dead rows
    if not wants_dw or weight.dtype is not torch.bfloat16 or options.transforms:
        return options.chunk_tokens
    # Bytes for each row of the vocabulary: the logits of a column of tokens, and its gradient; 4 is the sum's, which is rounded last.
    h = weight.shape[1]
    chunked = max(options.chunk_tokens * width + 4 * h, (4 + width) * h)
    return tokens if tokens * width + width * h <= chunked else options.chunk_tokens


def _rows_at_once(options: _Options) -> int:
    """How many of a rank's rows a chunk takes."""
    return max(1, options.chunk_tokens // (options.region.groups.tp_size if options.region.cut else 1))


def _gathered_chunks(hidden: Tensor, targets: Tensor, options: _Options) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """(rows of the local hidden states, the chunk's targets, its gathered rows); the next chunk is gathered meanwhile."""
    if not options.region.cut:
        for rows, wanted in _chunks(targets, options):
            yield rows, wanted, hidden[rows]
        return
    chunks = list(_chunks(targets, options))
    gathering = options.region.transport.gather(hidden[chunks[0][0]], chunks[0][1].numel())
    for (rows, wanted), following in zip(chunks, [*chunks[1:], None], strict=True):
        current = gathering
        x = current.whole()
        if following is not None:
            gathering = options.region.transport.gather(hidden[following[0]], following[1].numel())
        yield rows, wanted, x
        current.release()


def _product(left: Tensor, right: Tensor, dtype: torch.dtype) -> Tensor:
    """left @ right, summed and returned in `dtype`."""
    if dtype != left.dtype and left.is_cuda:
        return torch.mm(left, right, out_dtype=dtype)
    return (left @ right).to(dtype)


def _accumulate(total: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """total += left @ right, summed in total's dtype."""
    if total.dtype == left.dtype:
        return total.addmm_(left, right)
    if total.is_cuda:
        return torch.addmm(total, left, right, out_dtype=total.dtype, out=total)
    return total.add_(left @ right)


def _chunks(targets: Tensor, options: _Options) -> Iterator[tuple[slice, Tensor]]:
    """(rows of the local hidden states, targets of the gathered chunk) until all T tokens are done."""
    region = options.region
    t = region.groups.tp_size if region.cut else 1
    lined_up = pad(targets, (0, t * region.rows - targets.numel()), value=options.ignore_index).view(t, region.rows)
    step = _rows_at_once(options)
    for start in range(0, region.rows, step):
        rows = slice(start, min(start + step, region.rows))
        yield rows, lined_up[:, rows].reshape(-1)


def _chunk_loss(
    logits: Tensor, targets: Tensor, options: _Options, wants_grad: bool, share: Tensor | None
) -> tuple[Tensor, Tensor]:
    """(sum of the chunk's losses, d sum / d logits, times `share`) from logits [n, V_r] and targets [n]. Overwrites the logits."""
    group = options.region.groups.tp_group
    leaf = z = logits
    if options.transforms:
        with torch.enable_grad():
            leaf = logits.detach().requires_grad_(wants_grad)
            z = leaf
            for transform in options.transforms:
                z = transform(z)
    # Overwritten below: a copy where a transform's backward may need its output, else the logits themselves will do.
    values = z.detach().clone() if options.transforms else z
    local = targets - options.vocab_start
    everyones = all_gather(statistics(values, local).unsqueeze(0), group)
    each, log_sum, counted = combined(everyones, targets, options.ignore_index)
    losses = each.sum()
    if not wants_grad:
        return losses, logits
    dz = gradient_(values, local, log_sum, counted if share is None else counted * share)
    return losses, torch.autograd.grad(z, leaf, dz)[0] if options.transforms else dz


def vocab_parallel_linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    region: TokenRegion,
    *,
    vocab_start: int,
    vocab_size: int,
    chunk_tokens: int,
    ignore_index: int = -100,
    transforms: Transforms = (),
) -> tuple[Tensor, Tensor]:
    """Sum over tokens of -log softmax(transforms(hidden @ weight.T + bias))[target], and how many were counted.

    Args:
        hidden: [region.rows, h], this rank's rows.
        weight: [V_r, h], rows vocab_start .. vocab_start + V_r of the head. bias: [V_r] or None.
        targets: [T] int64, equal on every rank, already shifted; `ignore_index` is not counted.
        chunk_tokens: logits of this many tokens exist at a time, or of all where that takes no more memory.
        transforms: elementwise functions of the logits (a scale, a softcap).

    Returns:
        Two fp32 scalars, equal on every rank; the first is differentiable with respect to hidden, weight and bias.

    Raises:
        IndexError: a target is neither `ignore_index` nor in 0 .. vocab_size - 1 (on a GPU: a device-side assertion).
    """
    allowed = ((targets == ignore_index) | ((targets >= 0) & (targets < vocab_size))).all()
    if targets.device.type == "cpu" and not allowed:
        bad = targets[(targets != ignore_index) & ((targets < 0) | (targets >= vocab_size))]
        raise IndexError(
            f"label {int(bad[0])} is outside the vocabulary of {vocab_size}; use {ignore_index} to ignore a token"
        )
    torch._assert_async(allowed, f"a label is outside the vocabulary of {vocab_size}")
    options = _Options(region, vocab_start, vocab_size, chunk_tokens, ignore_index, transforms)
    return _LinearCrossEntropy.apply(hidden, weight, bias, targets, options)  # type: ignore[no-any-return, no-untyped-call]


def _fused(logits: ShardedLogits, targets: Tensor, ignore_index: int) -> tuple[Tensor, Tensor]:
    """(summed loss, counted labels) of logits and the targets [T] of all tokens."""
    logits.refuse_other_weights()
    logits.made.lost = True
    with logits.as_called(), torch.set_grad_enabled(torch.is_grad_enabled() and logits._grad_mode):
        return logits.head.loss(
            logits.source,
            logits.region,
            targets,
            vocab_size=logits.head.vocab_size,
            chunk_tokens=logits.state.loss_chunk_tokens,
            ignore_index=ignore_index,
            transforms=logits.transforms,
        )


def cross_entropy_of(
    input: Any,
    target: Any,
    weight: Tensor | None = None,
    size_average: bool | None = None,
    ignore_index: int = -100,
    reduce: bool | None = None,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
) -> Tensor | None:
    """`torch.nn.functional.cross_entropy` of ShardedLogits [T, V] and class indices [T], a scalar in fp32 or wider.

    Returns None for what is not fused: class weights, smoothing, probabilities as targets, logits that somebody had whole.
    """
    if not (isinstance(input, ShardedLogits) and input.is_untouched() and input.dim() == 2):
        return None
    plain = weight is None and size_average is None and reduce is None and not label_smoothing
    indices = type(target) is Tensor and target.dtype is torch.int64 and target.shape == input.shape[:1]
    if not (plain and indices and reduction in ("mean", "sum")):
        return None
    total, counted = _fused(input, target, ignore_index)
    return total if reduction == "sum" else total / counted


class CausalLMLoss:
    """Stands in for the model's `loss_function`; same signature and value as Hugging Face's causal-LM loss.

    Takes ShardedLogits whole into the fused loss; whatever else it is given goes to the loss it stands in for.
    """

    def __init__(self, original: Callable[..., Tensor]) -> None:
        self.original = original

    def __call__(
        self,
        logits: Tensor,
        labels: Tensor | None,
        vocab_size: int,
        num_items_in_batch: Tensor | int | None = None,
        ignore_index: int = -100,
        shift_labels: Tensor | None = None,
        **kwargs: Any,
    ) -> Tensor:
        """logits [b, s, V], labels [b, s] (shifted here) or shift_labels [b, s] -> scalar fp32 loss."""
        if shift_labels is not None:
            targets = shift_labels
        elif labels is not None:
            targets = pad(labels, (0, 1), value=ignore_index)[..., 1:]
        else:
            raise ValueError("the loss needs labels or shift_labels")
        fits = isinstance(logits, ShardedLogits) and logits.is_untouched() and vocab_size == logits.head.vocab_size
        if not (isinstance(logits, ShardedLogits) and fits and targets.numel() == logits.region.tokens):
            return self.original(
                logits=logits, labels=labels, vocab_size=vocab_size, num_items_in_batch=num_items_in_batch,
                ignore_index=ignore_index, shift_labels=shift_labels, **kwargs,
            )  # fmt: skip
        total, counted = _fused(logits, targets.reshape(-1).to(logits.source.device), ignore_index)
        if num_items_in_batch is None:
            return total / counted
        if isinstance(num_items_in_batch, Tensor):
            num_items_in_batch = num_items_in_batch.to(total.device)
        return total / num_items_in_batch
