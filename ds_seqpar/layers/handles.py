"""Tensors that are not held whole: they report the full shape and know where the parts are.

Model code reads `.shape`, `.dtype`, `.device`; sharded layers recognise the handle and take its parts; a scaling,
cast or dropout acts on the part; anything else gets the real tensor, gathered differentiably, and is counted.

Legend: b batch, s sequence, h hidden, V vocabulary, c = ceil(b*s/t).
"""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from ..errors import SeqParError
from ..kernels.addition import sum_with
from ..kernels.dispatch import is_plain
from .region import ShardingState, TokenRegion
from .token_operations import ACTIVATIONS, ARITHMETIC, features_of, picked_tokens, rows_like

if TYPE_CHECKING:
    from .linear import ColumnParallelLinear, VocabParallelHead
    from .norm import Remake

__all__ = [
    "GatedActivation",
    "GatedProduct",
    "GatheredInput",
    "Handle",
    "ShardedLogits",
    "TokenShard",
    "UnsummedRows",
    "NormedRows",
    "is_watched",
]

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
_ELEMENTWISE = {
    "mul", "__mul__", "__rmul__", "multiply", "div", "__div__", "__truediv__", "true_divide", "divide", "add", "__add__",
    "__radd__", "sub", "__sub__", "neg", "__neg__", "tanh", "to", "float", "half", "bfloat16", "contiguous",
}  # fmt: skip
_SUMS = {"add", "__add__", "__radd__", "sub", "__sub__"}
_SCALINGS = {"mul", "__mul__", "__rmul__"}
_ARITHMETIC = _ELEMENTWISE - {"to", "float", "half", "bfloat16", "contiguous"}
_ELEMENTWISE_ON_TOKENS = _ELEMENTWISE | ACTIVATIONS | {"dropout", "clone", "detach"}


def _name_of(func: Callable[..., Any]) -> tuple[str, bool]:
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


def _selects_everything(index: Any) -> bool:
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
    _elementwise: set[str] = _ELEMENTWISE
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
        name, is_property = _name_of(func)
        first = args[0] if args else None
        if name in (_METADATA_PROPERTIES if is_property else _METADATA):
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **kwargs)
        if isinstance(first, Handle):
            _refuse_outside_graph(first)
            if is_property and name in _AUTOGRAD_PROPERTIES:
                return getattr(first._full, name) if first._full is not None else first._autograd(name)
            if name == "register_hook" and first._full is None:
                removable = _RemovableHook()
                first._hooks.append((args[1], removable))
                return removable
            if first.is_untouched():
                if name == "__getitem__" and _selects_everything(args[1]):
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


def _refuse_outside_graph(handle: Handle) -> None:
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


class TokenShard(Handle):
    """[b, s, h] of which this rank holds `source` [1, c, h]: embeddings, layer outputs, the last hidden state.

    Whole, it serves work that every rank repeats alike (pooling, a value head, a user's own loss). Sums with tensors that every
    rank has, features of each token, and few tokens of all are taken without making it whole.
    """

    _elementwise = _ELEMENTWISE_ON_TOKENS

    def __new__(
        cls, source: Tensor, region: TokenRegion, state: ShardingState, *, meant_whole: bool = False
    ) -> TokenShard:
        """`source` [1, c, h], any floating dtype; layers that carry several streams have [1, c, streams, h]. `meant_whole` if
        gathering it is the plan and nothing to report: it is narrower than what it was made of."""
        shape = (region.batch, region.seq, *source.shape[2:])
        handle = cls._make(shape, source, region, state, source.dtype)
        handle._expected = meant_whole
        return handle  # type: ignore[no-any-return]

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = _name_of(func)[0]
        result = None
        if not kwargs and len(args) == 2 and (name == "__getitem__" or name in ARITHMETIC):
            result = _on_parts(func, name, *args)
        elif name in ("view", "reshape") and not kwargs and _is_shape_of(args[0], args[1:]):
            result = args[0]
        return super().__torch_function__(func, types, args, kwargs) if result is None else result

    def over(self, source: Tensor) -> Tensor:
        return TokenShard(source, self.region, self.state, meant_whole=self._expected)

    def _may_act(self, name: str, args: Any, kwargs: dict[str, Any]) -> bool:
        # Outside a forward the ranks' generators run alike, and would give every rank's rows the same mask.
        draws = name == "dropout" and self.state.region is None
        return super()._may_act(name, args, kwargs) and not draws and not kwargs.get("inplace")

    def _lies_as(self, other: Any) -> bool:
        alike = (
            isinstance(other, TokenShard) and other.region == self.region and other.source.shape == self.source.shape
        )
        return alike and self.is_untouched() and other.is_untouched() and self._grad_mode == other._grad_mode

    def _gather(self) -> Tensor:
        return self.region.full_for_replicated(self.source)

    def _apply(self, act: Callable[[Tensor], Tensor]) -> Tensor:
        return self.over(act(self.source))

    def local(self) -> Tensor:
        """This rank's rows [1, c, h]: the shard, or the rows of the whole once somebody has had it in hand."""
        return self.source if self._full is None else self.region.local_of_replicated(self._full)


