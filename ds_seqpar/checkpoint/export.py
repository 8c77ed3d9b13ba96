"""Writes an ordinary Hugging Face checkpoint from a sharded model."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import torch.distributed as dist
from safetensors import SafetensorError
from torch import Tensor, nn

from ..engine import gathered, whole_parameter
from ..errors import CheckpointError
from ..hf import require_model, write_checkpoint
from ..layers.region import ShardingState

__all__ = ["full_state_dict", "save_pretrained"]

WEIGHT_FILES = ("model*.safetensors", "model*.index.json", "pytorch_model*.bin", "pytorch_model*.index.json")
"""What an older checkpoint in the same folder must not leave behind: it would be loaded with the new one."""


def full_state_dict(engine_or_model: Any) -> dict[str, Tensor]:
    """The model's state dict with every tensor whole: on CPU on rank 0, empty elsewhere. Collective over the world.

    Names, shapes and tying are those of the unsharded model; the dtype is the model's.
    """
    model, _ = gathered(engine_or_model)
    state: ShardingState = require_model(model).seqpar
    keep = dist.get_rank() == 0
    whole: dict[str, Tensor] = {}
    by_identity: dict[int, Tensor] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if id(parameter) not in by_identity:
            tensor = whole_parameter(parameter, state.entries[id(parameter)], state.groups)
            by_identity[id(parameter)] = tensor.cpu() if keep else tensor.new_empty(0)
        if keep:
            whole[name] = by_identity[id(parameter)]
    if keep:
        whole.update({name: tensor.detach().cpu() for name, tensor in _saved_buffers(model).items()})
    dist.barrier()  # a rank that holds nothing must not leave, or exit, while the others still gather from it
    return whole


def save_pretrained(engine_or_model: Any, folder: str | os.PathLike[str], tokenizer: Any = None) -> None:
    """Writes an ordinary Hugging Face checkpoint: config, weights as safetensors, tokenizer if given. Call it on all ranks.

    Written aside and renamed when complete; a checkpoint that `folder` held before is replaced only then, and other files
    in it stay.

    Raises:
        CheckpointError: on every rank, if the folder cannot be written.
    """
    target = Path(folder).resolve()
    weights = full_state_dict(engine_or_model)
    model, _ = gathered(engine_or_model)
    error: list[str | None] = [None]
    if dist.get_rank() == 0:
        try:
            _write_aside(model, target, weights, tokenizer)
        except (OSError, SafetensorError, RuntimeError, ValueError) as problem:
            error[0] = f"{target}: {problem}"
    dist.broadcast_object_list(error, src=0)
    if error[0] is not None:
        raise CheckpointError(f"the checkpoint was not written: {error[0]}")


def _write_aside(model: nn.Module, target: Path, weights: dict[str, Tensor], tokenizer: Any) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    aside, before = (target.with_name(f".{target.name}.{word}") for word in ("partial", "before"))
    _recover(target, before)
    shutil.rmtree(aside, ignore_errors=True)
    write_checkpoint(model, aside, weights, tokenizer)
    if target.exists():
        target.rename(before)
    aside.rename(target)
    _recover(target, before)


def _recover(target: Path, before: Path) -> None:
    """Ends a replacement: the old folder comes back if there is no new one, otherwise its other files move over."""
    if not before.exists():
        return
    if not target.exists():
        before.rename(target)
        return
    for entry in before.iterdir():
        if not (target / entry.name).exists() and not any(entry.match(pattern) for pattern in WEIGHT_FILES):
            entry.rename(target / entry.name)
    shutil.rmtree(before)


def _saved_buffers(model: nn.Module) -> dict[str, Tensor]:
    parameters = dict(model.named_parameters(remove_duplicate=False))
    return {name: tensor for name, tensor in model.state_dict().items() if name not in parameters}
