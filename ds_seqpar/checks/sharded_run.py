"""A step of the sharded model of two equal micro batches: what crosses its layers' borders and every raw gradient, written down.

Two, because a sum over the group that is made of the accumulated gradient is right after the first and wrong after the second.

Legend: b, s, h; T = b*s tokens; c = ceil(T/t) rows a rank.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ..comm.tokens import gather_rows
from ..layers.boundaries import ShardedLayer
from ..layers.deferred import NormedRows, UnsummedRows
from ..layers.handles import Handle
from ..layers.region import ShardingState, TokenRegion

__all__ = ["LayerRecord", "ShardedRun", "first_tensor", "loss_of", "quiet", "shares_state"]


@dataclass
class LayerRecord:
    """One call of one layer: input, output and their gradients as this rank holds them, and what its children returned."""

    region: TokenRegion
    input: Tensor
    output: Tensor | None = None
    dinput: Tensor | None = None
    doutput: Tensor | None = None
    children: dict[str, Tensor] = field(default_factory=dict)

    def whole(self, local: Tensor) -> Tensor:
        """[1, c, ...] -> [b, s, ...]; collective. What is not cut is whole already."""
        region = self.region
        if not region.cut:
            return local
        rows = gather_rows(local.reshape(region.rows, -1), region.tokens, region.groups.tp_group)
        return rows.view(region.batch, region.seq, *local.shape[2:])


@dataclass
class ShardedRun:
    """What `of` found; gradients are those of one micro batch.

    `raw`: by id, the gradient of a parameter before it was summed over the group, where it is summed.
    """

    loss: Tensor
    logits: Tensor | None
    layers: dict[str, list[LayerRecord]]
    raw: dict[int, Tensor]
    shares_state: bool  # layers give each other more than hidden states: a cache, position biases

    @classmethod
    def of(cls, model: nn.Module, state: ShardingState, batch: Mapping[str, Tensor]) -> ShardedRun:
        """Runs `model` on `batch` twice, forward and backward; gradients stay in the parameters. Collective."""
        raw: dict[int, Tensor] = {}

        def observe(parameter: nn.Parameter, grad: Tensor) -> None:
            before = raw.get(id(parameter))
            raw[id(parameter)] = grad.detach() / 2 if before is None else before + grad / 2

        state.partial.observer = observe
        try:
            for _ in range(2):
                recorder = _Recorder(model)
                with recorder.hooked(), quiet(model):
                    output = model(**batch)
                    loss = loss_of(output)
                    logits = _logits(output)
                    recorder.backward = True
                    loss.backward()
        finally:
            state.partial.observer = None
        for parameter in model.parameters():
            if parameter.grad is not None:
                parameter.grad /= 2
        return cls(loss.detach(), logits, recorder.records, raw, recorder.shares_state)


class _Recorder:
    def __init__(self, model: nn.Module) -> None:
        self.layers = {name: m for name, m in model.named_modules() if isinstance(m, ShardedLayer)}
        self.records: dict[str, list[LayerRecord]] = {name: [] for name in self.layers}
        self.backward = False  # a checkpointed layer runs its hooks again in backward
        self.shares_state = False

    @contextmanager
    def hooked(self) -> Iterator[None]:
        handles = []
        for name, layer in self.layers.items():
            assert isinstance(layer, nn.Module)
            handles.append(layer.register_forward_pre_hook(self._before(name), with_kwargs=True))
            handles.append(layer.register_forward_hook(self._after(name)))
            for child_name, child in layer.named_children():
                handles.append(child.register_forward_hook(self._child(name, child_name)))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _before(self, name: str) -> Callable[..., Any]:
        def hook(module: Any, args: Any, kwargs: Any) -> Any:
            if self.backward:
                return None
            self.shares_state |= shares_state(args, kwargs)
            x = args[0].view_as(args[0])  # a tensor of its own: its gradient is what this layer alone gives
            record = LayerRecord(kwargs["_region"], x.detach())
            self.records[name].append(record)
            if x.requires_grad:
                x.register_hook(lambda grad: setattr(record, "dinput", grad.detach()))
            return (x, *args[1:]), kwargs

        return hook

    def _after(self, name: str) -> Callable[..., Any]:
        def hook(module: Any, args: Any, output: Any) -> Any:
            if self.backward:
                return None
            record, y = self.records[name][-1], first_tensor(output)
            self.shares_state |= isinstance(output, tuple) and any(
                isinstance(x, Tensor) and x.requires_grad for x in output[1:]
            )
            y = y.view_as(y)
            record.output = y.detach()
            if y.requires_grad:
                y.register_hook(lambda grad: setattr(record, "doutput", grad.detach()))
            return (y, *output[1:]) if isinstance(output, tuple) else y

        return hook

    def _child(self, name: str, child: str) -> Callable[..., None]:
        def hook(module: Any, args: Any, output: Any) -> None:
            if self.backward or not self.records[name]:
                return
            record, y = self.records[name][-1], first_tensor(output)
            y = y.seen() if isinstance(y, NormedRows | UnsummedRows) else y
            held = type(y) is Tensor and y.dim() == 3 and record.output is None
            if held and y.shape[:2] == record.region.local_shape(1)[:2] and child not in record.children:
                record.children[child] = y.detach().clone()

        hook.only_looks = True  # type: ignore[attr-defined]  # what is verified is what trains
        return hook


def first_tensor(output: Any) -> Tensor:
    """A module's output, or the first of several."""
    return output[0] if isinstance(output, tuple) else output  # type: ignore[no-any-return]


def shares_state(args: Any, kwargs: Mapping[str, Any]) -> bool:
    """Whether a layer was given something that it may leave a tensor in for another layer: a dict, a list, a cache."""
    plain = (Tensor, tuple, str, int, float, bool, torch.dtype, torch.device, TokenRegion)
    return any(x is not None and not isinstance(x, plain) for x in (*args, *kwargs.values()))


def loss_of(output: Any) -> Tensor:
    """The model's loss; for a model without one, a function of its first output in which every element counts differently."""
    loss = getattr(output, "loss", None)
    if loss is not None:
        return loss  # type: ignore[no-any-return]
    logits = getattr(output, "logits", None)
    x: Tensor = output[0] if logits is None else logits
    weight = torch.linspace(-1.0, 1.0, x.numel(), dtype=torch.float32, device=x.device).view(x.shape)
    wide = x.float()
    return (wide * weight).square().mean() + (wide * weight).mean()


def _logits(output: Any) -> Tensor | None:
    logits = getattr(output, "logits", None)
    if isinstance(logits, Handle):
        logits._expected = True  # that verify reads them is nothing to report
        logits = logits.materialise("verify")
    return None if logits is None else logits.detach().clone()


@contextmanager
def quiet(model: nn.Module) -> Iterator[None]:
    """Switches dropout, jitter and noise off: the masks of a sharded run are its own."""
    changed: list[tuple[Any, str, float]] = []
    configs = {id(c): c for m in model.modules() if (c := getattr(m, "config", None)) is not None}
    for owner in (*model.modules(), *configs.values()):
        for name, value in list(vars(owner).items()):
            named = any(word in name for word in ("drop", "jitter", "noise")) or (
                isinstance(owner, nn.Dropout) and name == "p"
            )
            if named and isinstance(value, float) and value > 0:
                changed.append((owner, name, value))
                setattr(owner, name, 0.0)
    try:
        yield
    finally:
        for owner, name, value in changed:
            setattr(owner, name, value)