def _is_shape_of(handle: Any, sizes: Any, shape: Sequence[int] | None = None) -> bool:
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


def _on_parts(func: Callable[..., Any], name: str, left: Any, right: Any) -> Tensor | None:
    """`func` of tokens of which the ranks hold parts, and something else, without gathering them; None if it cannot be done."""
    handles = [x for x in (left, right) if isinstance(x, TokenShard)]
    first = handles[0]
    for handle in handles:
        _refuse_outside_graph(handle)
    if not all(x.is_untouched() and x.region is first.region for x in handles):
        return None
    with torch.set_grad_enabled(first._grad_mode and torch.is_grad_enabled()):
        if name == "__getitem__":
            if left is not first or _selects_everything(right):
                return None
            features = features_of(first.source, right)
            if features is None:
                return picked_tokens(first.source, first.region, right)
            narrower = first._expected or features.numel() < first.source.numel()
            return TokenShard(features, first.region, first.state, meant_whole=narrower)
        sides = [_side(x, first) for x in (left, right)]
        return None if sides[0] is None or sides[1] is None else first.over(func(*sides))


def _side(x: Any, tokens: TokenShard) -> Tensor | None:
    """What of an operand stands beside this rank's rows of `tokens`; None if it has none, or is not a tensor of several numbers."""
    if isinstance(x, TokenShard):
        return x.source if x.shape == tokens.shape else None
    if not isinstance(x, Tensor) or isinstance(x, Handle) or x.dim() == 0:
        return None
    return rows_like(x, tokens.source, tokens.region)


