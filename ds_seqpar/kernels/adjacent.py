"""Tensors that lie side by side in memory, as one."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

__all__ = ["joined", "lay_side_by_side", "parted", "reshaped"]


def joined(parts: Sequence[Tensor], dim: int) -> Tensor | None:
    """2-D `parts` as one tensor along `dim` without a copy, if they follow one another in one storage; otherwise None."""
    first = parts[0]
    if len(parts) < 2 or first.dim() != 2:
        return None
    strides, others, at, total = first.stride(), first.shape[1 - dim], first.storage_offset(), 0
    if strides[1] != 1:
        return None
    storage = first.untyped_storage().data_ptr()
    for part in parts:
        shape = part.shape
        if part.storage_offset() != at or len(shape) != 2 or shape[1 - dim] != others or part.stride() != strides:
            return None
        if part.dtype != first.dtype or part.untyped_storage().data_ptr() != storage:
            return None
        at += shape[dim] * strides[dim]
        total += shape[dim]
    if dim == 1 and total > strides[0]:
        return None
    whole = (total, others) if dim == 0 else (others, total)
    return torch.as_strided(first.detach(), whole, strides, first.storage_offset())


def parted(whole: Tensor, widths: Sequence[int], lead: tuple[int, ...] | None = None) -> list[Tensor]:
    """Columns of `whole` [n, sum(widths)] as tensors of their own over its memory: no views, so each may be changed in place.

    `lead`: what n is made of, such as (b, s), which the parts' shapes then begin with.
    """
    lead = (whole.shape[0],) if lead is None else lead
    row = whole.stride(0)
    strides = [row * math.prod(lead[i + 1 :]) for i in range(len(lead))]
    parts, start = [], 0
    for width in widths:
        shape, offset = (*lead, width), whole.storage_offset() + start
        if type(whole) is FakeTensor:  # which never let go of a storage that was set
            parts.append(whole.as_strided(shape, (*strides, 1), offset))
        else:
            parts.append(whole.new_empty(0).set_(whole.untyped_storage(), offset, shape, (*strides, 1)))
        start += width
    return parts


def reshaped(x: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Contiguous x, which nobody else has, in another shape: itself, no view."""
    if tuple(x.shape) == shape:
        return x
    return x.as_strided_(shape, [math.prod(shape[i + 1 :]) for i in range(len(shape))])


def lay_side_by_side(parameters: Sequence[nn.Parameter]) -> None:
    """Moves matrices of one width into one storage, in this order, so that they are `joined` without a copy; others stay."""
    first = parameters[0]
    alike = all(
        p.dim() == 2 and p.dtype == first.dtype and p.device == first.device and p.shape[1] == first.shape[1]
        for p in parameters
    )
    distinct = len({id(p) for p in parameters}) == len(parameters) > 1
    held = not any(p.is_meta or p.numel() == 0 or hasattr(p, "ds_id") for p in parameters)
    if not (alike and distinct and held) or joined([p.data for p in parameters], 0) is not None:
        return
    whole = torch.cat([p.data for p in parameters])
    for parameter, rows in zip(parameters, whole.split([p.shape[0] for p in parameters]), strict=True):
        parameter.data = rows
