"""What DeepSpeed reads off a sharded model and its parameters."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import deepspeed
from deepspeed.checkpoint.affine import AFFINE_MAP_FORMAT_VERSION
from deepspeed.checkpoint.constants import (
    AFFINE_MAP,
    AFFINE_MAP_PARAMS,
    AFFINE_MAP_VERSION,
    DS_AUTOTP_UC_META,
    UNIVERSAL_CHECKPOINT_VERSION_KEY,
    UNIVERSAL_CHECKPOINT_VERSION_VALUE,
)
from deepspeed.utils import set_z3_leaf_module
from torch import nn

from ..checkpoint.gathering import gather_parameter, part_of
from ..checkpoint.universal import affine_map, affine_maps
from ..groups import ParallelGroups
from ..hf import require_model
from ..layers.boundaries import ShardedBlock
from ..layers.linear import ColumnParallelLinear
from ..plan.report import ParameterEntry

__all__ = ["fetch_experts_as_one", "tag"]


def tag(model: nn.Module, groups: ParallelGroups) -> None:
    """Tells DeepSpeed what it must know of the shards: whose norm counts, how they become whole, what ZeRO-3 fetches at once."""
    model.ds_autotp_parsed = require_model(model).ds_autotp_parsed = True  # type: ignore[assignment]
    by_identity: dict[int, ParameterEntry] = require_model(model).seqpar.entries
    named = dict(model.named_parameters())
    entries = {name: by_identity[id(p)] for name, p in named.items()}
    maps = {name: affine_map(entry.shape, entry.cut, groups.tp_size) for name, entry in entries.items()}
    model.universal_checkpoint_info = {  # type: ignore[assignment]
        UNIVERSAL_CHECKPOINT_VERSION_KEY: UNIVERSAL_CHECKPOINT_VERSION_VALUE,
        AFFINE_MAP: {AFFINE_MAP_VERSION: AFFINE_MAP_FORMAT_VERSION, AFFINE_MAP_PARAMS: affine_maps(maps)},
    }
    for name, parameter in named.items():
        setattr(parameter, DS_AUTOTP_UC_META, {"conversion": {"affine_map": maps[name]}})
        cut = by_identity[id(parameter)].cut
        if cut is None:
            continue
        tagged: Any = parameter
        # A part held by several ranks counts once; parameters without the tag count on the first rank only.
        tagged.tensor_model_parallel = cut.is_first_holder(groups.tp_rank)
        tagged.ds_is_replaced_module = True
        tagged.gather_params = functools.partial(_gather_in_place, entries=by_identity, groups=groups)
        tagged._tp_partition = functools.partial(_cut_in_place, entries=by_identity, groups=groups)
    for module in model.modules():
        if isinstance(module, ShardedBlock):
            # The block's column-parallel linears are computed together, so under ZeRO-3 the block fetches and releases them.
            for linear in module.modules():
                if isinstance(linear, ColumnParallelLinear):
                    for parameter in linear.parameters(recurse=False):
                        deepspeed.zero.register_external_parameter(module, parameter)


def _gather_in_place(
    parameters: Sequence[nn.Parameter | None], *, entries: Mapping[int, ParameterEntry], groups: ParallelGroups
) -> None:
    for parameter in parameters:
        cut = entries[id(parameter)].cut if parameter is not None else None
        if parameter is not None and cut is not None and parameter.shape[cut.dim] != cut.size:
            parameter.data = gather_parameter(parameter.data, cut, groups.tp_group)


def _cut_in_place(
    parameters: Sequence[nn.Parameter | None], *, entries: Mapping[int, ParameterEntry], groups: ParallelGroups
) -> None:
    for parameter in parameters:
        cut = entries[id(parameter)].cut if parameter is not None else None
        if parameter is not None and cut is not None and parameter.shape[cut.dim] == cut.size:
            parameter.data = part_of(parameter.data, cut, groups.tp_rank)


def fetch_experts_as_one(model: nn.Module) -> None:
    """Keeps ZeRO-3 out of what stands inside a module of stacked experts, [E, out, in].

    It gathers in the order in which modules were called before. Experts that run one by one call their activation once for each that
    was chosen, which differs between data-parallel ranks, and their gathers would no longer meet.
    """
    for module in model.modules():
        own = module.parameters(recurse=False)
        stacked = any(parameter.dim() == 3 and parameter.shape[0] > 1 for parameter in own)
        if stacked and next(module.children(), None) is not None:
            set_z3_leaf_module(module, True)
