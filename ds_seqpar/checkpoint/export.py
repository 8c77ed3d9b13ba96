"""Takes a whole model out of a sharded one: as a state dict, or as an ordinary Hugging Face checkpoint."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..engine import export, whole_parameter
from ..hf import require_model
from ..layers.region import ShardingState
from ..plan.wrappers import saved_names
from .rendezvous import meet
from .whole_model import gathered, saved_buffers
from .writing import PICKLED_WEIGHTS, SAFE_WEIGHTS

__all__ = ["full_state_dict", "save_pretrained", "saved_state_dict"]


def full_state_dict(engine_or_model: Any) -> dict[str, Tensor]:
    """The model's state dict with every tensor whole: on CPU on rank 0, empty elsewhere. Call it on all ranks.

    Names, shapes and tying are those of the unsharded model; the dtype is the model's. Raises CheckpointError, naming the
    ranks that are missing, if only some call it.
    """
    model, _ = gathered(engine_or_model)
    return _on_first_rank(model, None)


def saved_state_dict(engine_or_model: Any) -> dict[str, Tensor]:
    """As `full_state_dict`, but of a model in a wrapper of adapters only what the wrapper's `save_pretrained` writes."""
    model, _ = gathered(engine_or_model)
    if model is require_model(model):
        return _on_first_rank(model, None)
    entries = require_model(model).seqpar.entries
    shapes = {
        n: torch.empty(entries[id(p)].shape, device="meta") for n, p in model.named_parameters(remove_duplicate=False)
    }
    shapes |= {name: buffer.to("meta") for name, buffer in saved_buffers(model).items()}
    return _on_first_rank(model, set(saved_names(model, shapes)))


def _on_first_rank(model: nn.Module, only: set[str] | None) -> dict[str, Tensor]:
    state: ShardingState = require_model(model).seqpar
    meet("ds_seqpar.full_state_dict", state.groups.world_cpu_group)
    keep = dist.get_rank() == 0
    whole: dict[str, Tensor] = {}
    by_identity: dict[int, Tensor] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if only is not None and name not in only:
            continue
        if id(parameter) not in by_identity:
            tensor = whole_parameter(parameter, state.entries[id(parameter)], state.groups)
            by_identity[id(parameter)] = tensor.cpu() if keep else tensor.new_empty(0)
        if keep:
            whole[name] = by_identity[id(parameter)]
    if keep:
        buffers = {name: x for name, x in saved_buffers(model).items() if only is None or name in only}
        whole.update({name: tensor.detach().cpu() for name, tensor in buffers.items()})
    dist.barrier()  # a rank that holds nothing must not leave, or exit, while the others still gather from it
    return whole


def save_pretrained(
    engine_or_model: Any,
    folder: str | os.PathLike[str],
    tokenizer: Any = None,
    *,
    max_shard_size: int | str = "50GB",
    safe_serialization: bool = True,
) -> None:
    """Writes an ordinary Hugging Face checkpoint: config, weights, tokenizer if given. Call it on all ranks.

    Tensors are gathered and written one after the other, so rank 0 holds a few of them at a time (with
    `safe_serialization=False` one file's). Written aside and renamed when complete; a checkpoint that `folder` held before is
    replaced only then, and other files in it stay.

    Args:
        max_shard_size: bytes of a weight file at most, or "5GB"; a tensor that is larger gets a file of its own. Adapters are one
            file whatever is given.
        safe_serialization: safetensors; otherwise files of torch.save.

    Raises:
        CheckpointError: on every rank, if the folder cannot be written, or if only some ranks call it.
    """
    name = SAFE_WEIGHTS if safe_serialization else PICKLED_WEIGHTS
    export(engine_or_model, Path(folder), "ds_seqpar.save_pretrained", name, max_shard_size, tokenizer=tokenizer)
