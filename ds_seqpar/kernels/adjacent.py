"""Tensors that lie side by side in memory, as one."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["joined", "parted"]


def joined(parts: Sequence[Tensor], dim: int) -> Tensor | None:
    """2-D `parts` as one tensor along `dim` without a copy, if they follow one another in one storage; otherwise None."""
    first = parts[0]
    if len(parts) < 2 or any(p.dim() != 2 or p.stride() != first.stride() or p.stride(1) != 1 for p in parts):
        return None
    if any(p.shape[1 - dim] != first.shape[1 - dim] or p.dtype != first.dtype for p in parts):
        return None
    at = first.storage_offset()
    for part in parts:
        if part.untyped_storage().data_ptr() != first.untyped_storage().data_ptr() or part.storage_offset() != at:
            return None
        at += part.shape[dim] * part.stride(dim)
    shape = list(first.shape)
    shape[dim] = sum(p.shape[dim] for p in parts)
    if dim == 1 and shape[1] > first.stride(0):
        return None
    return torch.as_strided(first.detach(), shape, first.stride(), first.storage_offset())


def parted(whole: Tensor, widths: Sequence[int]) -> list[Tensor]:
    """Columns of `whole` [n, sum(widths)] as tensors of their own over its memory: no views, so each may be changed in place."""
    parts, start = [], 0
    for width in widths:
        part = whole.new_empty(0)
        part.set_(whole.untyped_storage(), whole.storage_offset() + start, (whole.shape[0], width), whole.stride())
        parts.append(part)
        start += width
    return parts
