"""A training run that can be stopped after any step, and everything in it that a checkpoint must bring back."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state
from exactness import engine_for
from models import batches, tiny
from peft import LoraConfig, get_peft_model
from torch import Tensor

import ds_seqpar
from ds_seqpar.checkpoint.gathering import gather_parameter
from ds_seqpar.hf import require_model

__all__ = ["ACCUMULATION", "adapted", "engine_at", "optimizer_states", "random_draws", "run"]

ACCUMULATION = 2
SCHEDULER = {"type": "WarmupDecayLR", "params": {"warmup_num_steps": 3, "total_num_steps": 12, "warmup_max_lr": 1e-2}}


def engine_at(
    family: str, tp: int, stage: int, *, dtype: torch.dtype = torch.float32, groups: int = 2, own: dict[str, Any] | None = None,
    seed: int = 0, freeze: tuple[str, ...] = (), lora: bool = False,
    optimizer_class: Any = torch.optim.AdamW, **ds: Any,
) -> Any:  # fmt: skip
    """AdamW, clipped, with weight decay on matrices alone (`groups` = 2) and a schedule.

    Names that hold a word of `freeze` are frozen; with `lora` all but the adapters. Another `seed` gives other weights.
    """
    model = tiny(family, dtype=dtype, **(own or {})).train()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(not any(word in name for word in freeze))
    if lora:
        model = adapted(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(seed)
    trained = [p for p in model.parameters() if p.requires_grad]
    sets: list[dict[str, Any]] = [{"params": trained}]
    if groups == 2:
        sets = [
            {"params": [p for p in trained if p.dim() > 1], "weight_decay": 0.1},
            {"params": [p for p in trained if p.dim() == 1], "weight_decay": 0.0},
        ]
        sets = [group for group in sets if group["params"]]
    optimizer = optimizer_class(sets, lr=1e-2, eps=1e-6)
    if dtype == torch.bfloat16:
        ds["bf16"] = {"enabled": True}
    clipping = 0.0 if stage == 0 and dtype == torch.bfloat16 else 0.5
    return engine_for(
        model,
        optimizer,
        {"tp_size": tp},
        stage,
        1,
        ACCUMULATION,
        **{n: x for n, x in {"gradient_clipping": clipping, "scheduler": SCHEDULER, **ds}.items() if x is not None},
    )


def adapted(model: Any) -> Any:
    """LoRA beside every linear, of which both factors do something: B starts at zero otherwise."""
    settings = LoraConfig(task_type="CAUSAL_LM", target_modules="all-linear", r=3, lora_alpha=5)
    torch.manual_seed(3)
    model = get_peft_model(model, settings, autocast_adapter_dtype=False).train()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.copy_(torch.randn_like(parameter) * 0.1)
    return model


def run(engine: Any, first: int, last: int) -> list[float]:
    """Steps `first` to `last`, on data that depends on the step alone; every micro batch's loss, mean over the dp ranks."""
    dp = dist.get_world_size() // engine.seqpar_report.tp_size
    dp_rank = dist.get_rank() // engine.seqpar_report.tp_size
    losses = []
    for step in range(first, last):
        # Four rows a step whatever dp is, so that runs of different sizes see the same data.
        rows = [b for b in batches(4, 1, seed=100 + step)]
        mine = rows[dp_rank::dp]
        micros = len(mine) // ACCUMULATION
        for i in range(ACCUMULATION):
            batch = {n: torch.cat([m[n] for m in mine[i * micros : (i + 1) * micros]]) for n in mine[0]}
            loss = engine(**batch).loss
            engine.backward(loss)
            engine.step()
            losses.append(float(loss.detach()))
    return losses


def random_draws() -> list[float]:
    """What every generator gives next; draws from them."""
    import random

    import numpy

    return [float(torch.rand(())), random.random(), float(numpy.random.rand())]


def optimizer_states(engine: Any) -> dict[str, Tensor]:
    """Whole master weights and moments by name, on every rank. Collective."""
    state = require_model(engine.module).seqpar
    entries, group = state.entries, state.groups.tp_group
    states: dict[str, Tensor] = {}
    for name, parameter in engine.module.named_parameters():
        if not parameter.requires_grad:
            continue
        for which in ("fp32", "exp_avg", "exp_avg_sq"):
            local = _state(engine, parameter, which)
            cut = entries[id(parameter)].cut
            states[f"{name} {which}"] = local.clone() if cut is None else gather_parameter(local, cut, group)
    step = next(iter(engine.optimizer.state.values()))["step"] if hasattr(engine.optimizer, "state") else 0
    states["step"] = torch.as_tensor(step, dtype=torch.float32)
    states["hyperparameters"] = torch.tensor(
        [[g["lr"], g["weight_decay"]] for g in engine.optimizer.param_groups], dtype=torch.float64
    )
    return states


def _state(engine: Any, parameter: Any, which: str) -> Tensor:
    if engine.zero_optimization_stage() in (1, 2):
        return _from_partitions(engine.optimizer, parameter, which)
    if engine.zero_optimization_stage() == 3:
        if which == "fp32":
            return safe_get_full_fp32_param(parameter)
        return safe_get_full_optimizer_state(parameter, which)
    if not engine.bfloat16_enabled():
        return parameter.detach() if which == "fp32" else engine.optimizer.state[parameter][which]
    for group16, group32 in zip(engine.optimizer.fp16_groups, engine.optimizer.fp32_groups, strict=True):
        for half, master in zip(group16, group32, strict=True):
            if half is parameter:
                return master.detach() if which == "fp32" else engine.optimizer.optimizer.state[master][which]
    raise AssertionError("the optimizer does not hold this parameter")


def weights(engine: Any) -> dict[str, Tensor]:
    """Whole weights on rank 0. Collective."""
    return ds_seqpar.full_state_dict(engine)


def _from_partitions(optimizer: Any, parameter: Any, which: str) -> Tensor:
    """DeepSpeed's own reader finds no moments in the second of two parameter groups at stages 1 and 2."""
    local = torch.zeros(parameter.numel(), device=parameter.device)
    mapping = parameter._hp_mapping
    if mapping is not None:
        flat = optimizer.single_partition_of_fp32_groups[mapping.param_group_index]
        source = flat if which == "fp32" else optimizer.optimizer.state[flat][which]
        here, there = mapping.lp_fragment_address, mapping.hp_fragment_address
        local[here.start : here.start + here.numel] = source.detach()[there.start : there.start + there.numel]
    dist.all_reduce(local, group=parameter._dp_group)
    return local.view(parameter.shape)
