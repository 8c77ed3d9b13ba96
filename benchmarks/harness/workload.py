"""What an arm hands over to be measured, and the optimizer of the arms that bring none."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .case import Case

__all__ = ["LEARNING_RATE", "MasterAdamW", "Workload", "adamw", "engine_config", "engine_workload"]

LEARNING_RATE = 1e-4


@dataclass
class Workload:
    """One training step in its three parts.

    forward(tokens [1, T]) -> the loss that backward(loss) takes, which leaves whole gradients, every communication they
    need included; step() updates the weights and drops the gradients; reported(loss) is the mean over all T - 1 predictions.
    `sequences`: how many the ranks together train on in a step; data-parallel ranks are given equal ones, so that losses compare.
    """

    model: nn.Module
    forward: Callable[[Tensor], Tensor]
    backward: Callable[[Tensor], None]
    step: Callable[[], None]
    reported: Callable[[Tensor], float] = float
    sequences: int = 1


def adamw(parameters: Iterable[Tensor]) -> torch.optim.AdamW:
    """The AdamW of every arm."""
    parameters = list(parameters)
    return torch.optim.AdamW(
        parameters, lr=LEARNING_RATE, betas=(0.9, 0.95), weight_decay=0.0, fused=parameters[0].is_cuda
    )


class MasterAdamW:
    """AdamW over fp32 copies of the parameters, which is what ZeRO keeps in the DeepSpeed arms."""

    def __init__(self, parameters: Iterable[Tensor]) -> None:
        self.parameters = list(parameters)
        self.masters = [p.detach().float() for p in self.parameters]
        self.optimizer = adamw(self.masters)

    @torch.no_grad()
    def step(self) -> None:
        for parameter, master in zip(self.parameters, self.masters, strict=True):
            master.grad, parameter.grad = parameter.grad.float(), None  # type: ignore[union-attr]
        self.optimizer.step()
        for parameter, master in zip(self.parameters, self.masters, strict=True):
            parameter.copy_(master)
            master.grad = None


def engine_config(case: Case) -> dict[str, Any]:
    """The DeepSpeed JSON that all DeepSpeed arms share."""
    return {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": 0.0,
        "bf16": {"enabled": case.dtype == "bfloat16"},
        "zero_optimization": {"stage": case.zero},
        "zero_allow_untested_optimizer": True,
        "steps_per_print": 1_000_000,
    }


def engine_workload(engine: nn.Module, sequences: int = 1) -> Workload:
    """The loop that a user of a DeepSpeed engine writes."""

    def forward(tokens: Tensor) -> Tensor:
        loss: Tensor = engine(input_ids=tokens, labels=tokens, use_cache=False).loss
        return loss

    return Workload(engine, forward, engine.backward, engine.step, sequences=sequences)
