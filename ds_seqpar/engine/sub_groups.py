"""ZeRO 3's sub-groups: as many on every rank of a tensor-parallel group.

At stage 3 DeepSpeed cuts a rank's parameters into sub-groups by their elements (stage3.py:1210, `_create_fp16_sub_groups`) and sums the
gradient norm over the tensor-parallel group once for each (stage3.py:2573, `_get_norm_groups`, to :2419 and, with an offloaded optimizer,
:1975). Ranks whose parts are uneven can have different numbers of them: the sums then pair with other sums, or wait for ever.

Found nowhere else: stages 1 and 2 sum the norm once for each group of the optimizer (stage_1_and_2.py:2946), the overflow once a step
(stage3.py:3040, stage_1_and_2.py:3246), and buckets and prefetches run over the data-parallel ranks, whose parts are of one size.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch.distributed as dist
from torch import nn

from ..hf import require_model
from ..plan.report import Report

__all__ = ["equal_size", "even_sub_groups", "sub_groups"]

DEFAULT_SIZE = 10**9
"""DeepSpeed's "sub_group_size"."""


def even_sub_groups(given: dict[str, Any], translated: dict[str, Any], report: Report) -> None:
    """Raises "sub_group_size" in `translated` as far as the ranks of a group need to have equally many; the report says so."""
    zero = translated.get("zero_optimization") or {}
    groups = require_model(given["model"]).seqpar.groups
    if zero.get("stage", 0) != 3 or groups.tp_size == 1:
        return
    dp_size = dist.get_world_size() // groups.tp_size
    mine = [[-(-p.numel() // dp_size) for p in group if p.requires_grad] for group in _parameter_groups(given)]
    everyone: list[Any] = [None] * groups.tp_size
    dist.all_gather_object(everyone, mine, group=groups.tp_cpu_group)
    size = zero.get("sub_group_size", DEFAULT_SIZE)
    needed = equal_size(everyone, size)
    if needed != size:
        zero["sub_group_size"] = needed
        report.remark_later(
            f'"zero_optimization.sub_group_size" is {needed} in place of {size}: the ranks hold parts of different sizes, and must '
            "have equally many sub-groups"
        )


def _parameter_groups(given: dict[str, Any]) -> list[list[nn.Parameter]]:
    """The optimizer's groups; where DeepSpeed builds the optimizer, those it is given, or all parameters in one."""
    groups: list[Any] | None = getattr(given.get("optimizer"), "param_groups", None)
    if groups is None and given.get("model_parameters") is not None:
        groups = given["model_parameters"] = list(given["model_parameters"])  # it may be an iterator, which is read once
    if groups is None:
        groups = list(given["model"].parameters())
    if groups and isinstance(groups[0], dict):
        return [list(group["params"]) for group in groups]
    return [groups]


def sub_groups(sizes: Sequence[int], size: int) -> int:
    """How many sub-groups DeepSpeed makes of parameters of `sizes`, in order."""
    count, filled = 0, 0
    for elements in sizes:
        filled += elements
        if filled >= size:
            count, filled = count + 1, 0
    return count + (filled > 0)


def equal_size(everyone: Sequence[Sequence[Sequence[int]]], size: int) -> int:
    """The given size, or a somewhat larger one, at which all ranks have equally many sub-groups in each group."""
    while len({tuple(sub_groups(sizes, size) for sizes in rank) for rank in everyone}) > 1:
        size += size // 16 + 1  # ends: at the size of the largest group everyone has one
    return size
