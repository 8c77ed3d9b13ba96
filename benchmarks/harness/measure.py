"""Times and memory of one case on this rank."""

from __future__ import annotations

import contextlib
import gc
import time
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from .case import Case
from .workload import Workload

__all__ = ["WARMUP_STEPS", "attention_kernel", "device_of_rank", "measure"]

WARMUP_STEPS, TIMED_STEPS = 2, 5
GIB = 2.0**30


def device_of_rank() -> torch.device:
    """This rank's GPU, or the CPU."""
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")


def attention_kernel(name: str) -> contextlib.AbstractContextManager[Any]:
    """Allows SDPA one kernel only; with `default` torch picks."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    kernels = {"flash": SDPBackend.FLASH_ATTENTION, "cudnn": SDPBackend.CUDNN_ATTENTION}
    return sdpa_kernel(kernels[name]) if name in kernels else contextlib.nullcontext()


class _Clock:
    """Marks on the GPU's time line; on the CPU the wall clock."""

    def __init__(self, device: torch.device) -> None:
        self.on_gpu, self.marks = device.type == "cuda", []  # type: ignore[var-annotated]

    def mark(self) -> None:
        if self.on_gpu:
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            self.marks.append(event)
        else:
            self.marks.append(time.perf_counter())

    def milliseconds(self, start: int, end: int) -> float:
        if self.on_gpu:
            return float(self.marks[start].elapsed_time(self.marks[end]))
        return float(self.marks[end] - self.marks[start]) * 1e3


def _median(values: list[float]) -> float:
    return sorted(values)[len(values) // 2]


def _allocated(device: torch.device) -> float:
    return torch.cuda.memory_allocated(device) / GIB if device.type == "cuda" else 0.0


def measure(workload: Workload, case: Case, tokens: Tensor, timed_steps: int = TIMED_STEPS) -> dict[str, Any]:
    """Two steps to warm up, whose losses are kept and of which the second gives the memory; then `timed_steps`.

    Times in ms, the slowest rank's medians; memory in GiB, the largest rank's:
        static  what is allocated after a backward: weights, gradients, optimizer, buffers that stay
        held    allocated after forward minus before
        peak    highest allocation in forward and backward; peak_step with the optimizer too
        outside on the device but not from torch's allocator: CUDA context, NCCL's buffers, symmetric memory
    """
    device = tokens.device
    on_gpu = device.type == "cuda"
    losses: list[float] = []
    memory: dict[str, float] = {}
    for _ in range(WARMUP_STEPS):
        gc.collect()
        before = _allocated(device)
        if on_gpu:
            torch.cuda.reset_peak_memory_stats(device)
        loss = workload.forward(tokens)
        memory["held_gib"] = _allocated(device) - before
        workload.backward(loss)
        losses.append(workload.reported(loss.detach()))
        del loss
        memory["static_gib"] = _allocated(device)
        memory["peak_gib"] = torch.cuda.max_memory_allocated(device) / GIB if on_gpu else 0.0
        workload.step()
        memory["peak_step_gib"] = torch.cuda.max_memory_allocated(device) / GIB if on_gpu else 0.0
    memory["peak_minus_static_gib"] = memory["peak_gib"] - memory["static_gib"]
    clock = _Clock(device)
    if dist.is_initialized():
        dist.barrier()
    if on_gpu:
        torch.cuda.synchronize(device)
    for _ in range(timed_steps):
        clock.mark()
        loss = workload.forward(tokens)
        clock.mark()
        workload.backward(loss)
        del loss
        clock.mark()
        workload.step()
        clock.mark()
    if on_gpu:
        torch.cuda.synchronize(device)
        free, total = torch.cuda.mem_get_info(device)
        memory["outside_gib"] = (total - free - torch.cuda.memory_reserved(device)) / GIB
    starts = [4 * step for step in range(timed_steps)]
    times = {
        "forward_ms": _median([clock.milliseconds(i, i + 1) for i in starts]),
        "fwd_bwd_ms": _median([clock.milliseconds(i, i + 2) for i in starts]),
        "step_ms": _median([clock.milliseconds(i, i + 3) for i in starts]),
    }
    figures = _over_ranks({**times, **memory}, device)
    ranks = dist.get_world_size() if dist.is_initialized() else 1
    seconds = figures["fwd_bwd_ms"] / 1e3
    return {
        "losses": losses,
        **figures,
        "ranks": ranks,
        "sequences": workload.sequences,
        "tokens_per_s_per_gpu": workload.sequences * case.tokens / (figures["step_ms"] / 1e3) / ranks,
        "model_tflops_per_gpu": workload.sequences * case.model_flops() / seconds / ranks / 1e12,
    }


def _over_ranks(figures: dict[str, float], device: torch.device) -> dict[str, float]:
    """The largest of every figure over the ranks."""
    values = torch.tensor(list(figures.values()), dtype=torch.float64, device=device)
    if dist.is_initialized():
        dist.all_reduce(values, op=dist.ReduceOp.MAX)
    return dict(zip(figures, values.tolist(), strict=True))
