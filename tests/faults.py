"""A training run that saves, that a fault may strike on one rank, and that can be resumed."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from exactness import engine_for
from models import batches, tiny

__all__ = ["FAULTS", "train"]

KEY = {"tp_size": 2, "timeout_s": 4}
STEPS, SAVED_AT, STRUCK_AT = 6, 2, 4


def _kill() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def _raise() -> None:
    raise ValueError("the user's own mistake")


def _out_of_memory() -> None:
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")


def _stall() -> None:
    time.sleep(9.0)


FAULTS: dict[str, Callable[[], None]] = {
    "killed": _kill, "raises": _raise, "out of memory": _out_of_memory, "stalls": _stall,
}  # fmt: skip


def _strike_in(engine: Any, where: str, fault: Callable[[], None]) -> None:
    """Lets `fault` happen in the middle of the next forward, backward, optimizer step or save."""
    if where == "forward":
        engine.module.model.layers[1].mlp.down_proj.register_forward_pre_hook(lambda *_: fault())
    elif where == "backward":
        engine.module.model.layers[0].mlp.down_proj.weight.register_hook(lambda grad: fault())
    elif where == "step":
        plain = engine.basic_optimizer.step
        engine.basic_optimizer.step = lambda *args, **kwargs: (fault(), plain(*args, **kwargs))[1]
    elif where == "save":
        plain_save = torch.save

        def struck(*args: Any, **kwargs: Any) -> None:
            plain_save(*args, **kwargs)
            fault()

        torch.save = struck


def train(
    folder: str, where: str | None = None, fault: str = "", *, resume: bool = False, stage: int = 1
) -> list[float]:
    """Losses of the steps that this run made. It saves after the second; rank 1 is struck in the fourth, or in a later save."""
    torch.manual_seed(0)
    model = tiny("llama").train()
    engine = engine_for(model, torch.optim.AdamW(model.parameters(), lr=1e-2), KEY, stage, 1, 1)
    done = 0
    if resume:
        done = int(engine.load_checkpoint(folder)[1]["done"])
    losses = []
    for i, batch in enumerate(batches(STEPS, 1)):
        if i < done:
            continue
        if i == STRUCK_AT and where is not None and dist.get_rank() == 1:
            _strike_in(engine, where, FAULTS[fault])
        loss = engine(**batch).loss
        engine.backward(loss)
        engine.step()
        losses.append(float(loss.detach()))
        if i + 1 == SAVED_AT or (where == "save" and i == STRUCK_AT):
            engine.save_checkpoint(folder, client_state={"done": i + 1})
    return losses
