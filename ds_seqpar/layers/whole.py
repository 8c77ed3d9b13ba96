"""Sums and norms over whole parameters, of which the ranks of a tensor-parallel group hold parts.

What a user's code adds up over `model.parameters()` (a penalty, the norm that clips gradients) is over this rank's parts. Here cut
parameters are summed over the group, copies of key/value heads are counted once, and what every rank holds whole is counted once.

Private name of torch's it relies on, held by a contract test: `torch.nn.utils.clip_grad._get_total_norm`, which clip_grad_norm_ calls.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.nn.utils import clip_grad
from torch.utils.weak import WeakIdKeyDictionary

from ..comm.regions import reduce_partial
from ..errors import SeqParError
from ..groups import ParallelGroups
from ..plan.report import ParameterEntry

__all__ = ["parameter_sum", "remember"]

_KNOWN: Any = WeakIdKeyDictionary()
"""Parameter of a sharded model -> (its group, how many ranks hold the same part; 0 for what every rank holds whole)."""


def remember(parameter: Tensor, entry: ParameterEntry, groups: ParallelGroups) -> None:
    """From now on `parameter` is one of a sharded model, and torch's gradient norms are of whole gradients where it is among them."""
    copies = 0 if entry.cut is None else entry.cut.ranges.count(entry.cut.ranges[groups.tp_rank])
    _KNOWN[parameter] = groups.tp_group, copies
    if not getattr(clip_grad._get_total_norm, "_knows_ds_seqpar", False):
        plain = clip_grad._get_total_norm
        wrapped = functools.wraps(plain)(functools.partial(_total_norm, plain))
        wrapped._knows_ds_seqpar = True  # type: ignore[attr-defined]
        clip_grad._get_total_norm = torch.nn.utils.get_total_norm = wrapped


def parameter_sum(parameters: Iterable[Tensor], function: Callable[[Tensor], Tensor]) -> Tensor:
    """The sum of `function(parameter)`, a scalar, over whole parameters; the same on every rank, with the unsharded gradients.

        loss = outputs.loss + 1e-4 * ds_seqpar.parameter_sum(model.parameters(), lambda p: p.square().sum())

    `function` must add up over the elements of a parameter (squares, absolute values, distances from old values), because of a cut
    parameter it is given this rank's part. Collective over the tensor-parallel group. Of a model that is not sharded it is the
    plain sum.

    Raises:
        SeqParError: ZeRO-3 holds a parameter in parts.
    """
    group, parts, wholes = None, [], []
    for parameter in parameters:
        if getattr(parameter, "ds_id", None) is not None and parameter.numel() == 0:
            raise SeqParError(
                "ZeRO-3 holds the parameters in parts, of which no sum over whole ones can be made here; use ZeRO stage 2 or lower, or "
                "deepspeed.zero.GatheredParameters around it"
            )
        value = function(parameter)
        found, copies = _KNOWN.get(parameter, (None, 0))
        group = group or found
        if copies:
            parts.append(value + (value / copies - value).detach())  # each copy has the whole gradient
        else:
            wholes.append(value)
    total = torch.stack(wholes).sum() if wholes else torch.zeros(())
    if group is None:
        return total
    here = torch.stack(parts).sum() if parts else torch.zeros((), device=total.device)
    return total.to(here.device) + reduce_partial(here.reshape(1), group).reshape(())


def _total_norm(
    plain: Callable[..., Tensor],
    tensors: Tensor | Iterable[Tensor],
    norm_type: float = 2.0,
    error_if_nonfinite: bool = False,
    foreach: bool | None = None,
) -> Tensor:
    given = [tensors] if isinstance(tensors, Tensor) else list(tensors)
    by_grad = {id(p.grad): known for p, known in _KNOWN.items() if p.grad is not None}
    found = [by_grad.get(id(x)) or _KNOWN.get(x) for x in given]
    group: ProcessGroup | None = next((known[0] for known in found if known), None)
    if group is None:
        return plain(given, norm_type, error_if_nonfinite, foreach)
    parts = [(x, known[1]) for x, known in zip(given, found, strict=True) if known and known[1]]
    wholes = [x for x, known in zip(given, found, strict=True) if not (known and known[1])]
    norm = _joined(plain, parts, wholes, float(norm_type), foreach, group, given[0].device)
    if error_if_nonfinite and not bool(torch.isfinite(norm)):
        raise RuntimeError(f"the total norm of order {norm_type} for gradients is {float(norm)}, so they cannot be clipped")
    return norm


def _joined(
    plain: Callable[..., Tensor], parts: list[tuple[Tensor, int]], wholes: list[Tensor], p: float, foreach: bool | None,
    group: ProcessGroup, device: torch.device,
) -> Tensor:  # fmt: skip
    """The norm of all, from those of the parts that as many ranks hold, and of what every rank holds."""
    zero = torch.zeros((), device=device)
    norms = {
        copies: plain([x for x, n in parts if n == copies], p, False, foreach) for copies in sorted({n for _, n in parts})
    }
    whole = plain(wholes, p, False, foreach) if wholes else zero
    if math.isinf(p):
        here = torch.stack([zero, *norms.values()]).max()
        dist.all_reduce(here, dist.ReduceOp.MAX, group=group)
        return torch.maximum(here, whole.to(device))
    here = sum((norm.to(device).float() ** p / copies for copies, norm in norms.items()), zero)
    dist.all_reduce(here, group=group)
    return ((here + whole.to(device).float() ** p) ** (1.0 / p)).to(whole.dtype if wholes else here.dtype)
