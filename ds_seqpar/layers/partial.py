"""Parameters whose gradient on one rank is a part of the sum that is meant.

The sum belongs to a *use*, not to the parameter: while a forward runs, modules hold, in the place of such a parameter, an alias of
it whose gradient an autograd edge sums over the group. What other code makes of the parameter itself (a penalty over all
parameters, a loss of the user's) has its gradient on every rank whole, and nothing is summed; and a tensor that
torch.func.functional_call puts in the parameter's place gets an alias like it. All of a forward are summed in one all-reduce.

What ZeRO-3 holds in parts it finds by the parameter object, so that stays in its place; there a leaf tensor hook sums, once a
backward pass, on the gradient of that pass, before anything accumulates or reduces it. Post-accumulate hooks would sum the running
total again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
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


class _SumOfCopies(Function):
    """Identity of a parameter of which only the ranks of the same `slot` hold copies; theirs are summed, in fp32."""

    @staticmethod
    def forward(ctx: Any, owner: PartialGradients, slot: int, slots: int, parameter: Tensor) -> Tensor:
        ctx.owner, ctx.parameter, ctx.at = owner, parameter, (slot, slots)
        return parameter.view_as(parameter)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[None, None, None, Tensor]:
        return None, None, None, ctx.owner.total(ctx.parameter, grad, *ctx.at)


@dataclass(frozen=True)
class _Place:
    """Where a module holds a registered parameter: `held[key]`."""

    held: dict[str, Any]
    key: str
    slot: int
    slots: int


class PartialGradients:
    """Sums the gradients of registered parameters over the tensor-parallel group, in fp32, once a use or once a forward.

    `observer`, where it is set, is shown every parameter with the gradient that this rank brings to its sum.
    """

    observer: Callable[[nn.Parameter, Tensor], None] | None = None

    def __init__(self, group: ProcessGroup) -> None:
        self.group = group
        self._registered: dict[int, tuple[nn.Parameter, int, int]] = {}
        self._hooks: dict[int, RemovableHandle] = {}
        self._taken_over: list[nn.Parameter] = []
        self._inside: dict[int, list[_Place]] = {}  # by id of a layer: the places in it
        self._around: dict[int, list[_Place]] = {}  # by id of a base model: the places in it that no layer holds
        self._whole: dict[int, list[_Place]] = {}  # by id of a base model: all but those of copies
        self._aliases: set[int] = set()  # ids of what stands in a parameter's place now

    def add(self, parameter: nn.Parameter, slot: int = 0, slots: int = 1) -> None:
        """Registers a parameter. With `slots` > 1 only the ranks of the same `slot` hold copies and are summed."""
        self._registered[id(parameter)] = (parameter, slot, slots)

    def find_places(self, base: nn.Module, layers: Iterable[nn.Module]) -> None:
        """Looks up where the modules of a base model, and of its layers, hold registered parameters, once all are registered."""
        layers = list(layers)
        inside: set[int] = set()
        for layer in layers:
            inside.update(map(id, layer.modules()))
            self._inside[id(layer)] = self._places(layer.modules())
        self._around[id(base)] = self._places(m for m in base.modules() if id(m) not in inside)
        self._whole[id(base)] = [place for place in self._places(base.modules()) if place.slots == 1]

    def _places(self, modules: Iterable[nn.Module]) -> list[_Place]:
        return [
            _Place(module._parameters, key, *self._registered[id(parameter)][1:])
            for module in modules
            for key, parameter in module._parameters.items()
            if id(parameter) in self._registered
        ]

    def arm(self) -> None:
        """Puts a hook on every registered parameter that ZeRO-3 holds and that has become trainable. Every forward calls it."""
        if not any(hasattr(parameter, "ds_id") for parameter, *_ in list(self._registered.values())[:1]):
            return
        for parameter, slot, slots in self._registered.values():
            if parameter.requires_grad and id(parameter) not in self._hooks and not self.sums_uses_of(parameter):
                self._hooks[id(parameter)] = hook = parameter.register_hook(
                    lambda grad, parameter=parameter, slot=slot, slots=slots: self.total(parameter, grad, slot, slots)
                )
                hooks: dict[int, Any] = parameter._backward_hooks  # type: ignore[assignment]
                for earlier in [key for key in hooks if key != hook.id]:  # the user's, which see the sum
                    hooks[earlier] = hooks.pop(earlier)  # autograd does not see move_to_end

    def is_registered(self, parameter: nn.Parameter) -> bool:
        """Whether the gradients of its uses are summed."""
        return id(parameter) in self._registered

    def take_over(self, parameter: nn.Parameter) -> bool:
        """Whether `parameter` is registered; if so its module promises to use `summed(parameter)` and nothing else."""
        if not self.is_registered(parameter):
            return False
        if not self.sums_uses_of(parameter):
            self._taken_over.append(parameter)
        return True

    def sums_uses_of(self, parameter: nn.Parameter) -> bool:
        """Whether modules sum the gradients of their own use of `parameter` themselves, which was taken over."""
        return any(p is parameter for p in self._taken_over)

    @contextmanager
    def in_model(self, base: nn.Module, *, by_layer: bool) -> Iterator[None]:
        """Aliases in all places of a base model, while its forward runs; all their gradients are summed in one all-reduce.

        `by_layer`: layers have backward passes of their own, so that each makes the aliases in it by itself.
        """
        with self._shown((self._around if by_layer else self._whole).get(id(base), [])):
            yield

    @contextmanager
    def in_layer(self, layer: nn.Module) -> Iterator[None]:
        """Aliases in the places of a layer that the model's forward leaves to it."""
        with self._shown(self._inside.get(id(layer), [])):
            yield

    @contextmanager
    def _shown(self, places: Sequence[_Place]) -> Iterator[None]:
        if not (places and torch.is_grad_enabled()):
            yield
            return
        held = [(place, place.held[place.key]) for place in places]
        trained = {
            id(p): (p, place) for place, p in held if p.requires_grad and id(p) not in self._aliases and not hasattr(p, "ds_id")
        }
        together = {name: p for name, (p, place) in trained.items() if place.slots == 1}
        aliases = dict(zip(together, self._edges(*together.values()), strict=True))
        for name, (p, place) in trained.items():
            if place.slots > 1:
                aliases[name] = _SumOfCopies.apply(self, place.slot, place.slots, p)  # type: ignore[no-untyped-call]
        shown = {id(alias) for alias in aliases.values()}
        self._aliases |= shown
        for place, p in held:
            place.held[place.key] = aliases.get(id(p), p)
        try:
            yield
        finally:
            for place, p in held:
                place.held[place.key] = p
            self._aliases -= shown

    def _edges(self, *parameters: Tensor) -> tuple[Tensor, ...]:
        return _SumGradients.apply(self, *parameters) if parameters else ()  # type: ignore[no-untyped-call]

    def summed(self, parameter: Tensor) -> Tensor:
        """`parameter` as a module that took it over must use it: with the sum of its gradients over the group."""
        return self.all_summed([parameter])[0]

    def all_summed(self, parameters: Sequence[Tensor]) -> list[Tensor]:
        """`summed` of each of a module's parameters, in one all-reduce; an alias, or a parameter with a hook, is summed already."""
        if not torch.is_grad_enabled():
            return list(parameters)
        bare = [p for p in parameters if p.requires_grad and id(p) not in self._aliases and id(p) not in self._hooks]
        ready = {id(p): alias for p, alias in zip(bare, self._edges(*bare), strict=True)}
        return [ready.get(id(p), p) for p in parameters]

    def total(self, parameter: nn.Parameter, grad: Tensor, slot: int, slots: int) -> Tensor:
        """The sum of `grad` over the ranks of the group that hold the same `slot` of `slots`. Collective."""
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