class GatheredInput(Handle):
    """The input [b, s, h] of a sharded block, of which this rank holds `source` (rows, or all where tokens are not cut).

    Column-parallel linears of the block are computed together from one gather. Whole, it serves work inside the block,
    whose gradient is a part on every rank.
    """

    _elementwise: set[str] = {"to", "float", "half", "bfloat16", "dropout", *_SCALINGS}
    _allows_in_place = False
    _outputs: dict[int, Tensor]
    _alone: bool  # made of a block's input: no sibling is computed with what reads it
    _version_gathered: int
    _remake: Remake | None
    _normed: NormedRows | None = None  # what the rows will be, while nobody has asked for them
    _rows: Tensor

    def __new__(
        cls,
        source: Tensor,
        region: TokenRegion,
        state: ShardingState,
        remake: Remake | None = None,
        *,
        meant_whole: bool = False,
    ) -> GatheredInput:
        """`source` in `region.local_shape`; `remake` computes it again in backward; `meant_whole` if gathering it is the plan
        and nothing to report."""
        shape = (region.batch, region.seq, source.shape[-1])
        handle = cls._make(shape, source, region, state, source.dtype)
        handle._outputs, handle._remake, handle._alone, handle._expected = {}, remake, False, meant_whole
        return handle  # type: ignore[no-any-return]

    def _may_act(self, name: str, args: Any, kwargs: dict[str, Any]) -> bool:
        # Where tokens are not cut every rank holds all rows, and must drop the same of them.
        # A block's own input is not scaled behind the back of the linears that share it; a latent may be.
        allowed = self.region.cut if name == "dropout" else self._expected or name not in _SCALINGS
        return allowed and super()._may_act(name, args, kwargs)

    def _apply(self, act: Callable[[Tensor], Tensor]) -> Tensor:
        changed = GatheredInput(act(self.source), self.region, self.state, meant_whole=self._expected)
        changed._alone = True
        return changed

    def _lies_as(self, other: Any) -> bool:
        """Only what is meant to be gathered: a block's own input stays what its linears know it as."""
        meant = isinstance(other, GatheredInput) and self._expected and other._expected and self.region.cut
        alike = meant and other.region == self.region and other.source.shape == self.source.shape
        return alike and self.is_untouched() and other.is_untouched() and self._grad_mode == other._grad_mode

    @classmethod
    def of_normed(cls, normed: NormedRows) -> GatheredInput:
        """The input of a block whose rows are a norm that is not computed yet, and for its linears need not be."""
        region, state = normed.region, normed.state
        shape = (region.batch, region.seq, normed.shape[-1])
        handle = cls._make(shape, normed.source, region, state, normed.dtype, normed.requires_grad)
        handle._outputs, handle._remake, handle._alone, handle._expected, handle._normed = (
            {},
            None,
            False,
            False,
            normed,
        )
        return handle  # type: ignore[no-any-return]

    @property
    def source(self) -> Tensor:
        """The rows. Whoever wants them, and not only what the linears make of them, has the norm computed."""
        if self._normed is not None:
            self._rows, self._normed = self._normed.materialise(), None
            self._remake = getattr(self._rows, "_seqpar_remake", None)
        return self._rows

    @source.setter
    def source(self, rows: Tensor) -> None:
        self._rows = rows

    def _autograd(self, name: str) -> Any:
        if name == "requires_grad" and self._normed is not None:
            return self._normed._autograd(name)
        return super()._autograd(name)

    def rows(self) -> Tensor:
        """This rank's rows, `source`; refused once the gathered whole was changed in place."""
        if self._full is not None and self._full._version != self._version_gathered:
            raise SeqParError("a block's input was changed in place; let the model code clone() it first")
        return self.source

    def _gather(self) -> Tensor:
        full = self.region.full_for_partial(self.source)
        self._version_gathered = full._version
        return full

    def column(self, linear: ColumnParallelLinear) -> Tensor:
        """Output [b, s, out/t] of one column-parallel linear; its siblings' come from the same gather."""
        from .linear import column_parallel

        rows = self.rows() if self._normed is None else self._normed
        if id(linear) not in self._outputs:
            apart = self.region.apart
            siblings = () if self._alone or id(linear) in apart else linear.siblings
            done = apart.union((id(linear),), self._outputs)
            members = [linear, *(m for m in siblings if id(m) not in done)]
            outputs = column_parallel(rows, self.region, [m.as_linear() for m in members], self._remake)
            self._outputs.update({id(m): out for m, out in zip(members, outputs, strict=True)})
        return self._outputs.pop(id(linear))

    def unused(self) -> frozenset[int]:
        """Ids of sibling linears that were computed with the others but never asked for."""
        return frozenset(self._outputs)


class _Deferred(Handle):
    """Not a part of anything: a tensor of this rank that is not computed until somebody needs it as such."""

    _elementwise: set[str] = set()

    def _count(self, name: str) -> None:
        pass

    @classmethod
    def of(cls, source: Tensor, state: ShardingState, requires_grad: bool | None = None) -> Any:
        """The handle of a function of `source` that has its shape; `requires_grad` if not as `source`."""
        region = state.region
        assert region is not None, "made in a layer, by a forward that is running"
        return cls._make(tuple(source.shape), source, region, state, source.dtype, requires_grad)


class GatedActivation(_Deferred):
    """act(gate); multiplied with a tensor of its shape it becomes a GatedProduct."""

    act: str
    compute: Callable[[Tensor], Tensor]

    def _gather(self) -> Tensor:
        return self.compute(self.source)

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if _name_of(func)[0] in ("mul", "__mul__", "__rmul__", "multiply") and len(args) == 2 and not kwargs:
            gate, up = args if isinstance(args[0], GatedActivation) else args[::-1]
            alike = is_plain(up) and up.shape == gate.shape and up.dtype == gate.dtype
            if alike and gate.is_untouched() and gate._grad_mode == torch.is_grad_enabled():
                product: GatedProduct = GatedProduct.of(gate.source, gate.state)
                product.up, product.act, product.compute = up, gate.act, gate.compute
                return product
        return super().__torch_function__(func, types, args, kwargs)


