"""DeepSpeed's own tensor-parallel and data-parallel groups."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from deepspeed import comm
from deepspeed.accelerator import get_accelerator
from deepspeed.utils import groups as ds_groups
from torch.distributed import ProcessGroup

from ..config import KEY, SeqParConfig
from ..errors import ConfigError
from ..groups import ParallelGroups
from .arguments import ds_config_of, translate

__all__ = ["data_parallel_group", "groups_of", "tensor_parallel_groups"]


def groups_of(config: Mapping[str, Any] | str | os.PathLike[str]) -> tuple[ParallelGroups, SeqParConfig] | None:
    """The groups that a DeepSpeed config asks for, made if need be, and its key; None if it does not hold it, or disables it."""
    ds_config = ds_config_of({"config": dict(config) if isinstance(config, Mapping) else os.fspath(config)})
    if ds_config is None or KEY not in ds_config:
        return None
    section = SeqParConfig.from_json(ds_config[KEY])
    if not section.enabled:
        return None
    if not comm.is_initialized():
        comm.init_distributed(dist_backend=get_accelerator().communication_backend_name())
    translate(ds_config, section)
    return tensor_parallel_groups(section.tp_size), section


def tensor_parallel_groups(tp_size: int) -> ParallelGroups:
    """This process's groups of `tp_size` consecutive ranks, made once; raises ConfigError where it has others."""
    ds_groups._init_tp_mesh_device(tensor_model_parallel_size=tp_size)
    group = ds_groups.get_tensor_model_parallel_group()
    have = comm.get_world_size(group)
    if have != tp_size:
        raise ConfigError(
            f'"{KEY}.tp_size": {tp_size}, but this process already has tensor-parallel groups of {have} for another model; '
            "DeepSpeed keeps one size a process: use the same tp_size for all models, or another process"
        )
    return ParallelGroups.around(group)


def data_parallel_group() -> ProcessGroup | None:
    """The ranks that hold the same part of the model as this one; None before any model was sharded."""
    made = ds_groups._TENSOR_MODEL_PARALLEL_GROUP is not None
    return ds_groups.get_data_parallel_group() if made else None
