"""Whole parameters out of an engine's parts, and parts into it, at every ZeRO stage."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import deepspeed
from torch import Tensor, nn

from ..checkpoint.gathering import gather_parameter
from ..checkpoint.whole_model import export as write_whole
from ..groups import ParallelGroups
from ..plan.report import ParameterEntry

__all__ = ["export", "save_16bit_model", "whole_parameter", "write_local"]


def whole_parameter(parameter: nn.Parameter, entry: ParameterEntry, groups: ParallelGroups) -> Tensor:
    """A parameter as the checkpoint has it, on this rank's device; gathers ZeRO-3's parts and the cut. Collective."""
    with deepspeed.zero.GatheredParameters([parameter], enabled=hasattr(parameter, "ds_id")):
        data = parameter.detach()
        whole = data.clone() if entry.cut is None else gather_parameter(data, entry.cut, groups.tp_group)
    return whole


def write_local(parameter: nn.Parameter, local: Tensor) -> None:
    """This rank's part into a parameter; every rank that shares a ZeRO-3 partition calls with the same. Collective at ZeRO-3."""
    with deepspeed.zero.GatheredParameters([parameter], modifier_rank=0, enabled=hasattr(parameter, "ds_id")):
        parameter.data.copy_(local)


def export(
    engine_or_model: Any, folder: Path, what: str, weights_name: str, max_shard_size: int | str, **options: Any
) -> None:
    """`checkpoint.whole_model.export`, with parameters that ZeRO-3 may hold in parts."""
    write_whole(engine_or_model, folder, what, weights_name, max_shard_size, gather=whole_parameter, **options)


def save_16bit_model(
    engine: Any,
    plain: Callable[..., Any],
    save_dir: str | os.PathLike[str],
    save_filename: str = "pytorch_model.bin",
    exclude_frozen_parameters: bool = False,
) -> bool:
    """DeepSpeed's `save_16bit_model` with whole tensors, at every ZeRO stage: an ordinary Hugging Face checkpoint.

    Weights beyond 50 GB are split as Hugging Face splits them. A name that ends in .safetensors is written as safetensors.
    """
    export(
        engine,
        Path(save_dir),
        "engine.save_16bit_model",
        save_filename,
        "50GB",
        without_frozen=exclude_frozen_parameters,
    )
    return True
