"""Rotary embedding of sharded attention blocks by the fused kernel.

Model code calls a function of its own module, `apply_rotary_pos_emb`; a wrapper stands in for it that takes the kernel while a
sharded block runs, and calls the original at any other time, so other models in the process are not touched.
"""

from __future__ import annotations

import functools
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from ..kernels.dispatch import is_plain
from ..kernels.rotary import rotate

__all__ = ["fuse_rotary", "within_sharded_block"]

_NAME = "apply_rotary_pos_emb"
_running = threading.local()


@contextmanager
def within_sharded_block() -> Iterator[None]:
    """While a sharded block runs, in this thread."""
    before, _running.depth = getattr(_running, "depth", 0), getattr(_running, "depth", 0) + 1
    try:
        yield
    finally:
        _running.depth = before


def fuse_rotary(module_name: str) -> bool:
    """Puts the wrapper into a modeling module if its function is measured to be the half-split rotation of q and k."""
    module = sys.modules[module_name]
    original = getattr(module, _NAME, None)
    if original is None or getattr(original, "_seqpar", False):
        return original is not None
    if not _is_half_split(original):
        return False

    @functools.wraps(original)
    def fused(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, *args: Any, **kwargs: Any) -> Any:
        if args or kwargs or not getattr(_running, "depth", 0) or not all(_fits(x, cos, sin) for x in (q, k)):
            return original(q, k, cos, sin, *args, **kwargs)
        return rotate(cos, sin, q, k)

    fused._seqpar = True  # type: ignore[attr-defined]
    setattr(module, _NAME, fused)
    return True


def _fits(x: Tensor, cos: Tensor, sin: Tensor) -> bool:
    """x [b, n, s, d] with tables [b or 1, s, d] of its dtype that get no gradient."""
    alike = cos.shape == sin.shape and cos.dtype == sin.dtype == x.dtype and all(map(is_plain, (x, cos, sin)))
    fits = x.dim() == 4 and cos.dim() == 3 and cos.shape[0] in (1, x.shape[0]) and cos.shape[1:] == x.shape[2:]
    return alike and fits and not (cos.requires_grad or sin.requires_grad) and x.shape[-1] % 2 == 0


def _is_half_split(function: Callable[..., Any]) -> bool:
    generator = torch.Generator().manual_seed(0)
    q, k, cos, sin = (
        torch.randn(shape, generator=generator) for shape in ((2, 3, 5, 8), (2, 1, 5, 8), (2, 5, 8), (2, 5, 8))
    )
    try:
        result = function(q, k, cos, sin)
        return len(result) == 2 and all(
            torch.allclose(y, x, 1e-5, 1e-6) for x, y in zip(rotate(cos, sin, q, k), result, strict=True)
        )
    except (RuntimeError, TypeError, ValueError, AttributeError):
        return False
