"""ds_seqpar as a user has it: the key in the DeepSpeed JSON and the engine's own loop."""

from __future__ import annotations

from typing import Any

import torch.distributed as dist
from harness.case import Case
from harness.measure import device_of_rank
from harness.weights import hf_model
from harness.workload import Workload, adamw, engine_config, engine_workload

import ds_seqpar

__all__ = ["build"]


def build(case: Case, **key: Any) -> Workload:
    """`key` is added to the `ds_seqpar` object."""
    model = hf_model(case, device_of_rank())
    config = engine_config(case)
    config["ds_seqpar"] = {"tp_size": case.tp_size, "recompute": case.recompute, **key}
    engine, *_ = ds_seqpar.initialize(model=model, optimizer=adamw(model.parameters()), config=config)
    return engine_workload(engine, dist.get_world_size() // case.tp_size)
