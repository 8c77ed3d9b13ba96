"""The unsharded model, of which one layer's weights exist at a time: what the sharded run is compared with.

The skeleton is a copy of the whole model, made before it is sharded, whose parameters are empty. Its own code runs from end to
end. A layer in it, when it is called, gets its weights, the sharded run's input and the sharded run's output gradient; what it
makes of them is compared, and the sharded run's output goes on. So every error is one layer's own, whatever the depth; and what
stands between, before and behind the layers (embedding, scalings, norms, head, loss) runs as written on those outputs, and its
gradients meet the sharded run's at every border.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import Function
from torch.autograd.function import once_differentiable
from torch.utils._pytree import tree_flatten, tree_unflatten

from ..errors import PlanError
from .comparison import checksum, wider
from .sharded_run import LayerRecord, ShardedRun, first_tensor, loss_of, quiet

__all__ = ["Reference", "Skeleton"]

Fetch = Callable[[str], Tensor]
_END = (1, 2**31, 0)
"""Behind every layer."""


class Skeleton:
    """The modules of an unsharded model, without its weights. Make it before the model is sharded.

    `sums`: name -> checksum of the weights as they were, of every `share[1]`th parameter from `share[0]` on; neither they nor
    `shapes` are known of a model that was loaded in parts (`whole` false).
    """

    def __init__(self, model: nn.Module, *, share: tuple[int, int] = (0, 1), whole: bool = True) -> None:
        memo: dict[int, Any] = {}
        self.sums: dict[str, Tensor] = {}
        self.shapes = {name: tuple(p.shape) for name, p in model.named_parameters()} if whole else {}
        self.dtypes = {name: p.dtype for name, p in model.named_parameters()}
        self.ties = _ties(model)
        for i, (name, parameter) in enumerate(model.named_parameters()):
            if whole and i % share[1] == share[0]:
                self.sums[name] = checksum(parameter)
            memo[id(parameter)] = nn.Parameter(parameter.new_empty(0), parameter.requires_grad)
        try:
            self.model = copy.deepcopy(model, memo)
        except Exception as problem:
            raise PlanError(
                f'"verify" copies the modules of the model, which this {type(model).__name__} does not allow: {problem}'
            ) from problem
        for module in self.model.modules():
            if getattr(module, "gradient_checkpointing", False):
                module.gradient_checkpointing = False  # type: ignore[assignment]


def _ties(model: nn.Module) -> dict[str, tuple[str, ...]]:
    """First name of every parameter -> all its names."""
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    return {found[0]: tuple(sorted(found)) for found in names.values()}


class Reference:
    """Runs the skeleton beside what the sharded run found, and tells `compare` what met what.

    compare.tensor(what, module, at, mine, theirs, wide)    a value of one call; `at` sorts by execution
    compare.gradient(name, at, theirs, wide, largest)       a parameter's gradient; mine is in the sharded model

    fetch: parameter name -> the whole weight; collective.
    keep: holds all weights at once, which layers that share state need.
    """

    def __init__(self, skeleton: Skeleton, run: ShardedRun, fetch: Fetch, compare: Any, *, keep: bool) -> None:
        self.skeleton, self.run, self.fetch, self.compare, self.keep = skeleton, run, fetch, compare, keep
        model = skeleton.model
        self.names = {id(p): name for name, p in model.named_parameters()}
        self.layers = {name: model.get_submodule(name) for name in run.layers}
        self.own = {name: self._own_parameters(name) for name in self.layers}
        self.calls: dict[str, int] = dict.fromkeys(self.layers, 0)
        self.depth = 0
        self.memory = _Memory()
        self._late: list[Callable[[], None]] = []

    def _own_parameters(self, layer: str) -> list[nn.Parameter]:
        """What no other layer, and nothing outside the layers, uses; nothing of a layer that is called more than once."""
        if self.keep or len(self.run.layers[layer]) != 1:
            return []
        module = self.skeleton.model.get_submodule(layer)
        inside = {id(p) for p in module.parameters()}
        ties = self.skeleton.ties
        return [p for p in module.parameters() if id(p) in inside and self._only_in(ties[self.names[id(p)]], layer)]

    @staticmethod
    def _only_in(names: tuple[str, ...], layer: str) -> bool:
        return all(name.startswith(f"{layer}.") for name in names)

    def __call__(self, batch: Mapping[str, Tensor]) -> None:
        """The whole comparison; collective."""
        model, of_layers = self.skeleton.model, {id(p) for own in self.own.values() for p in own}
        rest = [p for p in model.parameters() if id(p) not in of_layers]
        self._fill(rest)
        for name, layer in self.layers.items():
            layer.forward = self._in_place_of(name, layer.forward)
        with quiet(model):
            output = model(**batch)
            loss = loss_of(output)
            logits = getattr(output, "logits", None)
            if self.run.logits is not None and logits is not None:
                self.compare.tensor("logits", "the head", _END, self.run.logits, logits.detach())
            self.compare.tensor("loss", "the loss", _END, self.run.loss, loss.detach())
            loss.backward()
        for act in self._late:
            act()
        self._gradients(rest, {}, (2, 1, 0))

    def _fill(self, parameters: list[nn.Parameter]) -> None:
        for parameter in parameters:
            parameter.data = self.fetch(self.names[id(parameter)])

    def _gradients(self, parameters: list[nn.Parameter], wide: Mapping[int, Tensor], at: tuple[int, int, int]) -> None:
        largest = max((float(p.grad.norm()) for p in parameters if p.grad is not None), default=0.0)
        for parameter in parameters:
            if parameter.requires_grad:
                self.compare.gradient(self.names[id(parameter)], at, parameter.grad, wide.get(id(parameter)), largest)
            parameter.data, parameter.grad = parameter.new_empty(0), None

    def _in_place_of(self, name: str, forward: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            record = self.run.layers[name][self.calls[name]]
            self.calls[name] += 1
            self.depth += 1
            return _Call(self, name, forward, record, args, kwargs).run()

        return call


class _Memory:
    """Where one layer's weights in a wider dtype lay, the next one's go: untouched memory costs as much as the product that reads it."""

    def __init__(self) -> None:
        self.free: list[Tensor] = []

    def widened(self, layer: nn.Module, dtype: torch.dtype) -> dict[int, nn.Parameter]:
        """id of a parameter -> its copy in `dtype`. What fits none of them is let go."""
        left: dict[tuple[torch.Size, torch.dtype], list[Tensor]] = {}
        for memory in self.free:
            left.setdefault((memory.shape, memory.dtype), []).append(memory)
        self.free, copies = [], {}
        for p in layer.parameters():
            own = dtype if p.is_floating_point() else p.dtype
            fitting = left.get((p.shape, own))
            memory = fitting.pop() if fitting else torch.empty(p.shape, dtype=own, device=p.device)
            copies[id(p)] = nn.Parameter(memory.copy_(p.detach()), p.requires_grad)
        return copies


class _Call:
    """One call of one layer of the skeleton."""

    def __init__(
        self, reference: Reference, name: str, forward: Callable[..., Any], record: LayerRecord, args: Any, kwargs: Any
    ) -> None:
        self.reference, self.name, self.forward, self.record = reference, name, forward, record
        self.depth = reference.depth
        self.x, self.dx, self.y, self.dy = (
            None if local is None else record.whole(local)
            for local in (record.input, record.dinput, record.output, record.doutput)
        )
        if args:
            self.arrived, args = args[0], args[1:]
        else:
            key = next(iter(kwargs))
            self.arrived = kwargs.pop(key)
        self.leaves, self.spec = tree_flatten(
            (args, {k: v for k, v in kwargs.items() if isinstance(v, Tensor | tuple)})
        )
        self.by_reference = {k: v for k, v in kwargs.items() if not isinstance(v, Tensor | tuple)}
        self.wanted = [i for i, leaf in enumerate(self.leaves) if isinstance(leaf, Tensor) and leaf.requires_grad]

    def run(self) -> Any:
        reference, compare = self.reference, self.reference.compare
        compare.tensor("input", f"before {self.name}", (1, self.depth, 0), self.x, self.arrived.detach())
        own = reference.own[self.name]
        reference._fill(own)
        layer = reference.layers[self.name]
        output, x, others = self._through(layer, None)
        y = first_tensor(output)
        wide_children: dict[str, Tensor] = {}
        wide_y = wide_dx = None
        wide_grads: dict[int, Tensor] = {}
        if (dtype := wider(self.x.dtype)) is not None and not reference.keep:  # type: ignore[union-attr]
            wide_y, wide_dx, wide_grads, wide_children = self._in(dtype, layer)
        for child, mine in self.record.children.items():
            theirs = self.children.get(child)
            whole = self.record.whole(mine)
            if theirs is not None and theirs.numel() == whole.numel():
                exact = wide_children.get(child)
                compare.tensor("output", f"{self.name}.{child}", (1, self.depth, 1), whole, theirs, exact)
        compare.tensor("output", self.name, (1, self.depth, 2), self.y, y.detach(), wide_y)
        if reference.keep:
            reference._late.append(lambda: self._compare_dx(x, wide_dx))
        else:
            self._compare_dx(x, wide_dx)
            reference._gradients(own, wide_grads, (2, -self.depth, 1))
        rest = output[1:] if isinstance(output, tuple) else ()
        trigger = torch.zeros(
            (), requires_grad=True
        )  # so that the gradient comes by, whether or not the input wants one
        given = [self.leaves[i] for i in self.wanted]
        passed = _Passed.apply(self, [leaf.grad for leaf in others], trigger, self.arrived, *given)  # type: ignore[no-untyped-call]
        return (passed, *rest) if isinstance(output, tuple) else passed

    def _compare_dx(self, x: Tensor, wide: Tensor | None) -> None:
        if self.dx is not None or x.grad is not None:
            self.reference.compare.tensor("input gradient", self.name, (2, -self.depth, 2), self.dx, x.grad, wide)

    def _through(self, layer: nn.Module, dtype: torch.dtype | None) -> tuple[Any, Tensor, list[Tensor]]:
        """(output, input leaf, other leaves) of a forward and backward of the layer."""

        def cast(leaf: Any) -> Any:
            real = isinstance(leaf, Tensor) and leaf.is_floating_point()
            return leaf.to(dtype) if real and dtype is not None else leaf

        assert self.x is not None
        x = cast(self.x.detach()).clone().requires_grad_(self.dx is not None)
        leaves = [cast(leaf.detach() if isinstance(leaf, Tensor) else leaf) for leaf in self.leaves]
        others = []
        for i in self.wanted:
            leaves[i] = leaves[i].clone().requires_grad_()
            others.append(leaves[i])
        args, kwargs = tree_unflatten(leaves, self.spec)
        self.children: dict[str, Tensor] = {}
        hooks = [m.register_forward_hook(self._child(n)) for n, m in layer.named_children()]
        try:
            with torch.enable_grad():
                forward = self.forward if dtype is None else layer.forward
                output = forward(x, *args, **kwargs, **self.by_reference)
            y = first_tensor(output)
            if self.dy is not None and y.requires_grad:
                torch.autograd.backward([y], [cast(self.dy)], retain_graph=self.reference.keep)
        finally:
            for hook in hooks:
                hook.remove()
        return output, x, others

    def _in(
        self, dtype: torch.dtype, layer: nn.Module
    ) -> tuple[Tensor, Tensor | None, dict[int, Tensor], dict[str, Tensor]]:
        """(output, input gradient, parameter gradients by id of the original, children's outputs) in a wider dtype."""
        children = self.children
        stand_in = vars(layer).pop("forward")
        copies = self.reference.memory.widened(layer, dtype)
        try:
            wide = copy.deepcopy(layer, dict(copies)).to(dtype)
        finally:
            layer.forward = stand_in
        output, x, _ = self._through(wide, dtype)
        wide_children, self.children = self.children, children
        pairs = zip(layer.parameters(), wide.parameters(), strict=True)
        grads = {id(p): w.grad for p, w in pairs if w.grad is not None}
        self.reference.memory.free = [p.data for p in copies.values()]
        return first_tensor(output).detach(), x.grad, grads, wide_children

    def _child(self, name: str) -> Callable[..., None]:
        def hook(module: Any, args: Any, output: Any) -> None:
            y = first_tensor(output)
            if isinstance(y, Tensor) and name not in self.children:
                self.children[name] = y.detach().clone()

        return hook

    def came_back(self, dy: Tensor) -> None:
        """What the rest of the model gives as the output's gradient, against the sharded run's."""
        at = (2, -self.depth, 0)
        self.reference.compare.tensor("output gradient", f"behind {self.name}", at, self.dy, dy)


class _Passed(Function):
    """The sharded run's output, and in backward its input's gradient: what stands between layers sees nothing else."""

    @staticmethod
    def forward(
        ctx: Any, call: _Call, grads: list[Tensor | None], trigger: Tensor, x: Tensor, *others: Tensor
    ) -> Tensor:
        ctx.call, ctx.grads = call, grads
        assert call.y is not None
        return call.y.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Any, ...]:
        ctx.call.came_back(dy)
        return (None, None, None, ctx.call.dx, *ctx.grads)
