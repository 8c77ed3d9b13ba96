"""Where the Triton kernels run. Facts of the machine only, so that all ranks decide alike."""

from __future__ import annotations

import functools
import importlib.util
import os

from torch import Tensor

__all__ = ["runs_triton"]


@functools.cache
def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


def runs_triton(x: Tensor) -> bool:
    """True for tensors on a GPU where Triton is installed, and for any tensor under Triton's interpreter (tests)."""
    return _has_triton() and (x.is_cuda or os.environ.get("TRITON_INTERPRET") == "1")
