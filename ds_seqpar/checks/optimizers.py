"""An optimizer proves that it treats each element alone before it is given parts of parameters.

Muon, Adafactor, LAMB and others look at a whole matrix: its rows and columns, its norm, its singular vectors. On a part they compute
something else, without an error. As layers/tokenwise.py does with modules, an optimizer is measured: a fresh one of its class with its
settings makes some steps on a small matrix, and others like it, one a rank, on its parts.
"""

from __future__ import annotations

import copy
import inspect
import logging
import re
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_pre_hook

from ..errors import ConfigError
from ..parameter_hooks import is_cut

__all__ = ["check_named", "check_optimizer", "watch_steps"]

_LOOKS_AT_WHOLES = re.compile(
    "adafactor|adalomo|adam_?mini|apollo|^came$|dion|fromage|galore|kfac|lamb$|lars|lbfgs|muon|nero|novograd|onebit|scion|shampoo|sm3"
    "|soap|zeroone",
    re.IGNORECASE,
)
"""Names of optimizers that do not treat each element alone, for those that cannot be measured here."""

_TREATS_EACH_ALONE = frozenset({
    "FusedAdam", "FusedLion", "DeepSpeedCPUAdam", "DeepSpeedCPULion", "DeepSpeedCPUAdagrad", "SparseAdam", "AdamW8bit", "Adam8bit",
    "PagedAdamW", "PagedAdamW8bit", "PagedAdamW32bit", "PagedAdam8bit", "Lion8bit", "PagedLion8bit",
})  # fmt: skip
"""Names of those that do, and that have kernels of their own."""

_SHAPES = {True: (8, 6), False: (48,)}
_ON_CPU = {"capturable": False, "fused": None, "foreach": None}
_STEPS = 6
_LR = 0.01  # a schedule may begin at 0
_TOLERANCE = 1e-4  # of the largest change, in float32; the least of the known ones is off by 1e-2

Factory = Callable[[list[nn.Parameter]], Optimizer]
_checked: weakref.WeakSet[Optimizer] = weakref.WeakSet()
_watched = False


def check_optimizer(optimizer: Optimizer | Factory, tp_size: int | None = None) -> str:
    """Checks an optimizer, or what makes one of parameters, for the parts of a model that is cut over `tp_size` ranks.

    Returns what should be remarked, where it cannot be told. Raises ConfigError if it does not treat each element alone.
    """
    name = type(optimizer).__name__ if isinstance(optimizer, Optimizer) else getattr(optimizer, "__name__", "the optimizer")
    if name in _TREATS_EACH_ALONE:
        return ""
    try:
        name, alone = _measured(optimizer, name)
    except Exception as error:  # whatever an optimizer of the user's raises on a small matrix on the CPU
        alone, why = None, f"{type(error).__name__}: {error}"
    else:
        why = "nothing moved"
    if alone is False or _LOOKS_AT_WHOLES.search(name):
        raise _refusal(name, tp_size)
    if alone:
        return ""
    return (
        f"whether {name} treats each element of a parameter alone could not be measured ({why.splitlines()[0][:100]}); it is given this "
        "rank's parts, so compare a few steps with the unsharded model"
    )


def check_named(name: object, tp_size: int) -> None:
    """The same for the "type" of an "optimizer" in the DeepSpeed JSON, by its name alone."""
    if isinstance(name, str) and _LOOKS_AT_WHOLES.search(name):
        raise _refusal(name, tp_size)


def watch_steps() -> None:
    """From now on every optimizer of this process is checked before its first step over a parameter that is cut. Idempotent."""
    global _watched
    if not _watched:
        _watched = True
        register_optimizer_step_pre_hook(_before_step)


