"""Parameters whose gradient on one rank is a part of the sum that is meant.

A leaf tensor hook runs once a backward pass, on the gradient of that pass, before anything accumulates or reduces it:
that is what makes gradient accumulation and every ZeRO stage right. Post-accumulate hooks would sum the running total again.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import ProcessGroup

__all__ = ["PartialGradients"]


class PartialGradients:
    """Sums the gradients of registered parameters over the tensor-parallel group, in fp32, once a backward pass.

    A parameter that is frozen now and made trainable later is caught by `arm()`, which every forward calls.
    """

    def __init__(self, group: ProcessGroup) -> None:
        self._group = group
        self._waiting: list[tuple[nn.Parameter, int, int]] = []

    def add(self, parameter: nn.Parameter, slot: int = 0, slots: int = 1) -> None:
        """Registers a parameter. With `slots` > 1 only the ranks of the same `slot` hold copies and are summed."""
        self._waiting.append((parameter, slot, slots))
        self.arm()

    def arm(self) -> None:
        """Puts the hook on every registered parameter that has become trainable."""
        frozen = []
        for parameter, slot, slots in self._waiting:
            if parameter.requires_grad:
                parameter.register_hook(lambda grad, slot=slot, slots=slots: self._sum(grad, slot, slots))
            else:
                frozen.append((parameter, slot, slots))
        self._waiting = frozen

    def _sum(self, grad: Tensor, slot: int, slots: int) -> Tensor:
        if slots == 1:
            total = grad.to(torch.float32) if grad.dtype in (torch.bfloat16, torch.float16) else grad.clone()
            total = total.contiguous()
            dist.all_reduce(total, group=self._group)
            return total.to(grad.dtype)
        # One all-reduce in which every group of copies has a slot of its own: no communicator for each of them.
        wide = torch.promote_types(grad.dtype, torch.float32)
        buffer = grad.new_zeros((slots, *grad.shape), dtype=wide)
        buffer[slot] = grad
        dist.all_reduce(buffer, group=self._group)
        return buffer[slot].to(grad.dtype)