class GatedProduct(_Deferred):
    """act(gate) * up; a row-parallel linear takes it apart, keeps gate and up, and makes the product again in backward."""

    up: Tensor
    act: str
    compute: Callable[[Tensor], Tensor]

    def _gather(self) -> Tensor:
        return self.compute(self.source) * self.up


def is_watched(module: Any) -> bool:
    """Whether hooks of the module's own see what it takes or returns, and may keep or change it.

    A hook with a true `only_looks` takes handles as they are.
    """
    hooks = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks)
    if not any(hooks):  # asked of every module in every forward
        return False
    return any(not getattr(hook, "only_looks", False) for found in hooks for hook in found.values())


class NormedRows(_Deferred):
    """RMS norm of this rank's rows, `source` [1, c, h], with `weight` [h]: a sharded block makes it a part of its products."""

    weight: Tensor
    eps: float
    compute: Callable[[], Tensor]

    @classmethod
    def of_norm(cls, x: Tensor, weight: Tensor, eps: float, state: ShardingState, compute: Callable[[], Tensor]) -> Any:
        """The handle of rms_norm(x, weight, eps), which is what `compute` returns."""
        handle = cls.of(x, state, requires_grad=x.requires_grad or weight.requires_grad)
        handle.weight, handle.eps, handle.compute = weight, eps, compute
        return handle

    def _autograd(self, name: str) -> Any:
        if name == "requires_grad":
            return self.source.requires_grad or self.weight.requires_grad
        return getattr(self.materialise(), name)

    def _gather(self) -> Tensor:
        return self.compute()


class UnsummedRows(_Deferred):
    """What a row-parallel linear makes of this rank's rows, `source` in the region's local shape, before what was `received`
    [p, c, h] for them is added: the layer's code adds its residual, and all is one pass."""

    received: Tensor | None

    @classmethod
    def of_addends(cls, own: Tensor, received: Tensor | None, state: ShardingState) -> Any:
        """The handle of their sum; `own` has the gradient's history of both."""
        handle = cls.of(own, state)
        handle.received = received
        return handle

    def _gather(self) -> Tensor:
        return sum_with(self.source, self.received, None)

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = _name_of(func)[0]
        if name in ("add", "__add__", "__radd__") and len(args) == 2 and not kwargs:
            rows, residual = args if isinstance(args[0], UnsummedRows) else args[::-1]
            alike = is_plain(residual) and residual.shape == rows.shape and residual.dtype == rows.dtype
            if alike and rows.is_untouched() and rows._grad_mode == torch.is_grad_enabled():
                _refuse_outside_graph(rows)
                return sum_with(rows.source, rows.received, residual)
        if name == "dropout" and isinstance(args[0], UnsummedRows) and not _drops(*args[1:], **(kwargs or {})):
            return args[0]
        return super().__torch_function__(func, types, args, kwargs)


def _drops(p: float = 0.5, training: bool = True, inplace: bool = False) -> bool:
    """Whether torch's dropout with these arguments would change anything."""
    return bool(p and training)


@dataclass(frozen=True)
class _OverVocabulary:
    """`func` of logits and one number for each entry of the vocabulary, `other` [V]; takes all of it or this rank's part."""

    func: Callable[..., Tensor]
    other: Tensor
    start: int
    stands_left: bool

    def __call__(self, logits: Tensor) -> Tensor:
        width = logits.shape[-1]
        other = self.other if width == self.other.numel() else self.other.narrow(0, self.start, width)
        return self.func(other, logits) if self.stands_left else self.func(logits, other)


