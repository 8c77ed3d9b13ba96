"""Tensors that are not held whole: they report the full shape and know where the parts are.

Model code reads `.shape`, `.dtype`, `.device`; sharded layers recognise the handle and take its parts; a scaling,
cast or dropout acts on the part; anything else gets the real tensor, gathered differentiably, and is counted.
"""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from ..errors import SeqParError
from .region import ShardingState, TokenRegion

__all__ = ["ELEMENTWISE", "SCALINGS", "Handle", "is_shape_of", "name_of", "refuse_outside_graph", "selects_everything"]

_BELOW_PYTHON = (
    "a tensor that ds_seqpar holds in parts went through an autograd function below Python, where its gradient cannot follow; "
    "call .materialise() on it first (on all ranks of the tensor-parallel group)"
)
_log = logging.getLogger("ds_seqpar")
_METADATA = {
    "size", "dim", "ndimension", "numel", "nelement", "is_floating_point", "is_complex", "element_size", "__len__",
    "get_device", "is_contiguous", "stride", "storage_offset", "is_inference", "is_signed", "__hash__",
}  # fmt: skip
_METADATA_PROPERTIES = {
    "shape", "dtype", "device", "ndim", "layout", "is_cuda", "is_cpu", "is_meta", "is_sparse", "is_quantized",
    "is_nested", "is_mkldnn", "is_mps", "is_xpu", "itemsize", "nbytes", "names", "is_sparse_csr",
}  # fmt: skip
_AUTOGRAD_PROPERTIES = {"requires_grad", "grad_fn", "is_leaf"}
ELEMENTWISE = {
    "mul", "__mul__", "__rmul__", "multiply", "div", "__div__", "__truediv__", "true_divide", "divide", "add", "__add__",
    "__radd__", "sub", "__sub__", "neg", "__neg__", "tanh", "to", "float", "half", "bfloat16", "contiguous",
}  # fmt: skip
_SUMS = {"add", "__add__", "__radd__", "sub", "__sub__"}
SCALINGS = {"mul", "__mul__", "__rmul__"}
_ARITHMETIC = ELEMENTWISE - {"to", "float", "half", "bfloat16", "contiguous"}


def name_of(func: Callable[..., Any]) -> tuple[str, bool]:
    """(name, is a property read) of what `__torch_function__` was given."""
    name = getattr(func, "__name__", str(func))
    if name == "__get__":
        return getattr(getattr(func, "__self__", None), "__name__", name), True
    return name, False


def _is_in_place(name: str) -> bool:
    inplace_dunder = (
        name.startswith("__i") and name.endswith("__") and name not in ("__invert__", "__index__", "__int__")
    )
    return name == "__setitem__" or inplace_dunder or (name.endswith("_") and not name.endswith("__"))


def selects_everything(index: Any) -> bool:
    parts = index if isinstance(index, tuple) else (index,)
    if sum(part is not Ellipsis for part in parts) > 3:
        return False
    return all(
        part is Ellipsis or (isinstance(part, slice) and part in (slice(None), slice(0, None))) for part in parts
    )


