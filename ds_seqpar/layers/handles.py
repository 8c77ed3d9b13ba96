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
import torch.distributed as dist
from torch import Tensor
from torch.utils._pytree import tree_map

from ..comm.failures import is_of_another_rank
from ..errors import RankLostError, SeqParError
from .region import ShardingState, TokenRegion

__all__ = [
    "ELEMENTWISE", "SCALINGS", "Handle", "is_deepspeeds", "is_shape_of", "name_of", "refuse_outside_graph", "selects_everything",
]  # fmt: skip

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
_CASTS = {"to", "float", "half", "bfloat16", "contiguous"}
_NAMED_CASTS = {"float": torch.float32, "half": torch.float16, "bfloat16": torch.bfloat16}
_ARITHMETIC = ELEMENTWISE - _CASTS
_WATCHES = {"register_hook", "retain_grad"}


def is_deepspeeds(hook: Any) -> bool:
    """Whether a hook is of DeepSpeed's own, which waits for an event and changes nothing."""
    return (getattr(hook, "__module__", None) or "").startswith("deepspeed.")


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
    _whole: Tensor | None
    _base: Handle | None = None  # whose view this one is: a write into either is one into both
    _is_part: bool = False  # a view of a part of another handle, or of its values: a write into it would be lost
    _hooks: list[tuple[Callable[..., Any], Any]]
    _kept_grad: list[Tensor] = []  # of the last backward pass, where it is kept
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
        handle.source, handle.region, handle.state, handle._whole, handle._hooks = source, region, state, None, []
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

    @property
    def _full(self) -> Tensor | None:
        """The whole, once somebody has had it: of this handle, or of the one whose view it is."""
        if self._whole is None and self._base is not None and self._base._full is not None:
            self._whole = self._base._full.view(self.shape)
        return self._whole

    def viewed_as(self, view: Handle) -> Handle:
        """`view`, which shows the whole of this handle in another shape, and from now on shares its fate."""
        view._base = self if self._base is None else self._base
        return view

    def is_untouched(self) -> bool:
        """True while the parts are the truth: nobody has had the whole, or asked to see its gradient."""
        return self._full is None and not self._hooks and (self._base is None or not self._base._hooks)

    def materialise(self, wanted_by: str = "materialise") -> Tensor:
        """The real, differentiable tensor. Collective; from then on it is the truth, also for in-place changes."""
        if self._full is None:
            with torch.set_grad_enabled(self._grad_mode):
                if self._base is None:
                    self._count(f"{type(self).__name__}.{wanted_by}")
                    self._whole = self._read(wanted_by)
                else:
                    self._whole = self._base.materialise(wanted_by).view(self.shape)
        whole = self._full
        assert whole is not None
        for hook, removable in self._hooks:
            if whole.requires_grad and not removable.removed:
                removable.put_on(whole, hook)
        return whole

    def _read(self, wanted_by: str) -> Tensor:
        """The whole, after all ranks of the group have said that they read it; raises SeqParError where one does something else."""
        what = f"{type(self).__name__} {list(self.shape)} ({wanted_by})"
        try:
            if self.state.region is None and self.state.guarded_seed is None:  # in a forward the ranks go together
                self.state.guard.meet_to_read(what)
            return self._gather()
        except RuntimeError as problem:
            if not is_of_another_rank(problem):
                raise
            raise RankLostError(
                f"rank {dist.get_rank()} read {what} of a sharded model's outputs and the other ranks of its tensor-parallel group did "
                "not: reading is a collective; do it on all of them, outside `if rank == 0`"
            ) from problem

    def seen(self) -> Tensor:
        """The whole's values, detached. Collective where parts must be gathered; the parts stay the truth."""
        with torch.no_grad():
            return (self._gather() if self._full is None else self._full).detach()

    def _hooked(self, hook: Callable[..., Any]) -> Any:
        removable = _RemovableHook()
        self._hooks.append((hook, removable))
        return removable

    def _retains(self) -> bool:
        """Has the gradient kept as it passes, if it passes here: `_kept_grad`."""
        return False

    def differentiated(self) -> tuple[Tensor, Callable[[Tensor], Tensor] | None]:
        """(a tensor of the graph, what makes of its gradient that of the whole), for torch.autograd.grad."""
        self._refuse_to_be_watched("torch.autograd.grad", ())
        return self.materialise("autograd.grad"), None

    def _refuse_to_be_watched(self, name: str, args: Any) -> None:
        """Raises SeqParError where a gradient that somebody asks to see will not pass here."""

    def _keeps_dtype(self, name: str, args: Any, kwargs: dict[str, Any]) -> bool:
        """Whether it is a cast that returns its tensor itself."""
        if name == "contiguous":
            return not kwargs
        named = _NAMED_CASTS.get(name) or next((x for x in (*args[1:], *kwargs.values()) if isinstance(x, torch.dtype)), None)
        return named is self.dtype and self._may_act(name, args, kwargs) and not (name != "to" and kwargs)

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
        if func is torch.autograd.grad:
            return _grad_by(args, kwargs)
        if name in (_METADATA_PROPERTIES if is_property else _METADATA):
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **kwargs)
        if isinstance(first, Handle):
            refuse_outside_graph(first)
            if is_property and name in _AUTOGRAD_PROPERTIES:
                return getattr(first._full, name) if first._full is not None else first._autograd(name)
            if is_property and name == "grad" and first._kept_grad:
                return first._kept_grad[-1]
            if name == "retain_grad" and first._full is None and first._retains():
                return None
            if name in _WATCHES:
                first._refuse_to_be_watched(name, args)
                if name == "register_hook" and first._full is None:
                    return first._hooked(args[1])
            if first.is_untouched():
                if name == "__getitem__" and selects_everything(args[1]):
                    return first
                if name in _CASTS and first._keeps_dtype(name, args, kwargs):
                    return first
                if name == "to" and _names_own_device(first, args, kwargs):
                    return first
                if name in first._elementwise and _acts_on_one(args, kwargs) and first._may_act(name, args, kwargs):
                    rest, options = tree_map(_frozen, (args[1:], kwargs))
                    result = first._acted_on(lambda x: func(x, *rest, **options))
                    if name == "detach" and isinstance(result, Handle):
                        result._is_part = True
                    return result
        if name in _SUMS and len(args) == 2 and isinstance(first, Handle) and first._lies_as(args[1]):
            return first._acted_on_with(args[1], lambda x, y: func(x, y, **kwargs))
        if name in _ARITHMETIC and len(args) == 2 and isinstance(args[1], Handle) and _acts_on_one(args[::-1], kwargs):
            if args[1].is_untouched() and name in args[1]._elementwise:  # a 0-dim tensor or a number stands on the left
                left = _frozen(first)
                return args[1]._acted_on(lambda x: func(left, x, **kwargs))
        return _call_on_real(func, name, args, kwargs)


