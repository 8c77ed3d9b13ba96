"""Parameters whose gradient on one rank is a part of the sum that is meant.

A leaf tensor hook runs once a backward pass, on the gradient of that pass, before anything accumulates or reduces it:
that is what makes gradient accumulation and every ZeRO stage right. Post-accumulate hooks would sum the running total again.
Parameters whose module asks for them by `summed` are summed by an autograd edge instead, all of a forward in one all-reduce.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd import Function
from torch.autograd.function import once_differentiable
from torch.distributed import ProcessGroup
from torch.utils.hooks import RemovableHandle

__all__ = ["PartialGradients"]


class _SumGradients(Function):
    """Identity of n parameters whose gradients are summed over the group, in fp32, in one all-reduce."""

    @staticmethod
    def forward(ctx: Any, owner: PartialGradients, *parameters: Tensor) -> tuple[Tensor, ...]:
        ctx.owner, ctx.parameters = owner, parameters
        ctx.set_materialize_grads(False)  # an unused parameter keeps no gradient, as without us
        return tuple(p.view_as(p) for p in parameters)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        there = [grad for grad in grads if grad is not None]
        if not there:
            return (None, *grads)
        if ctx.owner.observer is not None:
            for parameter, grad in zip(ctx.parameters, grads, strict=True):
                if grad is not None:
                    ctx.owner.observer(parameter, grad)
        joint = torch.cat([grad.reshape(-1) for grad in there])  # of the widest dtype among them
        total = joint.to(torch.promote_types(joint.dtype, torch.float32))
        dist.all_reduce(total, group=ctx.owner.group)
        sums = iter(total.to(joint.dtype).split([grad.numel() for grad in there]))
        return (None, *(None if grad is None else next(sums).view(grad.shape).to(grad.dtype) for grad in grads))


class PartialGradients:
    """Sums the gradients of registered parameters over the tensor-parallel group, in fp32, once a backward pass.

    A parameter that is frozen now and made trainable later is caught by `arm()`, which every forward calls.
    `observer`, where it is set, is shown every parameter with the gradient that this rank brings to its sum.
    """

    observer: Callable[[nn.Parameter, Tensor], None] | None = None

    def __init__(self, group: ProcessGroup) -> None:
        self.group = group
        self._waiting: list[tuple[nn.Parameter, int, int]] = []
        self._hooks: dict[int, RemovableHandle] = {}
        self._taken_over: list[nn.Parameter] = []

    def add(self, parameter: nn.Parameter, slot: int = 0, slots: int = 1) -> None:
        """Registers a parameter. With `slots` > 1 only the ranks of the same `slot` hold copies and are summed."""
        self._waiting.append((parameter, slot, slots))
        self.arm()

    def arm(self) -> None:
        """Puts the hook on every registered parameter that has become trainable."""
        frozen = []
        for parameter, slot, slots in self._waiting:
            if parameter.requires_grad:
                self._hooks[id(parameter)] = parameter.register_hook(
                    lambda grad, parameter=parameter, slot=slot, slots=slots: self._sum(parameter, grad, slot, slots)
                )
            else:
                frozen.append((parameter, slot, slots))
        self._waiting = frozen

    def take_over(self, parameter: nn.Parameter) -> bool:
        """Whether `parameter` is registered; if so its module promises to use `summed(parameter)` and nothing else."""
        handle = self._hooks.pop(id(parameter), None)
        waiting = [entry for entry in self._waiting if entry[0] is not parameter]
        if self.sums_uses_of(parameter):
            return True  # shared by two modules
        found = handle is not None or len(waiting) < len(self._waiting)
        self._waiting = waiting
        if handle is not None:
            handle.remove()
        if found:
            self._taken_over.append(parameter)
        return found

    def sums_uses_of(self, parameter: nn.Parameter) -> bool:
        """Whether modules sum the gradients of their own use of `parameter`, which was taken over."""
        return any(p is parameter for p in self._taken_over)

    def together(self) -> dict[int, Tensor]:
        """id of a parameter -> the same values, for one forward; all gradients are summed in one all-reduce.

        Leaves out what ZeRO-3 holds in parts, whose values are there only while its module runs.
        """
        here = [p for p in self._taken_over if p.requires_grad and not hasattr(p, "ds_id")]
        if not here or not torch.is_grad_enabled():
            return {}
        return {id(p): x for p, x in zip(here, _SumGradients.apply(self, *here), strict=True)}  # type: ignore[no-untyped-call]

    def summed(self, parameter: nn.Parameter, together: Mapping[int, Tensor] | None) -> Tensor:
        """`parameter` as a module that took it over must use it: with the sum of its gradients over the group."""
        if together is not None and id(parameter) in together:
            return together[id(parameter)]
        if not (parameter.requires_grad and torch.is_grad_enabled()):
            return parameter
        return _SumGradients.apply(self, parameter)[0]  # type: ignore[no-any-return, no-untyped-call]

    def all_summed(self, parameters: Sequence[nn.Parameter], together: Mapping[int, Tensor] | None) -> list[Tensor]:
        """`summed` of each of a module's parameters, in one all-reduce where `together` does not have them."""
        ready = dict(together or {})
        trained = [p for p in parameters if p.requires_grad and id(p) not in ready]
        if trained:
            ready |= {id(p): x for p, x in zip(trained, _SumGradients.apply(self, *trained), strict=True)}  # type: ignore[no-untyped-call]
        return [ready.get(id(p), p) for p in parameters]

    def _sum(self, parameter: nn.Parameter, grad: Tensor, slot: int, slots: int) -> Tensor:
        if self.observer is not None:
            self.observer(parameter, grad)
        if slots == 1:
            total = grad.to(torch.float32) if grad.dtype in (torch.bfloat16, torch.float16) else grad.clone()
            total = total.contiguous()
            dist.all_reduce(total, group=self.group)
            return total.to(grad.dtype)
        # One all-reduce in which every group of copies has a slot of its own: no communicator for each of them.
        wide = torch.promote_types(grad.dtype, torch.float32)
        buffer = grad.new_zeros((slots, *grad.shape), dtype=wide)
        buffer[slot] = grad
        dist.all_reduce(buffer, group=self.group)
        return buffer[slot].to(grad.dtype)
