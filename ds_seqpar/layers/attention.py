"""Which of scaled_dot_product_attention's kernels runs: the fastest that the user has not switched off."""

from __future__ import annotations

import functools
from contextlib import AbstractContextManager, nullcontext

import torch
from torch.backends import cuda
from torch.nn.attention import SDPBackend, sdpa_kernel

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
    enabled = [
        (SDPBackend.CUDNN_ATTENTION, cuda.cudnn_sdp_enabled()),
        (SDPBackend.FLASH_ATTENTION, cuda.flash_sdp_enabled()),
        (SDPBackend.EFFICIENT_ATTENTION, cuda.mem_efficient_sdp_enabled()),
        (SDPBackend.MATH, cuda.math_sdp_enabled()),
    ]
    return sdpa_kernel([backend for backend, on in enabled if on], set_priority=True)
