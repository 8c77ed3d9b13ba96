"""The Triton kernels, and the functions that launch them. Import only where Triton is installed.

All arithmetic is fp32; results have the inputs' dtype. Legend as in the modules that call them.
"""

# Kernels are typed by Triton, not by Python.
# mypy: disable-error-code="untyped-decorator, no-untyped-def"
from __future__ import annotations

import functools
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .adjacent import parted

__all__ = [
    "copied_rows", "cross_entropy_combined", "cross_entropy_gradient_", "cross_entropy_statistics", "gated", "gated_backward", "rms_norm",
    "rms_norm_backward", "rotate", "rows_into", "scaled", "scaled_", "sum_parts", "sum_runs",
]  # fmt: skip

_PROGRAMS_A_PROCESSOR = 2  # of the norm's backward, each with a partial sum of the weight's gradient


@triton.jit
def _act(x, ACT: tl.constexpr):
    """(act(x), act'(x))"""
    if ACT == "silu":
        sigmoid = tl.sigmoid(x)
        return x * sigmoid, sigmoid * (1.0 + x * (1.0 - sigmoid))
    elif ACT == "gelu_tanh":
        inner = 0.7978845608028654 * (x + 0.044715 * x * x * x)
        tanh = 2.0 * tl.sigmoid(2.0 * inner) - 1.0
        dinner = 0.7978845608028654 * (1.0 + 3.0 * 0.044715 * x * x)
        return 0.5 * x * (1.0 + tanh), 0.5 * (1.0 + tanh) + 0.5 * x * (1.0 - tanh * tanh) * dinner
    else:
        cdf = 0.5 * (1.0 + tl.erf(x * 0.7071067811865476))
        return x * cdf, cdf + x * 0.3989422804014327 * tl.exp(-0.5 * x * x)


