"""DeepSpeed's own tensor parallelism, through the engine."""

from __future__ import annotations

from typing import Any

import deepspeed
import torch.distributed as dist
from harness.case import Case
from harness.measure import device_of_rank
from harness.weights import hf_model
from harness.workload import Workload, adamw, engine_config, engine_workload

__all__ = ["build"]


def build(case: Case, **tensor_parallel: Any) -> Workload:
    """`tensor_parallel` is added to that section of the DeepSpeed JSON."""
    model = hf_model(case, device_of_rank())
    if case.full_recompute:
        model.gradient_checkpointing_enable()
    config = engine_config(case)
    config["tensor_parallel"] = {"autotp_size": case.tp_size, **tensor_parallel}
    # A callable, because AutoTP replaces the parameters that an optimizer made here would hold.
    engine, *_ = deepspeed.initialize(model=model, optimizer=adamw, config=config)
    return engine_workload(engine, dist.get_world_size() // case.tp_size)
