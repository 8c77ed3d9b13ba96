"""Measures this machine's rates in about a minute: products, attention, elementwise traffic, an optimizer's step, peer copies, the host.

A training step runs its GPU at the power limit, where it is slower than in a short burst, so each product is timed over a stretch.
What one process cannot measure (what of a transfer stays exposed, links between nodes) is taken from the H200's rates, and the
`source` of the result says so.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from ..layers.attention import fastest_attention
from .host import measure_host
from .memory import Zero
from .optimizer import step_bytes
from .rates import Rates, load_rates

__all__ = ["calibrate"]


@dataclass(frozen=True)
class _Sizes:
    tokens: tuple[int, ...]
    hidden: int
    intermediate: int
    heads: int
    parameters: int
    traffic: int  # elements
    seconds: float  # a figure


_GPU = _Sizes((8192, 32768), 4096, 7168, 16, 2**28, 2**28, 1.5)
_CPU = _Sizes((256, 1024), 128, 256, 2, 2**18, 2**18, 0.05)


class _Clock:
    def __init__(self, device: torch.device, seconds: float) -> None:
        self.device, self.seconds = device, seconds

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def per_call(self, function: Callable[[], object]) -> float:
        """Seconds a call over a stretch of calls, the first ones left out."""
        for _ in range(3):
            function()
        self._wait()
        calls, begin = 0, time.perf_counter()
        while (spent := time.perf_counter() - begin) < self.seconds:
            for _ in range(4):
                function()
            calls += 4
            self._wait()
        return spent / calls if calls else float("inf")


def calibrate(device: torch.device | None = None) -> Rates:
    """The rates of `device` (the first GPU, or the CPU)."""
    device = device or torch.device("cuda:0" if torch.cuda.is_available() else "cpu")
    on_gpu = device.type == "cuda"
    host = measure_host(on_gpu)  # in a process of its own, whose memory on the GPU goes with it
    sizes, dtype = (_GPU, torch.bfloat16) if on_gpu else (_CPU, torch.float32)
    clock, known = _Clock(device, sizes.seconds), load_rates("h200")
    attention = [_attention(clock, sizes, tokens, dtype) for tokens in sizes.tokens]
    peer = _peer(clock, dtype) if on_gpu and torch.cuda.device_count() > 1 else None
    name = torch.cuda.get_device_name(device) if on_gpu else "CPU"
    measured = ["products", "attention", "traffic", *(["peer copies"] if peer else []), "optimizer"]
    taken = [
        *([] if peer else ["peer copies"]),
        "exposed transfers",
        "links between nodes",
        "links to the host's memory",
    ]
    (measured if host else taken).append("the host's launches")
    return Rates(
        name=name,
        source=f"`python -m ds_seqpar calibrate` with torch {torch.__version__}: {', '.join(measured)}; "
        f"{', '.join(taken)} and what DeepSpeed does for a parameter are the H200's",
        gemm_tflops=tuple((tokens, _gemm(clock, sizes, tokens, dtype)) for tokens in sizes.tokens),
        attention_forward_tflops=tuple(zip(sizes.tokens, (forward for forward, _ in attention), strict=True)),
        attention_backward_tflops=tuple(zip(sizes.tokens, (backward for _, backward in attention), strict=True)),
        traffic_gb_per_s=_traffic(clock, sizes, dtype),
        peer_gb_per_s=peer or known.peer_gb_per_s,
        exposed_us_per_transfer=known.exposed_us_per_transfer,
        optimizer_gb_per_s=_optimizer(clock, sizes, dtype),
        node_gb_per_s=known.node_gb_per_s,
        host_gb_per_s=known.host_gb_per_s,
        host_engine_us=known.host_engine_us,
        **(host or {name: getattr(known, name) for name in ("host_forward_us", "host_backward_us", "host_plain_us")}),
    )


def _random(clock: _Clock, *shape: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(shape, device=clock.device, dtype=dtype)


def _gemm(clock: _Clock, sizes: _Sizes, tokens: int, dtype: torch.dtype) -> float:
    """TFLOP/s of a linear's three products, one after another, as a step has them."""
    x, w, dy = (
        _random(clock, *shape, dtype=dtype)
        for shape in ((tokens, sizes.hidden), (sizes.intermediate, sizes.hidden), (tokens, sizes.intermediate))
    )
    seconds = clock.per_call(lambda: (x @ w.t(), dy @ w, dy.t() @ x))
    return 6e-12 * tokens * sizes.hidden * sizes.intermediate / seconds


def _attention(clock: _Clock, sizes: _Sizes, tokens: int, dtype: torch.dtype) -> tuple[float, float]:
    """TFLOP/s of causal attention, forward and backward, its square counted half."""
    width = 128 if dtype is torch.bfloat16 else 32
    q, k, v = (
        _random(clock, 1, tokens, sizes.heads, width, dtype=dtype).transpose(1, 2).requires_grad_() for _ in range(3)
    )
    with fastest_attention(clock.device, tokens):
        forward = clock.per_call(
            lambda: scaled_dot_product_attention(q.detach(), k.detach(), v.detach(), is_causal=True)
        )
        out = scaled_dot_product_attention(q, k, v, is_causal=True)
        dy = torch.randn_like(out)
        backward = clock.per_call(lambda: torch.autograd.grad(out, (q, k, v), dy, retain_graph=True))
    flops = 2e-12 * tokens**2 * sizes.heads * width
    return flops / forward, 2.5 * flops / backward


def _traffic(clock: _Clock, sizes: _Sizes, dtype: torch.dtype) -> float:
    """GB/s of what norms, activations and residual adds do: elementwise operations over large tensors."""
    a, b, c = (_random(clock, sizes.traffic // 4096 or 1, 4096, dtype=dtype) for _ in range(3))
    statistics = torch.empty(a.shape[0], 1, device=clock.device, dtype=torch.float32)

    def run() -> None:
        torch.add(a, b, out=c)
        torch.mul(c, b, out=a)
        statistics.copy_(a.amax(-1, keepdim=True))

    return 7 * a.nbytes / clock.per_call(run) / 1e9


def _optimizer(clock: _Clock, sizes: _Sizes, dtype: torch.dtype) -> float:
    """GB/s of what ZeRO 1 does in a step: extremes, norm, gradients flattened and widened, AdamW on masters, weights written back."""
    weights = _random(clock, sizes.parameters, dtype=dtype)
    master, gradient = weights.float(), torch.zeros_like(weights)
    adamw = torch.optim.AdamW([master], lr=1e-6, fused=clock.device.type == "cuda")

    def step() -> None:
        gradient.amax(), gradient.amin()
        torch.linalg.vector_norm(gradient.double())
        master.grad = gradient.clone().float()
        adamw.step()
        weights.copy_(master)
        master.grad = None

    return sizes.parameters * step_bytes(Zero(stage=1), weights.element_size()) / clock.per_call(step) / 1e9


def _peer(clock: _Clock, dtype: torch.dtype) -> float | None:
    """GB/s of a copy from another GPU; None without peer access."""
    if not torch.cuda.can_device_access_peer(0, 1):
        return None
    mine = torch.empty(2**27, device="cuda:0", dtype=dtype)
    theirs = torch.empty_like(mine, device="cuda:1")
    return mine.nbytes / clock.per_call(lambda: mine.copy_(theirs)) / 1e9
