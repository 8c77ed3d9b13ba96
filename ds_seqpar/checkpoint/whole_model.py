"""A sharded model as the whole it stands for: which tensors it has, and their way, one by one, into a Hugging Face checkpoint."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import PlanError
from ..groups import ParallelGroups
from ..hf import require_model
from ..inject import report_of
from ..layers.region import ShardingState
from ..plan.report import ParameterEntry, Report
from ..plan.wrappers import saved_names
from .rendezvous import meet
from .writing import write_together, write_wrapper_together

__all__ = ["Gather", "export", "gathered", "saved_buffers"]

Gather = Callable[[nn.Parameter, ParameterEntry, ParallelGroups], Tensor]


def gathered(engine_or_model: Any) -> tuple[nn.Module, Report]:
    """(model, report) of an engine or a sharded model, the model in its wrapper. Raises PlanError for anything else."""
    model = getattr(engine_or_model, "module", engine_or_model)
    report = report_of(model) if isinstance(model, nn.Module) else None
    if report is None:
        raise PlanError(f"{type(engine_or_model).__name__} holds no model that ds_seqpar sharded")
    return model, report


def saved_buffers(model: nn.Module) -> dict[str, Tensor]:
    """The buffers that a checkpoint holds, by name."""
    parameters = dict(model.named_parameters(remove_duplicate=False))
    return {name: tensor for name, tensor in model.state_dict().items() if name not in parameters}


def export(
    engine_or_model: Any, folder: Path, what: str, weights_name: str, max_shard_size: int | str, *, gather: Gather,
    tokenizer: Any = None, without_frozen: bool = False,
) -> None:  # fmt: skip
    """Writes an ordinary Hugging Face checkpoint from all ranks; `what` is the call that a user made; `gather` makes a parameter whole.

    A wrapper (of adapters) writes its own part, in its own way.
    """
    model, _ = gathered(engine_or_model)
    inner = require_model(model)
    state: ShardingState = inner.seqpar
    meet(what, state.groups.world_cpu_group)
    buffers, parameters = saved_buffers(model), dict(model.named_parameters(remove_duplicate=False))
    entries = {name: state.entries[id(p)] for name, p in parameters.items()}
    whole = {
        name: torch.empty(entries[name].shape, dtype=p.dtype, device="meta")
        for name, p in parameters.items()
        if p.requires_grad or not without_frozen
    }
    whole |= {name: buffer.to("meta") for name, buffer in buffers.items()}

    def fetch(name: str) -> Tensor:
        if name in buffers:
            return buffers[name]
        return gather(parameters[name], entries[name], state.groups)

    if model is not inner:
        whole = {name: whole[name] for name in saved_names(model, whole)}
        write_wrapper_together(
            model, folder.resolve(), whole, fetch, state.groups.world_cpu_group, weights_name=weights_name, tokenizer=tokenizer
        )  # fmt: skip
        return
    write_together(
        inner, folder.resolve(), whole, fetch, state.groups.world_cpu_group, max_shard_size=max_shard_size,
        weights_name=weights_name, tokenizer=tokenizer,
    )  # fmt: skip