def _before_step(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
    if optimizer in _checked:
        return
    if any(is_cut(parameter) for group in optimizer.param_groups for parameter in group["params"]):
        if remark := check_optimizer(optimizer):
            logging.getLogger("ds_seqpar").warning("ds_seqpar: %s", remark)
    _checked.add(optimizer)


def _refusal(name: str, tp_size: int | None) -> ConfigError:
    over = "" if tp_size is None else f" over tp_size={tp_size} ranks"
    return ConfigError(
        f"{name} looks at whole parameters, or at all of them together, but each rank's optimizer holds parts of them{over}: it would "
        "train something else. Use one that treats each element alone (AdamW, SGD, Lion, Adagrad), or train without the key"
    )


def _measured(optimizer: Optimizer | Factory, name: str) -> tuple[str, bool | None]:
    """(name of the class, whether it treats each element alone); None if nothing moved. Raises what the optimizer raises."""
    if isinstance(optimizer, Optimizer):
        groups = [group for group in optimizer.param_groups if group["params"]]
        shapes = [_SHAPES[any(p.dim() > 1 for p in group["params"])] for group in groups]
        make: Callable[[list[nn.Parameter]], Optimizer] = lambda parameters: _like(optimizer, groups, parameters)  # noqa: E731
    else:
        shapes, make = [_SHAPES[True]], optimizer
    generator = torch.Generator().manual_seed(0)
    scales = [torch.linspace(0.2, 3.0, shape[0]).view(-1, *(1,) * (len(shape) - 1)) for shape in shapes]
    starts = [torch.randn(shape, generator=generator) * scale for shape, scale in zip(shapes, scales, strict=True)]
    grads = [[torch.randn(x.shape, generator=generator) * s for x, s in zip(starts, scales, strict=True)] for _ in range(_STEPS)]
    with torch.random.fork_rng(devices=[]):
        name, whole = _stepped(make, name, starts, grads)
        changes = [float((after - before).abs().max()) for after, before in zip(whole, starts, strict=True)]
        if not any(changes):
            return name, None
        for dim in range(max(len(shape) for shape in shapes)):
            parts = [
                _stepped(make, name, [_part(x, dim, part) for x in starts], [[_part(x, dim, part) for x in gs] for gs in grads])[1]
                for part in (0, 1)
            ]
            for after, change, first, second in zip(whole, changes, *parts, strict=True):
                joined = torch.cat((first, second), min(dim, after.dim() - 1))
                if not float((joined - after).abs().max()) <= _TOLERANCE * change:
                    return name, False
    return name, True


def _part(x: Tensor, dim: int, part: int) -> Tensor:
    dim = min(dim, x.dim() - 1)
    size = x.shape[dim] * 5 // 8
    first, second = x.tensor_split([size], dim)
    return (second if part else first).contiguous()


def _stepped(make: Factory, name: str, starts: list[Tensor], grads: list[list[Tensor]]) -> tuple[str, list[Tensor]]:
    """(name of the class, what the parameters are after the steps)."""
    parameters = [nn.Parameter(start.clone()) for start in starts]
    optimizer = make(parameters)
    for group in optimizer.param_groups:
        if isinstance(group.get("lr"), float | int):
            group["lr"] = _LR
    for each in grads:
        for parameter, grad in zip(parameters, each, strict=True):
            parameter.grad = grad.clone()
        optimizer.step()
    return type(optimizer).__name__, [parameter.detach() for parameter in parameters]


def _like(optimizer: Optimizer, groups: list[dict[str, Any]], parameters: list[nn.Parameter]) -> Optimizer:
    """A fresh optimizer of the same class and settings, one of `parameters` in each group."""
    known = {**vars(optimizer), **optimizer.defaults, **groups[0]}
    wanted = list(inspect.signature(type(optimizer)).parameters.values())[1:]
    named = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    arguments = {p.name: _setting(p.name, known[p.name]) for p in wanted if p.kind in named and p.name in known}
    fresh = [
        {name: _setting(name, value) for name, value in group.items() if name not in ("params", "param_names")} for group in groups
    ]
    of_groups = [{**group, "params": [parameter]} for group, parameter in zip(fresh, parameters, strict=True)]
    return type(optimizer)(of_groups, **arguments)


def _setting(name: str, value: Any) -> Any:
    if name in _ON_CPU:
        return _ON_CPU[name]
    if isinstance(value, Tensor):
        value = value.detach().cpu()
    if name == "lr" and value is not None:
        return _LR
    return copy.deepcopy(value)
