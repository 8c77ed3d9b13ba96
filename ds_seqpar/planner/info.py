"""What this machine has, what runs fused on it, and what falls back, with the reason."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import platform
from typing import Any

import torch

from ..comm.symmetric import SymmetricMemory
from ..config import SeqParConfig
from ..hf import describe, planned_config, planned_model
from ..inject import inject
from ..layers.attention import LEAST_TOKENS_FOR_CUDNN, prefers_cudnn
from .rates import cache_file
from .stand_ins import fake_groups
from .step import without_memory

__all__ = ["machine", "model_report"]

PACKAGES = (
    "ds_seqpar",
    "torch",
    "transformers",
    "deepspeed",
    "accelerate",
    "peft",
    "trl",
    "triton",
    "rich",
    "matplotlib",
)


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def machine() -> list[str]:
    """Lines about versions, GPUs, their links, kernels and transport."""
    lines = [f"python {platform.python_version()} on {platform.platform()}"]
    lines += [f"{package:14s} {_version(package)}" for package in PACKAGES]
    count = torch.cuda.device_count()
    if not count:
        why = "this build of torch has no CUDA" if torch.version.cuda is None else "torch finds none"
        lines += [
            f"GPUs           none ({why}): runs on the CPU over gloo",
            "fused          nothing: torch's own operations on the CPU",
        ]
        lines.append("transport      collectives on their own stream (the group runs on gloo)")
    else:
        lines += _gpus(count) + _kernels() + [_transport(count)]
    rates = cache_file()
    lines.append(
        f"rates          {rates if rates.exists() else 'shipped H200 (python -m ds_seqpar calibrate measures yours)'}"
    )
    return lines


def _gpus(count: int) -> list[str]:
    lines = []
    for i in range(count):
        properties = torch.cuda.get_device_properties(i)
        reached = [j for j in range(count) if j != i and torch.cuda.can_device_access_peer(i, j)]
        peers = f"reads GPUs {reached}" if reached else "reads no other GPU"
        lines.append(f"GPU {i:<10d} {properties.name}, {properties.total_memory / 2**30:.0f} GiB, {peers}")
    return lines


def _kernels() -> list[str]:
    triton = importlib.util.find_spec("triton") is not None
    gated = "Triton kernels" if triton else "torch's own operations (Triton is not installed)"
    cudnn = prefers_cudnn(0)
    attention = (
        f"cuDNN's kernel first, from {LEAST_TOKENS_FOR_CUDNN} tokens"
        if cudnn
        else "torch's order (cuDNN's is first on Hopper and newer)"
    )
    return [
        f"fused          gating, rotary, cross-entropy: {gated}",
        "fused          RMS norms: torch's",
        f"attention      SDPA: {attention}",
    ]


def _transport(count: int) -> str:
    if count < 2:
        return "transport      nothing travels on one GPU"
    if not SymmetricMemory.is_available():
        return "transport      collectives on their own stream (this torch has no symmetric memory)"
    if not all(torch.cuda.can_device_access_peer(0, j) for j in range(1, count)):
        return "transport      collectives on their own stream (the GPUs have no peer access)"
    return "transport      copy engines over the GPUs' peer memory"


def model_report(source: str, sizes: dict[str, Any], tp_size: int) -> str:
    """The Report of a model's injection, from its config alone: what is cut, fused, left, and why."""
    config = planned_config(source, sizes)
    with fake_groups(tp_size) as groups:
        model = planned_model(config, torch.bfloat16)
        without_memory(model)
        return str(inject(model, describe(model), SeqParConfig(tp_size=tp_size), groups, has_values=False))