class Handle(torch.Tensor):
    """Base of the handles: shape and dtype of the whole, `source` with the autograd history of the part."""

    source: Tensor
    region: TokenRegion
    state: ShardingState
    _full: Tensor | None
    _hooks: list[tuple[Callable[..., Any], Any]]
    _expected: bool = False  # becoming whole is the plan, nothing to report
    _grad_mode: bool  # of the forward that made it, whatever mode its reader is in
    _elementwise: set[str] = ELEMENTWISE
    _allows_in_place = True

    @classmethod
    def _make(
        cls,
        shape: tuple[int, ...],
        source: Tensor,
        region: TokenRegion,
        state: ShardingState,
        dtype: torch.dtype,
        requires_grad: bool | None = None,
    ) -> Any:
        requires_grad = source.requires_grad if requires_grad is None else requires_grad
        handle = torch.Tensor._make_wrapper_subclass(
            cls, shape, dtype=dtype, device=source.device, requires_grad=requires_grad
        )
        handle.source, handle.region, handle.state, handle._full, handle._hooks = source, region, state, None, []
        handle._grad_mode = torch.is_grad_enabled()
        if requires_grad:
            with torch._C.DisableTorchFunctionSubclass():
                handle._backward_hooks = _REFUSE_GRADIENTS  # type: ignore[assignment]  # one for all: register_hook takes longer than all else here
        return handle

    def _gather(self) -> Tensor:
        raise RuntimeError("a Handle subclass must say how it becomes whole")

    def _apply(self, act: Callable[[Tensor], Tensor]) -> Tensor:
        raise RuntimeError("a Handle subclass must say how it is acted on")

    def _acted_on(self, act: Callable[[Tensor], Tensor]) -> Tensor:
        with torch.set_grad_enabled(self._grad_mode and torch.is_grad_enabled()):
            return self._apply(act)

    def _lies_as(self, other: Any) -> bool:
        """Whether `other` holds the same part of a tensor of the same shape, so that adding parts is adding wholes."""
        return False

    def _acted_on_with(self, other: Any, act: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
        return self._acted_on(lambda x: act(x, other.source))

    def _autograd(self, name: str) -> Any:
        return getattr(self.source, name)

    def _may_act(self, name: str, args: Any, kwargs: dict[str, Any]) -> bool:
        """Whether an elementwise operation keeps the parts where and what they are."""
        return name != "to" or (set(kwargs) <= {"dtype"} and all(isinstance(x, torch.dtype) for x in args[1:]))

    def over(self, source: Tensor) -> Tensor:
        """The same handle over another version of its source, such as one that went through a hook."""
        raise RuntimeError("a Handle subclass must say what it is over another source")

    def is_untouched(self) -> bool:
        """True while the parts are the truth: nobody has had the whole, or asked to see its gradient."""
        return self._full is None and not self._hooks

    def materialise(self, wanted_by: str = "materialise") -> Tensor:
        """The real, differentiable tensor. Collective; from then on it is the truth, also for in-place changes."""
        if self._full is None:
            self._count(f"{type(self).__name__}.{wanted_by}")
            with torch.set_grad_enabled(self._grad_mode):
                self._full = self._gather()
            for hook, removable in self._hooks:
                if self._full.requires_grad and not removable.removed:
                    self._full.register_hook(hook)
        return self._full

    def seen(self) -> Tensor:
        """The whole's values, detached. Collective where parts must be gathered; the parts stay the truth."""
        with torch.no_grad():
            return (self._gather() if self._full is None else self._full).detach()

    def _count(self, name: str) -> None:
        if self._expected:
            return
        if self._grad_mode and not self.state.materialised[name] and self.state.groups.tp_rank == 0:
            _log.warning(
                "%s was gathered whole for %s while training: right, but slower than staying sharded", *name.split(".")
            )
        self.state.materialised[name] += 1

    def __repr__(self, *, tensor_contents: Any = None) -> Any:  # type: ignore[override]
        shape, dtype = tuple(self.shape), self.dtype
        return f"{type(self).__name__}(shape={shape}, dtype={dtype}, held={tuple(self.source.shape)})"

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        raise RuntimeError(
            f"{func} reached a {cls.__name__} below Python, where it cannot be gathered; call .materialise() on it first"
        )

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name, is_property = name_of(func)
        first = args[0] if args else None
        if name in (_METADATA_PROPERTIES if is_property else _METADATA):
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **kwargs)
        if isinstance(first, Handle):
            refuse_outside_graph(first)
            if is_property and name in _AUTOGRAD_PROPERTIES:
                return getattr(first._full, name) if first._full is not None else first._autograd(name)
            if name == "register_hook" and first._full is None:
                removable = _RemovableHook()
                first._hooks.append((args[1], removable))
                return removable
            if first.is_untouched():
                if name == "__getitem__" and selects_everything(args[1]):
                    return first
                if name == "to" and _names_own_device(first, args, kwargs):
                    return first
                if name in first._elementwise and _acts_on_one(args, kwargs) and first._may_act(name, args, kwargs):
                    rest, options = tree_map(_frozen, (args[1:], kwargs))
                    return first._acted_on(lambda x: func(x, *rest, **options))
        if name in _SUMS and len(args) == 2 and isinstance(first, Handle) and first._lies_as(args[1]):
            return first._acted_on_with(args[1], lambda x, y: func(x, y, **kwargs))
        if name in _ARITHMETIC and len(args) == 2 and isinstance(args[1], Handle) and _acts_on_one(args[::-1], kwargs):
            if args[1].is_untouched() and name in args[1]._elementwise:  # a 0-dim tensor or a number stands on the left
                left = _frozen(first)
                return args[1]._acted_on(lambda x: func(left, x, **kwargs))
        return _call_on_real(func, name, args, kwargs)


class _RemovableHook:
    removed = False

    def remove(self) -> None:
        self.removed = True


def _acts_on_one(args: Any, kwargs: dict[str, Any]) -> bool:
    """True if nothing but the first argument is a tensor with dimensions, so that acting on parts is acting on the whole."""
    tensors = [x for x in (*args[1:], *kwargs.values()) if isinstance(x, Tensor)]
    return "out" not in kwargs and not any(x.dim() > 0 or x.requires_grad for x in tensors)


def _frozen(x: Any) -> Any:
    """A 0-dim tensor's value now: what acts on the parts later must not see it change."""
    return x.detach().clone() if isinstance(x, Tensor) else x


def _names_own_device(handle: Handle, args: Any, kwargs: dict[str, Any]) -> bool:
    """True for `handle.to(device)` that would change nothing."""
    return (
        not kwargs
        and len(args) == 2
        and isinstance(args[1], str | torch.device)
        and torch.device(args[1]) == handle.device
    )


def refuse_outside_graph(handle: Handle) -> None:
    """A C++ autograd function that took a handle made a graph past its parts; gradients through it would be lost."""
    with torch._C.DisableTorchFunctionSubclass():
        foreign = handle.grad_fn
    if foreign is not None:
        raise SeqParError(_BELOW_PYTHON)


def _refuse_gradient(grad: Tensor) -> None:
    raise SeqParError(_BELOW_PYTHON)


_REFUSE_GRADIENTS = OrderedDict({0: _refuse_gradient})


def _call_on_real(func: Any, name: str, args: Any, kwargs: dict[str, Any]) -> Any:
    first = args[0] if args else None
    if _is_in_place(name) and isinstance(first, Handle) and not first._allows_in_place:
        raise RuntimeError(
            f"{name} would change a block's input in place, which is shared with the sharded layers; "
            "let the model code clone() it first"
        )

    def real(x: Any) -> Any:
        return x.materialise(name) if isinstance(x, Handle) else x

    result = func(*tree_map(real, args), **tree_map(real, kwargs))
    return first if isinstance(first, Handle) and result is first._full else result


def is_shape_of(handle: Any, sizes: Any, shape: Sequence[int] | None = None) -> bool:
    """True if `view(*sizes)` of an untouched handle means its own shape, or the `shape` given."""
    if not (isinstance(handle, Handle) and handle.is_untouched()):
        return False
    whole = list(handle.shape if shape is None else shape)
    asked = list(sizes[0] if len(sizes) == 1 and not isinstance(sizes[0], int) else sizes)
    return (
        len(asked) == len(whole)
        and asked.count(-1) <= 1
        and all(mine in (-1, size) for mine, size in zip(asked, whole, strict=True))
    )
