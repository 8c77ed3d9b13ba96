"""Which of scaled_dot_product_attention's kernels runs: the fastest that the user has not switched off."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from torch.nn.attention import SDPBackend

__all__ = ["LEAST_TOKENS_FOR_CUDNN", "fastest_attention", "prefers_cudnn"]

LEAST_TOKENS_FOR_CUDNN = 2048  # cuDNN builds a plan for every new length, which short sequences do not earn back


@functools.cache
def prefers_cudnn(device_index: int) -> bool:
    """True on GPUs (Hopper and newer data-centre parts) where cuDNN's kernel is the fastest of SDPA's."""
    major, minor = torch.cuda.get_device_capability(device_index)
    return torch.backends.cudnn.is_available() and (major, minor) in ((9, 0), (10, 0), (10, 3))


def fastest_attention(device: torch.device, tokens: int) -> AbstractContextManager[None]:
    """While it is entered, SDPA tries cuDNN's kernel first, then the others in torch's order.

    Kernels that the user switched off stay off; with deterministic algorithms nothing changes.
    """
    if device.type != "cuda" or tokens < LEAST_TOKENS_FOR_CUDNN or torch.are_deterministic_algorithms_enabled():
        return nullcontext()
    if not prefers_cudnn(device.index if device.index is not None else torch.cuda.current_device()):
        return nullcontext()
    return _cudnn_first()


@contextmanager
def _cudnn_first() -> Iterator[None]:
    # torch's own sdpa_kernel(set_priority=True) forgets the order of kernels that an outer sdpa_kernel switched off.
    before = torch._C._get_sdp_priority_order()
    cudnn = int(SDPBackend.CUDNN_ATTENTION)  # type: ignore[call-overload]
    torch._C._set_sdp_priority_order([cudnn, *(kernel for kernel in before if kernel != cudnn)])
    try:
        yield
    finally:
        torch._C._set_sdp_priority_order(before)
