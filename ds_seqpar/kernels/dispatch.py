"""Where the fused kernels run. Facts of the machine only, so that all ranks decide alike."""

from __future__ import annotations

import functools
import importlib
import importlib.util
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

__all__ = ["SUMMED_IN_FP32", "fused_kernels", "is_plain", "runs_fused", "shapes_only"]

SUMMED_IN_FP32 = (torch.bfloat16, torch.float16, torch.float32)
"""What the fused kernels that sum may be given: float64 would lose in them."""

_shapes_only = False


@functools.cache
def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


def runs_fused(x: Tensor) -> bool:
    """True for tensors on a GPU where Triton is installed, and for any tensor under Triton's interpreter (tests) or `shapes_only`."""
    return _shapes_only or (_has_triton() and (x.is_cuda or os.environ.get("TRITON_INTERPRET") == "1"))


def fused_kernels() -> Any:
    """The module of fused kernels: Triton's, which is imported only where it runs, or what stands in for it in `shapes_only`."""
    return importlib.import_module(f"{__package__}.{'shapes' if _shapes_only else 'triton_kernels'}")


@contextmanager
def shapes_only() -> Iterator[None]:
    """While it is entered, fused kernels read and write as many bytes as ever but compute nothing: for fake tensors."""
    global _shapes_only
    before, _shapes_only = _shapes_only, True
    try:
        yield
    finally:
        _shapes_only = before


def is_plain(x: object) -> bool:
    """True for a tensor that is its values and nothing more: no handle, no other subclass but a fake tensor."""
    return type(x) is Tensor or type(x) is FakeTensor
