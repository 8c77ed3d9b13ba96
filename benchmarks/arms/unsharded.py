"""The whole model on one GPU, as transformers has it."""

from __future__ import annotations

from harness.case import Case
from harness.measure import device_of_rank
from harness.weights import hf_model
from harness.workload import MasterAdamW, Workload
from torch import Tensor

__all__ = ["build"]


def build(case: Case) -> Workload:
    model = hf_model(case, device_of_rank())
    if case.full_recompute:
        model.gradient_checkpointing_enable()
    optimizer = MasterAdamW(model.parameters())

    def forward(tokens: Tensor) -> Tensor:
        loss: Tensor = model(input_ids=tokens, labels=tokens, use_cache=False).loss
        return loss

    return Workload(model, forward, lambda loss: loss.backward(), optimizer.step)
