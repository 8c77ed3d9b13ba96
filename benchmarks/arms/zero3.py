"""DeepSpeed ZeRO-3 alone: every rank runs whole layers on a sequence of its own and gathers their weights as it goes."""

from __future__ import annotations

import deepspeed
import torch.distributed as dist
from harness.case import Case
from harness.measure import device_of_rank
from harness.weights import hf_model
from harness.workload import Workload, adamw, engine_config, engine_workload

__all__ = ["build"]


def build(case: Case) -> Workload:
    model = hf_model(case, device_of_rank())
    if case.full_recompute:
        model.gradient_checkpointing_enable()
    config = {**engine_config(case), "zero_optimization": {"stage": 3}}
    engine, *_ = deepspeed.initialize(model=model, optimizer=adamw, config=config)
    return engine_workload(engine, dist.get_world_size())
