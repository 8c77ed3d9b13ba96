"""ds_seqpar's layers in a plain loop without an engine, as the DTensor and Megatron-core arms run."""

from __future__ import annotations

from typing import Any

import torch.distributed as dist
from harness.case import Case
from harness.measure import device_of_rank
from harness.weights import hf_model
from harness.workload import MasterAdamW, Workload
from torch import Tensor

import ds_seqpar

__all__ = ["build"]


def build(case: Case, **key: Any) -> Workload:
    """`key` is added to the `ds_seqpar` object."""
    model = hf_model(case, device_of_rank())
    ds_seqpar.shard(model, {"tp_size": dist.get_world_size(), "recompute": case.recompute, **key})
    model.train()
    optimizer = MasterAdamW(model.parameters())

    def forward(tokens: Tensor) -> Tensor:
        loss: Tensor = model(input_ids=tokens, labels=tokens, use_cache=False).loss
        return loss

    def step() -> None:
        optimizer.step()
        model.seqpar.generation += 1  # type: ignore[union-attr, operator]

    return Workload(model, forward, lambda loss: loss.backward(), step)
