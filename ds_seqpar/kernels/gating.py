"""act(gate) * up and its gradients, each in one pass; the product is made again in backward instead of being kept.

Legend: T tokens, I_r this rank's part of the intermediate size.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import gelu, silu

from .adjacent import parted
from .dispatch import fused_kernels, runs_fused

__all__ = ["Activation", "gated", "gated_backward", "known_activation"]

Activation = Callable[[Tensor], Tensor]

_KNOWN: dict[str, Activation] = {
    "silu": silu,
    "gelu": gelu,
    "gelu_tanh": lambda x: gelu(x, approximate="tanh"),
}


def known_activation(act: Activation) -> str | None:
    """The name under which the kernels know `act`, found by comparing values in fp64; None if they do not know it."""
    x = torch.linspace(-8, 8, 1025, dtype=torch.float64)
    with torch.no_grad():
        values = act(x)
    for name, known in _KNOWN.items():
        if isinstance(values, Tensor) and values.shape == x.shape and torch.allclose(values, known(x), 1e-12, 1e-12):
            return name
    return None


def gated(gate: Tensor, up: Tensor, act: str) -> Tensor:
    """act(gate) * up for gate, up [T, I_r] (rows may be strided) -> [T, I_r]; fp32 arithmetic on GPUs."""
    if not runs_fused(gate):
        return _KNOWN[act](gate) * up
    return fused_kernels().gated(gate, up, act)  # type: ignore[no-any-return]


def gated_backward(dproduct: Tensor, gate: Tensor, up: Tensor, act: str) -> tuple[Tensor, Tensor, Tensor]:
    """(dgate, dup, act(gate) * up), each [T, I_r]; the first two side by side in memory. `dproduct` may be overwritten."""
    if runs_fused(gate):
        return fused_kernels().gated_backward(dproduct, gate, up, act)  # type: ignore[no-any-return]
    with torch.enable_grad():
        gate, up = gate.detach().requires_grad_(), up.detach().requires_grad_()
        product = _KNOWN[act](gate) * up
    grads = torch.autograd.grad(product, (gate, up), dproduct)
    dgate, dup = parted(torch.cat(grads, dim=-1), [gate.shape[-1]] * 2)
    return dgate, dup, product.detach()
