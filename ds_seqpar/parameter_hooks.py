"""Gradient hooks that a user puts on a parameter that is cut: they are shown the whole gradient, and what they return is cut again.

A hook's gradient on one rank is that of its part; a mask of the whole vocabulary's size does not fit it, and one of a part's size means
other rows. So such hooks, registered before sharding or after, get the gradient gathered over the group: a collective in backward, for
which every rank of the group must have registered the same hooks. A hook of which `hook.takes_parts` is true gets the part as it is,
without a gather; DeepSpeed's own know of parts.

Behind the accumulation a hook is given the parameter itself, whose gradient has the shape of the part. There it is refused.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from .checkpoint.gathering import gather_parameter, part_of
from .errors import ConfigError, PlanError
from .groups import ParallelGroups
from .plan.cuts import Cut

__all__ = ["is_cut", "refuse_post_hooks", "serve_hooks", "train_rows"]

Hook = Callable[..., Any]
_PART = "seqpar_part"
_KNOW_PARTS = ("deepspeed", "ds_seqpar")
_WAY_OUT = (
    "put it on with register_hook, which is shown the whole gradient, or, if it treats each element alone, say hook.takes_parts = True"
)


def serve_hooks(parameter: nn.Parameter, cut: Cut, groups: ParallelGroups) -> None:
    """Has the hooks that stand on `parameter`, and those registered from now on, served with its whole gradient."""
    setattr(parameter, _PART, (cut, groups))
    known = parameter._backward_hooks or {}
    for key, hook in known.items():
        known[key] = _with_whole(hook, cut, groups)
    # Weak: a parameter that holds itself would keep its memory until Python's collector runs.
    itself: Any = weakref.ref(parameter)
    tagged: Any = parameter
    tagged.register_hook = functools.partial(_register, itself)
    tagged.register_post_accumulate_grad_hook = functools.partial(_register_behind, itself)


def refuse_post_hooks(model: nn.Module) -> None:
    """Raises PlanError for hooks behind the accumulation that were registered before sharding and do not take parts."""
    for name, parameter in model.named_parameters():
        if not all(map(_takes_parts, (parameter._post_accumulate_grad_hooks or {}).values())):
            raise PlanError(
                f"a hook behind the accumulation of the gradient (register_post_accumulate_grad_hook) stands on {name}, and would "
                f"see what a rank holds of it; {_WAY_OUT}"
            )


def is_cut(parameter: Tensor) -> bool:
    """Whether `parameter` is a sharded model's and holds a part of a whole."""
    return hasattr(parameter, _PART)


def train_rows(parameter: nn.Parameter, rows: Tensor | Iterable[int]) -> RemovableHandle:
    """Zeroes the gradient of all rows of `parameter` but `rows`, counted in the whole parameter: new tokens of an embedding, say.

    The same on a sharded parameter and on any other, and without a gather. Weight decay moves the other rows nevertheless.
    Raises ConfigError for rows that there are not.
    """
    part: tuple[Cut, ParallelGroups] | None = getattr(parameter, _PART, None)
    if part is not None and part[0].dim % parameter.dim() != 0:
        part = None  # every rank holds all rows
    size = part[0].size if part is not None else parameter.shape[0]
    wanted = torch.as_tensor(rows if isinstance(rows, Tensor) else list(rows), dtype=torch.long, device="cpu")
    if wanted.numel() and not (0 <= int(wanted.min()) and int(wanted.max()) < size):
        raise ConfigError(f"rows {int(wanted.min())} to {int(wanted.max())} are not all among the {size} rows of the parameter")
    others = torch.ones(size, dtype=torch.bool).index_fill(0, wanted, False)
    held = {"others": others if part is None else part_of(others, part[0], part[1].tp_rank)}

    def keep(grad: Tensor) -> Tensor:
        if held["others"].device != grad.device:
            held["others"] = held["others"].to(grad.device)
        return grad.masked_fill(held["others"].view(-1, *(1,) * (grad.dim() - 1)), 0.0)

    handle: RemovableHandle = parameter.register_hook(keep)  # ours, so that it takes parts
    return handle


def _takes_parts(hook: Hook) -> bool:
    inner = getattr(hook, "func", hook)  # of a partial
    return getattr(hook, "takes_parts", False) or (getattr(inner, "__module__", None) or "").partition(".")[0] in _KNOW_PARTS


def _register(itself: Callable[[], nn.Parameter], hook: Hook) -> RemovableHandle:
    parameter = itself()
    return Tensor.register_hook(parameter, _with_whole(hook, *getattr(parameter, _PART)))  # type: ignore[no-any-return, no-untyped-call]


def _register_behind(itself: Callable[[], nn.Parameter], hook: Hook) -> RemovableHandle:
    parameter = itself()
    if not _takes_parts(hook):
        cut = getattr(parameter, _PART)[0]
        raise PlanError(
            f"a hook behind the accumulation of the gradient would see {list(parameter.shape)} of a parameter that is cut, whose "
            f"dimension {cut.dim} is {cut.size} as a whole; {_WAY_OUT}"
        )
    return Tensor.register_post_accumulate_grad_hook(parameter, hook)  # type: ignore[no-any-return, no-untyped-call]


def _with_whole(hook: Hook, cut: Cut, groups: ParallelGroups) -> Hook:
    if _takes_parts(hook):
        return hook

    def served(part: Tensor) -> Tensor | None:
        whole = gather_parameter(part, cut, groups.tp_group)
        was = whole._version
        result = hook(whole)
        if result is None and whole._version == was:
            return None  # it only looked
        changed = whole if result is None else result
        if changed.shape != whole.shape:
            raise ValueError(f"a gradient hook returned {list(changed.shape)} for a gradient of {list(whole.shape)}")
        return part_of(changed, cut, groups.tp_rank)

    return served
