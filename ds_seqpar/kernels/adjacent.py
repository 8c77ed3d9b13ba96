"""Tensors that lie side by side in memory, as one."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from .dispatch import fused_kernels, runs_fused

__all__ = ["Room", "copy_rows", "joined", "lay_side_by_side", "parted", "reshaped"]


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
    """First columns of `whole` [n, sum(widths) or more] as tensors of their own over its memory: no views; each may be changed in place.

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


class Room:
    """Columns that nobody uses, behind those in use, of a memory [n, width]: what belongs beside these may be put there.

    Known by their storage, for what passes between two nodes of one graph as views that remember nothing else.
    """

    _MOST = 64
    _known: ClassVar[dict[int, tuple[int, int, int]]] = {}  # storage -> width, address, bytes

    @classmethod
    def offer(cls, whole: Tensor) -> None:
        """Of contiguous whole [n, width]: what begins at its first column and does not reach its last may be added to."""
        if len(cls._known) >= cls._MOST:  # of memory that nobody asked for
            cls._known.clear()
        storage = whole.untyped_storage()
        cls._known[storage._cdata] = whole.shape[1], storage.data_ptr(), storage.nbytes()

    @classmethod
    def beside(cls, *parts: Tensor) -> int | None:
        """The width of the memory that all `parts` lie in, if room beside them was offered. To be asked once."""
        storages = {storage._cdata: storage for storage in (part.untyped_storage() for part in parts)}
        found = [(cls._known.pop(key, None), storage) for key, storage in storages.items()]
        (known, storage), *others = found
        if known is None or others or known[1:] != (storage.data_ptr(), storage.nbytes()):
            return None
        return known[0]

    @classmethod
    def filled(cls, parts: Sequence[Tensor]) -> Tensor | None:
        """2-D `parts` as one tensor along dim 1, the last copied to the room beside the others; None if there is none."""
        first, last = parts[0], parts[-1]
        width = cls.beside(*parts[:-1])
        if width is None or width != first.stride(0) or first.storage_offset() != 0 or first.dtype != last.dtype:
            return None
        others = joined(parts[:-1], 1) if len(parts) > 2 else first
        if others is None or others.shape[1] + last.shape[1] != width or others.stride(1) != 1:
            return None
        whole = torch.as_strided(others.detach(), (others.shape[0], width), (width, 1), 0)
        copy_rows(whole[:, others.shape[1] :], last)
        return whole


def copy_rows(out: Tensor, x: Tensor) -> None:
    """out = x, both [n, w] of one dtype; the rows of either may lie apart."""
    if runs_fused(x) and x.stride(1) == out.stride(1) == 1:
        fused_kernels().copied_rows(out, x)
    else:
        out.copy_(x)


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