class ShardedLogits(Handle):
    """[b, s, V], or [T, V], over `source` (the hidden rows that this rank holds) and the head's vocabulary shard; not computed yet.

    Scalings, casts, tanh and a bias over the vocabulary are kept in `transforms` and replayed on whatever part of the logits is
    computed. torch's cross_entropy of [T, V] is the fused loss (layers/loss.py).
    """

    head: VocabParallelHead
    transforms: tuple[Callable[[Tensor], Tensor], ...]
    generation: int

    def over(self, source: Tensor) -> Tensor:
        return self._like(source=source)

    def __new__(
        cls,
        source: Tensor,
        region: TokenRegion,
        head: VocabParallelHead,
        transforms: tuple[Callable[[Tensor], Tensor], ...] = (),
        dtype: torch.dtype | None = None,
        *,
        flat: bool = False,
    ) -> ShardedLogits:
        """`source` in `region.local_shape`; `dtype` of the logits if a transform changed it; `flat` for [T, V]."""
        tokens = (region.tokens,) if flat else (region.batch, region.seq)
        handle = cls._make((*tokens, head.vocab_size), source, region, head.seqpar, dtype or source.dtype)
        handle.head, handle.transforms, handle.generation = head, transforms, head.seqpar.generation
        return handle  # type: ignore[no-any-return]

    def _like(
        self,
        *,
        source: Tensor | None = None,
        then: Callable[[Tensor], Tensor] | None = None,
        dtype: torch.dtype | None = None,
        flat: bool | None = None,
    ) -> Tensor:
        transforms = self.transforms if then is None else (*self.transforms, then)
        return ShardedLogits(
            self.source if source is None else source,
            self.region,
            self.head,
            transforms,
            dtype or self.dtype,
            flat=self.dim() == 2 if flat is None else flat,
        )

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = _name_of(func)[0]
        result = None
        if name == "cross_entropy":
            from .loss import cross_entropy_of

            result = cross_entropy_of(*args, **(kwargs or {}))
        elif name in ("view", "reshape") and not kwargs and isinstance(args[0], ShardedLogits):
            result = args[0]._reshaped(args[1:])
        elif name in ARITHMETIC and not kwargs and len(args) == 2:
            result = _over_vocabulary(func, *args)
        return super().__torch_function__(func, types, args, kwargs) if result is None else result

    def _reshaped(self, sizes: tuple[Any, ...]) -> Tensor | None:
        """The handle as [b, s, V] or [T, V]; None for any other shape."""
        region, width = self.region, self.head.vocab_size
        for flat, shape in ((True, (region.tokens, width)), (False, (region.batch, region.seq, width))):
            if _is_shape_of(self, sizes, shape):
                return self._like(flat=flat)
        return None

    def _autograd(self, name: str) -> Any:
        """A head that is trained alone gives logits a gradient that their source does not have."""
        if self.source.requires_grad or not (self._grad_mode and self.head.weight.requires_grad):
            return getattr(self.source, name)
        # Some node of the graph, not None: enough for those who ask whether there is one, without gathering anything.
        if name == "grad_fn":
            return torch.autograd.graph.get_gradient_edge(self.head.weight).node
        return name == "requires_grad"

    def _gather(self) -> Tensor:
        if self.generation != self.state.generation:
            raise SeqParError(
                "outputs.logits were first read after engine.step() changed the weights; read them before the step"
            )
        logits = self.head.gathered_logits(self.source, self.region)
        for transform in self.transforms:
            logits = transform(logits)
        return logits.view(self.shape)

    def _apply(self, act: Callable[[Tensor], Tensor]) -> Tensor:
        return self._like(then=act, dtype=act(torch.empty(1, dtype=self.dtype, device=self.device)).dtype)


def _over_vocabulary(func: Callable[..., Tensor], left: Any, right: Any) -> Tensor | None:
    """Logits and one number for each entry of the vocabulary, such as a bias that is no parameter; None for anything else."""
    logits, other = (left, right) if isinstance(left, ShardedLogits) else (right, left)
    if not isinstance(logits, ShardedLogits) or not isinstance(other, Tensor) or isinstance(other, Handle):
        return None
    vocabulary = other.dim() in range(1, logits.dim() + 1) and other.numel() == other.shape[-1] == logits.shape[-1]
    if not vocabulary or other.requires_grad or not logits.is_untouched():
        return None
    _refuse_outside_graph(logits)
    act = _OverVocabulary(func, other.detach().clone().view(-1), logits.head.vocab_start, other is left)
    dtype = torch.promote_types(logits.dtype, other.dtype)
    with torch.set_grad_enabled(logits._grad_mode and torch.is_grad_enabled()):
        return logits._like(then=act, dtype=dtype)
