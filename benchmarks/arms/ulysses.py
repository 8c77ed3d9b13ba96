"""DeepSpeed Ulysses over ZeRO-3, with ALST's tiled loss and tiled MLP or without.

Each rank of a group of n holds T/n tokens of all layers; attention exchanges tokens for heads. ZeRO-3 averages gradients over
all ranks, so a rank's loss is its own sum x n / (T - 1). The division stands inside the tiled function, because TiledFusedLogitsLoss runs
its backward at once, and a factor applied to its result would miss the head's weight.
"""

from __future__ import annotations

import math
import types
from functools import cache
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.runtime.sequence_parallel.ulysses_sp import TiledFusedLogitsLoss, TiledMLP, UlyssesSPAttentionHF
from harness.case import Case
from harness.measure import device_of_rank
from harness.weights import hf_model
from harness.workload import Workload, adamw, engine_config
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, pad

__all__ = ["build"]

LOGITS_GIB = 1.0  # fp32 logits of one tile of the loss


def build(case: Case, tiled: bool) -> Workload:
    """ZeRO-3 whatever the case says: below it DeepSpeed multiplies the gradients by the number of ranks."""
    model = hf_model(case, device_of_rank())
    if case.full_recompute:
        model.gradient_checkpointing_enable()
    mpu = _registered(model, case.tp_size)
    ranks, rank = case.tp_size, dist.get_rank() % case.tp_size
    if case.tokens % ranks:
        raise ValueError(f"Ulysses cannot cut {case.tokens} tokens over {ranks} ranks")
    local = case.tokens // ranks
    scale = ranks / (case.tokens - 1)
    _own_forward(model, scale, tiled)
    if tiled:
        for layer in model.model.layers:
            layer.mlp.forward = types.MethodType(_tiled_mlp, layer.mlp)
    config = {**engine_config(case), "zero_optimization": {"stage": 3}, "sequence_parallel_size": ranks}
    engine, *_ = deepspeed.initialize(model=model, optimizer=adamw, config=config, mpu=mpu)
    mine = slice(rank * local, (rank + 1) * local)

    def forward(tokens: Tensor) -> Tensor:
        targets = pad(tokens[:, 1:], (0, 1), value=-100)
        positions = torch.arange(case.tokens, device=tokens.device)[None]
        loss: Tensor = engine(tokens[:, mine], positions[:, mine], targets[:, mine])
        return loss

    def reported(loss: Tensor) -> float:
        total = loss.clone()
        dist.all_reduce(total)
        return float(total) / dist.get_world_size()

    return Workload(engine, forward, engine.backward, engine.step, reported, dist.get_world_size() // ranks)


_mpus: list[Any] = []


def _registered(model: nn.Module, ranks: int) -> Any:
    """Ulysses wraps transformers' attention function: once a process, or it would wrap itself."""
    if not _mpus:
        _mpus.append(
            UlyssesSPAttentionHF.register_with_transformers(
                model_name_or_path=model,
                core_attn_implementation="sdpa",
                sequence_parallel_size=ranks,
                micro_batch_size=1,
                seq_length_is_variable=True,
            )
        )
    return _mpus[0]


def _own_forward(model: Any, scale: float, tiled: bool) -> None:
    """Gives the model a forward(ids, positions, targets) -> loss, as the shards need a loss of their own."""

    def loss_of(module: Any, hidden: Tensor, targets: Tensor) -> Tensor:
        logits = module.lm_head(hidden).float()
        return cross_entropy(logits.flatten(0, -2), targets.flatten(), reduction="sum", ignore_index=-100) * scale

    def forward(self: Any, ids: Tensor, positions: Tensor, targets: Tensor) -> Tensor:
        hidden = self.model(input_ids=ids, position_ids=positions, use_cache=False).last_hidden_state
        if not tiled:
            return loss_of(self, hidden, targets)
        tiles = max(1, math.ceil(hidden.shape[1] * self.config.vocab_size * 4 / 2**30 / LOGITS_GIB))
        loss: Tensor = TiledFusedLogitsLoss.apply(
            loss_of, self, hidden, targets, None, tiles, [self.lm_head.weight], "sum"
        )
        return loss

    model.forward = types.MethodType(forward, model)


@cache
def _tiles(tokens: int, hidden: int) -> int:
    return math.ceil(tokens / hidden)


def _tiled_mlp(self: Any, x: Tensor) -> Tensor:
    """As DeepSpeed documents it for Llama: one tile for every `hidden` tokens."""

    def mlp(module: Any, part: Tensor) -> Tensor:
        y: Tensor = module.down_proj(module.act_fn(module.gate_proj(part)) * module.up_proj(part))
        return y

    weights = [self.down_proj.weight, self.gate_proj.weight, self.up_proj.weight]
    y: Tensor = TiledMLP.apply(mlp, self, x, _tiles(x.shape[1], x.shape[2]), weights)
    return y
