"""How two tensors that should be equal are compared, and by how much rounding alone may part them.

Legend: eps the dtype's spacing at 1, K the longest sum that a value goes through.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..checkpoint.gathering import gather_parameter

__all__ = ["Rounding", "checksum", "full_gradients", "relative_error", "wider"]

_CHUNK = 2**18  # what fits into a core's cache as int64
_ODD = 0x9E3779B97F4A7C15 - 2**64  # an odd 64-bit constant, as the signed number that it is in int64


def full_gradients(model: Any) -> dict[str, Tensor | None]:
    """Every parameter's whole gradient by name, on every rank. Collective over the tensor-parallel group."""
    state = model.seqpar
    gradients: dict[str, Tensor | None] = {}
    for name, parameter in model.named_parameters():
        cut, grad = state.entries[id(parameter)].cut, parameter.grad
        whole = grad if cut is None or grad is None else gather_parameter(grad, cut, state.groups.tp_group)
        gradients[name] = whole
    return gradients


def relative_error(mine: Tensor | None, theirs: Tensor | None) -> float:
    """|mine - theirs| / |theirs|; infinite if only one of them is there or one is not finite where the other is."""
    if mine is None or theirs is None:
        return 0.0 if mine is theirs else math.inf
    if not bool(torch.isfinite(theirs).all()):
        return 0.0 if torch.equal(mine.isnan(), theirs.isnan()) else math.inf
    error = float((mine.double() - theirs.double()).norm() / theirs.double().norm().clamp_min(1e-9))
    return error if error == error else math.inf


def wider(dtype: torch.dtype) -> torch.dtype | None:
    """The dtype in which what is meant in `dtype` can be computed without its rounding; None for float64."""
    return {torch.float64: None, torch.float32: torch.float64}.get(dtype, torch.float32)


@dataclass(frozen=True)
class Rounding:
    """What rounding may do to a value that both sides compute in `dtype` from the same numbers.

    relative = ROUNDINGS * eps(dtype) + 4 * eps(float32) * sqrt(K): a layer rounds a value to its dtype a few times, and sums K
    products in float32. float64 counts as float32: norms, rotary embeddings and softmax of many models compute in that.
    Where the reference was also computed in a wider dtype, its own distance from that is known, and UNLUCKY times as much is
    allowed beside it: sums that cancel (a key's bias) have no relative accuracy on either side.
    """

    dtype: torch.dtype
    longest_sum: int

    ROUNDINGS = 8
    UNLUCKY = 8

    @property
    def relative(self) -> float:
        """Allowed, relative to the reference's norm."""
        single = torch.finfo(torch.float32).eps
        own = max(torch.finfo(self.dtype).eps, single)
        return self.ROUNDINGS * own + 4 * single * math.sqrt(self.longest_sum)

    def allowed(self, size: float, own_error: float = 0.0, largest: float = 0.0) -> float:
        """Allowed distance from a reference of norm `size`, whose own error is `own_error`, among values of norm `largest`."""
        return self.relative * (size + 1e-3 * largest) + self.UNLUCKY * own_error

    def __str__(self) -> str:
        name, eps = str(self.dtype).removeprefix("torch."), torch.finfo(self.dtype).eps
        return (
            f"{name}: {self.relative:.1e} relative ({self.ROUNDINGS} roundings of {eps:.1e}, sums of up to {self.longest_sum} "
            f"products), and {self.UNLUCKY} x what the unsharded layer itself loses by rounding"
        )


def checksum(x: Tensor, start: int = 0) -> Tensor:
    """A number [] int64 of the bits of x, on its device; that of parts from `start` on adds up to that of the whole, modulo 2^64.

    Each position weighs an odd number of its own, so that any one value that differs, and two that change places, show.
    """
    flat = _bits(x)
    total = torch.zeros((), dtype=torch.int64, device=x.device)
    for offset, part in _chunks(flat):
        places = torch.arange(start + offset, start + offset + part.numel(), dtype=torch.int64, device=x.device)
        total += (part.to(torch.int64) * ((places * _ODD) | 1)).sum()
    return total


def _bits(x: Tensor) -> Tensor:
    flat = x.detach().reshape(-1)
    if flat.dtype is torch.bool or not flat.dtype.is_floating_point:
        return flat
    return flat.view({1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[flat.element_size()])


def _chunks(flat: Tensor) -> Iterator[tuple[int, Tensor]]:
    for offset in range(0, flat.numel(), _CHUNK):
        yield offset, flat[offset : offset + _CHUNK]