class _RemovableHook:
    """What register_hook returns for a hook on a tensor that is not there yet."""

    removed = False
    _real: Any = None

    def put_on(self, whole: Tensor, hook: Callable[..., Any]) -> None:
        """Registers it, once."""
        if self._real is None:
            self._real = whole.register_hook(hook)

    def remove(self) -> None:
        self.removed = True
        if self._real is not None:
            self._real.remove()


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
    if _is_in_place(name) and isinstance(first, Handle) and first._is_part and first.is_untouched():
        raise SeqParError(
            f"{name} would change a part of a tensor that ds_seqpar holds in parts, or what was detached from it, and the tensor itself "
            "would not see it; write into the tensor (x[:, 0] = ...), or change a copy (clone() first)"
        )
    if _is_in_place(name) and isinstance(first, Handle) and not first._allows_in_place:
        raise RuntimeError(
            f"{name} would change a block's input in place, which is shared with the sharded layers; "
            "let the model code clone() it first"
        )

    def real(x: Any) -> Any:
        return x.materialise(name) if isinstance(x, Handle) else x

    result = func(*tree_map(real, args), **tree_map(real, kwargs))
    return first if isinstance(first, Handle) and result is first._full else result


def _grad_by(args: Any, kwargs: dict[str, Any]) -> tuple[Any, ...]:
    """torch.autograd.grad, whose inputs may be handles. Collective for these."""
    outputs, *rest = args
    inputs = rest.pop(0) if rest else kwargs.pop("inputs")
    asked = [inputs] if isinstance(inputs, Tensor) else list(inputs)
    watched = [x.differentiated() if isinstance(x, Handle) else (x, None) for x in asked]
    outputs = tree_map(lambda x: x.materialise("autograd.grad") if isinstance(x, Handle) else x, outputs)
    grads = torch.autograd.grad(outputs, [x for x, _ in watched], *rest, **kwargs)
    return tuple(g if g is None or whole is None else whole(g) for g, (_, whole) in zip(grads, watched, strict=True))


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
