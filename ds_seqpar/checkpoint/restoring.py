"""What DeepSpeed's loads leave out: frozen parameters and the optimizer at ZeRO stage 0 of a universal checkpoint, a product of betas."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import CheckpointError
from ..layers.region import ShardingState
from .gathering import part_of
from .saved import SavedPartitions
from .universal import MOMENTS, OPTIMIZER

__all__ = ["count_steps_again", "require_weights_alone", "restore_frozen", "restore_optimizer", "weights_alone"]

Member = tuple[nn.Parameter, Tensor]
"""A parameter and where its master weights lie."""


def require_weights_alone(engine: Any, folder: Path, custom_load_fn: object) -> None:
    """Raises CheckpointError where `weights_alone` cannot serve."""
    if engine.zero_optimization_stage() < 3:
        return
    reason = "custom_load_fn" if custom_load_fn is not None else "an optimizer on NVMe" if engine.zero_nvme_offload_optimizer() else ""
    if reason:
        raise CheckpointError(
            f"{folder}: at ZeRO stage 3 the weights cannot be loaded without the optimizer's states with {reason}; load all, or "
            "write the weights with python -m ds_seqpar export and start from them"
        )


@contextmanager
def weights_alone(
    engine: Any, folder: Path, saved: Mapping[str, Any], state: ShardingState, write: Callable[[nn.Parameter, Tensor], None]
) -> Iterator[None]:  # fmt: skip
    """While DeepSpeed loads a checkpoint without its optimizer, its weights are all weights, whatever was frozen then or is now.

        stages 0 to 2   the module's, without a second copy of what was frozen, of which DeepSpeed wants what is frozen now
        stage 3         those of the ranks' parts, by `write`: DeepSpeed loads none (load_module_only), or those of the checkpoint
                        that `latest` names, and of no more than one tensor-parallel rank
    """  # fmt: skip
    plain = engine.load_module_state_dict

    def load(checkpoint: dict[str, Any], *args: Any, **kwargs: Any) -> None:
        checkpoint.pop("frozen_param_fragments", None)
        plain(checkpoint, *args, **kwargs)

    def load_parts(*_: Any, **__: Any) -> None:
        source = SavedPartitions(folder, saved)
        for name, parameter in engine.module.named_parameters():
            if source.has(name):
                write(parameter, source.part(state.groups.tp_rank, name))
        buffers = dict(engine.module.named_buffers())
        for name, tensor in source.buffers().items():
            buffers[name].copy_(tensor)

    replaced: dict[str, Callable[..., Any]] = {"load_module_state_dict": load}
    if engine.zero_optimization_stage() == 3:
        replaced = {"load_module_state_dict": load_parts, "_load_zero_checkpoint": lambda *_, **__: False}
    vars(engine).update(replaced)
    try:
        yield
    finally:
        for name in replaced:
            del vars(engine)[name]


def restore_frozen(
    frozen: Mapping[str, nn.Parameter],
    folder: Path,
    state: ShardingState,
    write: Callable[[nn.Parameter, Tensor], None],
) -> list[str]:
    """Frozen parameters from a universal checkpoint; returns the names that it does not hold, which keep their values.

    `write` puts this rank's part into a parameter, wherever ZeRO-3 keeps it.
    """
    lost = []
    for name, parameter in frozen.items():
        path = folder / "zero" / name / "fp32.pt"
        if path.is_file():
            write(parameter, _part(path, parameter, state))
        else:
            lost.append(name)
    return lost


def restore_optimizer(engine: Any, folder: Path, state: ShardingState) -> None:
    """Weights, moments, steps and hyperparameters at ZeRO stage 0, for optimizers with Adam's states."""
    names = {id(p): name for name, p in engine.module.named_parameters()}
    optimizer = getattr(
        engine.optimizer, "optimizer", engine.optimizer
    )  # in half precision a wrapper holds the masters
    saved = torch.load(folder / "zero" / OPTIMIZER, map_location="cpu")["param_groups"]
    for group, values in zip(optimizer.param_groups, saved, strict=True):
        group.update({key: value for key, value in values.items() if key != "params"})
    for holder, members in _holders(engine.optimizer):
        moments = {moment: torch.zeros_like(holder) for moment in MOMENTS}
        step: Any = None
        offset = 0
        for parameter, master in members:
            where = folder / "zero" / names[id(parameter)]
            master.copy_(_part(where / "fp32.pt", parameter, state).view(master.shape))
            for moment, target in moments.items():
                part = _part(where / f"{moment}.pt", parameter, state)
                target.view(-1)[offset : offset + part.numel()].copy_(part.view(-1))
            parameter.data.copy_(master.view(parameter.shape))
            offset += parameter.numel()
            step = torch.load(where / "step.pt")
        # A tensor of its own for each: an optimizer counts in place.
        optimizer.state[holder] = {"step": torch.as_tensor(step, dtype=torch.float32).clone(), **moments}


def count_steps_again(optimizer: Any) -> None:
    """Brings DeepSpeed's Adam on the host to the step of its loaded state, so that the run goes on bit for bit.

    It keeps beta^step as a running product outside that state; after a load it would take a power, which is rounded otherwise.
    """
    native = getattr(optimizer, "ds_opt_adam", None)
    if native is None:
        return
    nothing = torch.empty(0)
    beta1, beta2 = optimizer.param_groups[0]["betas"]
    for step in range(max((int(state.get("step", 0)) for state in optimizer.state.values()), default=0)):
        native.adam_update(optimizer.opt_id, step + 1, 0.0, beta1, beta2, 1.0, 0.0, True, *[nothing] * 4)


def _holders(optimizer: Any) -> Iterator[tuple[Tensor, list[Member]]]:
    """What the optimizer steps: the parameters, or their fp32 masters, or the masters of a group in one flat tensor."""
    if hasattr(optimizer, "fp32_groups_flat"):
        for flat, parameters in zip(optimizer.fp32_groups_flat, optimizer.fp16_groups, strict=True):
            pieces = flat.data[: sum(p.numel() for p in parameters)].split([p.numel() for p in parameters])
            yield flat, list(zip(parameters, pieces, strict=True))
    elif hasattr(optimizer, "fp32_groups"):
        for masters, parameters in zip(optimizer.fp32_groups, optimizer.fp16_groups, strict=True):
            yield from ((master, [(p, master.data)]) for master, p in zip(masters, parameters, strict=True))
    else:
        yield from ((p, [(p, p.data)]) for group in optimizer.param_groups for p in group["params"])


def _part(path: Path, parameter: nn.Parameter, state: ShardingState) -> Tensor:
    whole: Tensor = torch.load(path, map_location="cpu", mmap=True)["param"]
    cut = state.entries[id(parameter)].cut
    return whole if cut is None else part_of(whole, cut, state.groups.tp_rank)