@triton.jit
def _gated(gate, up, out, gate_stride, up_stride, width, ACT: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    cols = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = cols < width
    g = tl.load(gate + row * gate_stride + cols, mask=mask, other=0.0).to(tl.float32)
    u = tl.load(up + row * up_stride + cols, mask=mask, other=0.0).to(tl.float32)
    value, _ = _act(g, ACT)
    tl.store(out + row * width + cols, value * u, mask=mask)


@triton.jit
def _gated_backward(dout, gate, up, dgate, dup, gate_stride, up_stride, width, ACT: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    cols = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = cols < width
    d = tl.load(dout + row * width + cols, mask=mask, other=0.0).to(tl.float32)
    g = tl.load(gate + row * gate_stride + cols, mask=mask, other=0.0).to(tl.float32)
    u = tl.load(up + row * up_stride + cols, mask=mask, other=0.0).to(tl.float32)
    value, slope = _act(g, ACT)
    tl.store(dgate + row * 2 * width + cols, d * u * slope, mask=mask)
    tl.store(dup + row * 2 * width + cols, d * value, mask=mask)
    tl.store(dout + row * width + cols, value * u, mask=mask)  # the product takes its gradient's place


@triton.jit
def _rotate(
    x, out, cos, sin, heads, seq,
    x_b, x_n, x_s, out_b, out_n, out_s, cos_b, cos_s, sin_b, sin_s,
    HALF: tl.constexpr, PADDED: tl.constexpr, HEADS: tl.constexpr, INVERSE: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0)
    b = (token // seq).to(tl.int64)
    s = (token % seq).to(tl.int64)
    cols = tl.arange(0, PADDED)
    inside = cols < HALF
    cos_row, sin_row = cos + b * cos_b + s * cos_s, sin + b * sin_b + s * sin_s
    cos_1 = tl.load(cos_row + cols, mask=inside, other=0.0).to(tl.float32)[None, :]
    cos_2 = tl.load(cos_row + HALF + cols, mask=inside, other=0.0).to(tl.float32)[None, :]
    sin_1 = tl.load(sin_row + cols, mask=inside, other=0.0).to(tl.float32)[None, :]
    sin_2 = tl.load(sin_row + HALF + cols, mask=inside, other=0.0).to(tl.float32)[None, :]
    n = tl.program_id(1) * HEADS + tl.arange(0, HEADS)
    mask = (n < heads)[:, None] & inside[None, :]
    at = x + b * x_b + s * x_s + n[:, None] * x_n + cols[None, :]
    x_1 = tl.load(at, mask=mask, other=0.0).to(tl.float32)
    x_2 = tl.load(at + HALF, mask=mask, other=0.0).to(tl.float32)
    if INVERSE:
        y_1 = x_1 * cos_1 + x_2 * sin_2
        y_2 = x_2 * cos_2 - x_1 * sin_1
    else:
        y_1 = x_1 * cos_1 - x_2 * sin_1
        y_2 = x_2 * cos_2 + x_1 * sin_2
    to = out + b * out_b + s * out_s + n[:, None] * out_n + cols[None, :]
    tl.store(to, y_1, mask=mask)
    tl.store(to + HALF, y_2, mask=mask)


@triton.jit
def _statistics(logits, targets, out, rows, stride, width, BLOCK: tl.constexpr):
    row = tl.program_id(0)
    z = logits + row.to(tl.int64) * stride
    cols = tl.arange(0, BLOCK)
    top = float("-inf")
    total = 0.0
    for start in range(0, width, BLOCK):
        x = tl.load(z + start + cols, mask=start + cols < width, other=float("-inf")).to(tl.float32)
        above = tl.maximum(top, tl.max(x, axis=0))
        total = total * tl.exp(top - above) + tl.sum(tl.exp(x - above), axis=0)
        top = above
    target = tl.load(targets + row)
    mine = (target >= 0) & (target < width)
    picked = tl.load(z + tl.where(mine, target, 0)).to(tl.float32)
    tl.store(out + row, top)
    tl.store(out + rows + row, total)
    tl.store(out + 2 * rows + row, tl.where(mine, picked, 0.0))


@triton.jit
def _combined(everyones, targets, losses, log_sums, counts, rows, ignored, RANKS: tl.constexpr, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = at < rows
    top = tl.full([BLOCK], float("-inf"), dtype=tl.float32)
    part = everyones + at
    for _ in tl.static_range(RANKS):
        top = tl.maximum(top, tl.load(part, mask=mask, other=0.0))
        part += 3 * rows
    total = tl.zeros([BLOCK], dtype=tl.float32)
    picked = tl.zeros([BLOCK], dtype=tl.float32)
    part = everyones + at
    for _ in tl.static_range(RANKS):
        total += tl.load(part + rows, mask=mask, other=1.0) * tl.exp(tl.load(part, mask=mask, other=0.0) - top)
        picked += tl.load(part + 2 * rows, mask=mask, other=0.0)
        part += 3 * rows
    log_sum = tl.log(total)
    counts_here = tl.load(targets + at, mask=mask, other=0) != ignored
    tl.store(losses + at, tl.where(counts_here, log_sum + (top - picked), 0.0), mask=mask)
    tl.store(log_sums + at, log_sum + top, mask=mask)
    tl.store(counts + at, tl.where(counts_here, 1.0, 0.0), mask=mask)


@triton.jit
def _gradient(logits, targets, log_sum, scale, stride, width, BLOCK: tl.constexpr):
    row = tl.program_id(0)
    cols = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = cols < width
    at = logits + row.to(tl.int64) * stride + cols
    factor = tl.load(scale + row)
    x = tl.load(at, mask=mask, other=0.0).to(tl.float32)
    p = tl.exp(x - tl.load(log_sum + row)) - tl.where(cols == tl.load(targets + row), 1.0, 0.0)
    tl.store(at, tl.where(factor == 0.0, 0.0, factor * p), mask=mask)


@triton.jit
def _scaled(x, factor, out, size, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    value = tl.load(x + at, mask=at < size, other=0.0).to(tl.float32)
    tl.store(out + at, value * tl.load(factor).to(tl.float32), mask=at < size)


@triton.jit
def _scaled_in_place(x, factor, size, BLOCK: tl.constexpr):
    f = tl.load(factor).to(tl.float32)
    if (tl.abs(f - 1.0) > 1e-6) | (f != f):
        at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
        mask = at < size
        tl.store(x + at, tl.load(x + at, mask=mask, other=0.0).to(tl.float32) * f, mask=mask)


@triton.jit
def _sum_parts(own, received, residual, out, size, PARTS: tl.constexpr, RESIDUAL: tl.constexpr, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = at < size
    total = tl.load(own + at, mask=mask, other=0.0).to(tl.float32)
    part = received + at
    for _ in tl.static_range(PARTS):
        total += tl.load(part, mask=mask, other=0.0).to(tl.float32)
        part += size
    if RESIDUAL:
        total += tl.load(residual + at, mask=mask, other=0.0).to(tl.float32)
    tl.store(out + at, total, mask=mask)


@triton.jit
def _rms_norm(x, weight, out, root, width, eps, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    cols = tl.arange(0, BLOCK)
    mask = cols < width
    v = tl.load(x + row * width + cols, mask=mask, other=0.0).to(tl.float32)
    w = tl.load(weight + cols, mask=mask, other=0.0).to(tl.float32)
    r = tl.rsqrt(tl.sum(v * v, axis=0) / width + eps)
    tl.store(root + row, r)
    tl.store(out + row * width + cols, v * r * w, mask=mask)


@triton.jit
def _rms_norm_backward(
    dy, more, beside, x, weight, root, dx, also, dweight, rows, width, size,
    PARTS: tl.constexpr, BESIDE: tl.constexpr, ALSO: tl.constexpr, WANTS_DWEIGHT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0).to(tl.int64)
    cols = tl.arange(0, BLOCK)
    mask = cols < width
    w = tl.load(weight + cols, mask=mask, other=0.0).to(tl.float32)
    total = tl.zeros([BLOCK], dtype=tl.float32)
    for step in range(0, tl.cdiv(rows, tl.num_programs(0))):
        row = program + step * tl.num_programs(0)
        inside = mask & (row < rows)
        at = row * width + cols
        d = tl.load(dy + at, mask=inside, other=0.0).to(tl.float32)
        part = more + at
        for _ in tl.static_range(PARTS):
            d += tl.load(part, mask=inside, other=0.0).to(tl.float32)
            part += size
        r = tl.load(root + row, mask=row < rows, other=0.0)
        v = tl.load(x + at, mask=inside, other=0.0).to(tl.float32) * r
        slope = d * w
        given = (slope - v * (tl.sum(slope * v, axis=0) / width)) * r
        if BESIDE:
            given += tl.load(beside + at, mask=inside, other=0.0).to(tl.float32)
        tl.store(dx + at, given, mask=inside)
        if ALSO:
            tl.store(also + at, given, mask=inside)
        if WANTS_DWEIGHT:
            total += d * v
    if WANTS_DWEIGHT:
        tl.store(dweight + program * width + cols, total, mask=mask)


@triton.jit
def _column_sums(parts, out, rows, width, ROWS: tl.constexpr, COLS: tl.constexpr):
    cols = tl.program_id(0) * COLS + tl.arange(0, COLS)
    total = tl.zeros([ROWS, COLS], dtype=tl.float32)
    for start in range(0, rows, ROWS):
        row = start + tl.arange(0, ROWS)
        mask = (row < rows)[:, None] & (cols < width)[None, :]
        total += tl.load(parts + row[:, None] * width + cols[None, :], mask=mask, other=0.0)
    tl.store(out + cols, tl.sum(total, axis=0), mask=cols < width)


@triton.jit
def _rows_into(out, weight, ids, count, width, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    cols = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    at = tl.load(ids + row).to(tl.int64)
    mine = (at >= 0) & (at < count)
    values = tl.load(weight + tl.where(mine, at, 0) * width + cols, mask=mine & (cols < width), other=0.0)
    tl.store(out + row * width + cols, values, mask=cols < width)


@triton.jit
def _sum_runs(out, dy, ordered, order, length, count, width, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    first = tl.program_id(0)
    at = tl.load(ordered + first)
    before = tl.load(ordered + first - 1, mask=first > 0, other=-1)
    if (at < count) & (at != before):  # a run begins here; most are of one row
        cols = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
        inside = cols < width
        total = tl.load(dy + tl.load(order + first) * width + cols, mask=inside, other=0.0).to(tl.float32)
        start = first + 1
        more = 0
        if start < length:
            more = (tl.load(ordered + start) == at).to(tl.int32)
        while more > 0:
            place = start + tl.arange(0, ROWS)
            mine = tl.load(ordered + place, mask=place < length, other=-1) == at
            row = tl.load(order + place, mask=mine, other=0)
            values = tl.load(dy + row[:, None] * width + cols[None, :], mask=mine[:, None] & inside[None, :], other=0.0)
            total += tl.sum(values.to(tl.float32), axis=0)
            start += ROWS
            more = tl.sum(mine.to(tl.int32), axis=0) // ROWS  # whether the run may go on
        tl.store(out + at.to(tl.int64) * width + cols, total, mask=inside)


@triton.jit
def _copied_rows(x, out, rows, width, x_stride, out_stride, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)[:, None]
    cols = (tl.program_id(1) * BLOCK + tl.arange(0, BLOCK))[None, :]
    mask = (row < rows) & (cols < width)
    tl.store(out + row * out_stride + cols, tl.load(x + row * x_stride + cols, mask=mask), mask=mask)


def _rows(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def gated(gate: Tensor, up: Tensor, act: str) -> Tensor:
    """See gating.gated."""
    gate, up = _rows(gate), _rows(up)
    out = gate.new_empty(gate.shape)
    grid = (gate.shape[0], _ceil(gate.shape[1], 1024))
    if out.numel():
        _launch(_gated, grid, (gate, up, out), (gate.stride(0), up.stride(0), gate.shape[1]), ACT=act, BLOCK=1024)
    return out


def gated_backward(dproduct: Tensor, gate: Tensor, up: Tensor, act: str) -> tuple[Tensor, Tensor, Tensor]:
    """See gating.gated_backward."""
    dproduct, gate, up = dproduct.contiguous(), _rows(gate), _rows(up)
    # Side by side, so that what made gate and up together takes their gradients together.
    dgate, dup = parted(gate.new_empty((gate.shape[0], 2 * gate.shape[1])), [gate.shape[1]] * 2)
    grid = (gate.shape[0], _ceil(gate.shape[1], 1024))
    if dgate.numel():
        strides = (gate.stride(0), up.stride(0), gate.shape[1])
        _launch(_gated_backward, grid, (dproduct, gate, up, dgate, dup), strides, ACT=act, BLOCK=1024)
    return dgate, dup, dproduct


def rotate(x: Tensor, cos: Tensor, sin: Tensor, inverse: bool, out: Tensor | None = None) -> Tensor:
    """See rotary.rotate; `inverse` turns back. Writes to `out`, of any strides but the last, if it is given."""
    batch, heads, seq, width = x.shape
    out = torch.empty_like(x) if out is None else out
    if out.stride(-1) != 1:  # empty_like keeps strides only of dense tensors
        out = x.new_empty(x.shape)
    cos, sin = _rows(cos), _rows(sin)
    one = [0 if table.shape[0] == 1 else table.stride(0) for table in (cos, sin)]
    half, at_once = width // 2, min(8, _power_of_2(heads))
    if out.numel():
        _launch(
            _rotate, (batch * seq, _ceil(heads, at_once)), (x, out, cos, sin),
            (heads, seq, *x.stride()[:3], *out.stride()[:3], one[0], cos.stride(1), one[1], sin.stride(1)),
            HALF=half, PADDED=_power_of_2(half), HEADS=at_once, INVERSE=inverse,
        )  # fmt: skip
    return out


def cross_entropy_statistics(logits: Tensor, local_targets: Tensor) -> Tensor:
    """See cross_entropy.statistics."""
    logits = _rows(logits)
    rows, width = logits.shape
    out = logits.new_empty((3, rows), dtype=torch.float32)
    _launch(
        _statistics, (rows,), (logits, local_targets, out), (rows, logits.stride(0), width), BLOCK=4096, num_warps=8
    )
    return out


def cross_entropy_combined(everyones: Tensor, targets: Tensor, ignore_index: int) -> tuple[Tensor, Tensor, Tensor]:
    """See cross_entropy.combined."""
    ranks, _, rows = everyones.shape
    losses, log_sums, counts = (everyones.new_empty(rows) for _ in range(3))
    if rows:
        _launch(
            _combined, (_ceil(rows, 256),), (everyones.contiguous(), targets.contiguous(), losses, log_sums, counts), (rows, ignore_index),
            RANKS=ranks, BLOCK=256,
        )  # fmt: skip
    return losses, log_sums, counts


def cross_entropy_gradient_(logits: Tensor, local_targets: Tensor, log_sum: Tensor, scale: Tensor) -> Tensor:
    """See cross_entropy.gradient_."""
    assert logits.stride(-1) == 1
    rows, width = logits.shape
    grid = (rows, _ceil(width, 4096))
    tensors = (logits, local_targets, log_sum, scale)
    _launch(_gradient, grid, tensors, (logits.stride(0), width), BLOCK=4096, num_warps=8)
    return logits


def scaled(x: Tensor, factor: Tensor, dtype: torch.dtype) -> Tensor:
    """See cross_entropy.scaled."""
    out = torch.empty_like(x, dtype=dtype)
    if out.numel():
        _launch(_scaled, (_ceil(x.numel(), 4096),), (x, factor, out), (x.numel(),), BLOCK=4096)
    return out


def scaled_(x: Tensor, factor: Tensor) -> None:
    """See cross_entropy.scaled_."""
    if x.numel():
        _launch(_scaled_in_place, (_ceil(x.numel(), 16384),), (x, factor), (x.numel(),), BLOCK=16384, num_warps=8)


def rows_into(out: Tensor, weight: Tensor, ids: Tensor) -> None:
    """See lookup.rows_into; all contiguous."""
    if out.numel():
        grid = (out.shape[0], _ceil(out.shape[1], 1024))
        _launch(_rows_into, grid, (out, weight, ids), (weight.shape[0], weight.shape[1]), BLOCK=1024)


def copied_rows(out: Tensor, x: Tensor) -> None:
    """out = x, both [n, w] of one dtype with rows anywhere; torch's copy of such rows takes three times as long."""
    rows, width = x.shape
    if x.numel():
        block = min(1024, _power_of_2(width))
        at_once = 4096 // block
        grid = (_ceil(rows, at_once), _ceil(width, block))
        _launch(_copied_rows, grid, (x, out), (rows, width, x.stride(0), out.stride(0)), ROWS=at_once, BLOCK=block)


def sum_runs(out: Tensor, dy: Tensor, ordered: Tensor, order: Tensor) -> None:
    """out[i] = the sum of the rows of dy [n, w] at the places of `order` [n] where `ordered` [n], ascending, is i; others stay."""
    if dy.numel():
        grid = (dy.shape[0], _ceil(dy.shape[1], 512))
        _launch(_sum_runs, grid, (out, dy, ordered, order), (*dy.shape[:1], *out.shape), ROWS=16, BLOCK=512)


def sum_parts(own: Tensor, received: Tensor | None, residual: Tensor | None, out: Tensor) -> None:
    """out = own + every part of received [p, ...] + residual; all contiguous and of one dtype, `out` may be `own`."""
    size = own.numel()
    if size:
        parts = 0 if received is None else received.shape[0]
        _launch(
            _sum_parts, (_ceil(size, 2048),),
            (own, own if received is None else received, own if residual is None else residual, out), (size,),
            PARTS=parts, RESIDUAL=residual is not None, BLOCK=2048,
        )  # fmt: skip


def rms_norm(x: Tensor, weight: Tensor, eps: float, out: Tensor) -> Tensor:
    """Writes the norm of contiguous x [..., h] to `out`; returns 1 / sqrt(mean(x^2) + eps) of every row, fp32."""
    width = x.shape[-1]
    rows = x.numel() // width
    root = x.new_empty(rows, dtype=torch.float32)
    if rows:
        block = _power_of_2(width)
        _launch(_rms_norm, (rows,), (x, weight, out, root), (width, eps), BLOCK=block, num_warps=_warps(block))
    return root


def rms_norm_backward(
    dy: Tensor, x: Tensor, weight: Tensor, root: Tensor, wants_dweight: bool, more: Tensor | None = None,
    beside: Tensor | None = None, also: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """(dx + beside, dweight or None) of `rms_norm`, whose output's gradient is dy and the parts of `more` [p, ...]; all contiguous.

    The first is written to `also` too.
    """
    width, rows = x.shape[-1], root.numel()
    dx = torch.empty_like(x)
    processors = _processors(x.device.index) if x.is_cuda else 1
    programs = min(rows, _PROGRAMS_A_PROCESSOR * processors)
    parts = x.new_empty((programs, width) if wants_dweight else 0, dtype=torch.float32)
    empty = torch.empty_like if rows else torch.zeros_like
    dweight = empty(weight) if wants_dweight else None
    if rows:
        block = _power_of_2(width)
        _launch(
            _rms_norm_backward, (programs,),
            (
                dy, dy if more is None else more, dy if beside is None else beside, x, weight, root, dx, dx if also is None else also,
                parts,
            ),
            (rows, width, x.numel()), PARTS=0 if more is None else more.shape[0], BESIDE=beside is not None, ALSO=also is not None,
            WANTS_DWEIGHT=wants_dweight, BLOCK=block, num_warps=_warps(2 * block),
        )  # fmt: skip
    if rows and dweight is not None:
        _launch(_column_sums, (_ceil(width, 32),), (parts, dweight), (programs, width), ROWS=64, COLS=32)
    return dx, dweight


def _warps(block: int) -> int:
    """Such that a thread has 16 elements, or less."""
    return max(1, min(16, block // 512))


_compiled: dict[tuple[Any, ...], Any] = {}
_MOST_COMPILED = 4096


def _launch(
    kernel: Any, grid: tuple[int, ...], tensors: tuple[Tensor, ...], numbers: tuple[int | float, ...], **options: Any
) -> None:
    """`kernel[grid](*tensors, *numbers, **options)`; constexprs are named, and stand last in the kernel's signature."""
    device = tensors[0].device
    if device.type != "cuda":
        kernel[grid](*tensors, *numbers, **options)
    elif torch.cuda.current_device() == device.index:
        _launch_here(kernel, grid, tensors, numbers, options)
    else:
        with torch.cuda.device(device):  # Triton launches on the current device, whatever the tensors' device
            _launch_here(kernel, grid, tensors, numbers, options)


def _launch_here(
    kernel: Any, grid: tuple[int, ...], tensors: tuple[Tensor, ...], numbers: tuple[int | float, ...], options: Any
) -> None:
    """Triton finds out anew at each launch which compiled kernel fits: longer than some of these kernels run."""
    index, pointers = tensors[0].device.index, 0
    key: list[Any] = [id(kernel), index, numbers]
    for tensor in tensors:
        pointers |= tensor.data_ptr()
        key.append(tensor.dtype)
    key += options.values()
    aligned = pointers % 16 == 0  # a kernel is compiled for aligned pointers, or not
    known = _compiled.get(tuple(key)) if aligned else None
    if known is not None:
        run, function, metadata, constants = known
        stream = torch._C._cuda_getCurrentRawStream(index)
        run(*(*grid, 1, 1)[:3], stream, function, metadata, None, None, None, *tensors, *numbers, *constants)
        return
    compiled = kernel[grid](*tensors, *numbers, **options)
    if aligned and hasattr(compiled, "packed_metadata"):
        if len(_compiled) >= _MOST_COMPILED:  # batches of ever new lengths
            _compiled.clear()
        constants = [options[name] for name in kernel.arg_names[len(tensors) + len(numbers) :]]
        _compiled[tuple(key)] = compiled.run, compiled.function, compiled.packed_metadata, constants


@functools.cache
def _processors(index: int) -> int:
    return torch.cuda.get_device_properties(index).multi_processor_count


def _ceil(a: int, b: int) -> int:  # Triton's own are made for use in kernels, and slow
    return -(-a // b)


def _power_of_2(n: int) -> int:
    """The least that is not below n."""
    return 1 << (n - 1).bit_length()
