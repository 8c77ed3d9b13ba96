"""A training run that saves, that a fault may strike on one rank, and that can be resumed."""

from __future__ import annotations

import dataclasses
import os
import signal
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from deepspeed.comm import comm
from exactness import engine_for
from models import batches, tiny
from ranks import ON_GPU

from ds_seqpar.groups import ParallelGroups

__all__ = ["FAULTS", "as_over_nccl", "train"]

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

        def struck_within(grad: Any) -> None:
            fault()

        struck_within.takes_parts = True  # type: ignore[attr-defined]  # one rank alone has it
        engine.module.model.layers[0].mlp.down_proj.weight.register_hook(struck_within)
    elif where == "step":
        plain = engine.basic_optimizer.step
        engine.basic_optimizer.step = lambda *args, **kwargs: (fault(), plain(*args, **kwargs))[1]
    elif where == "save":
        plain_save = torch.save

        def struck(*args: Any, **kwargs: Any) -> None:
            plain_save(*args, **kwargs)
            fault()

        torch.save = struck
    elif where == "load":
        plain_load = torch.load

        def struck_after(*args: Any, **kwargs: Any) -> Any:
            return plain_load(*args, **kwargs), fault()

        torch.load = struck_after


class _Aborting:
    """A handle of a collective whose wait ends the process where it would raise."""

    def __init__(self, handle: Any) -> None:
        self.handle = handle

    def wait(self) -> Any:
        return _aborting(self.handle.wait)()


def _aborting(call: Callable[..., Any]) -> Callable[..., Any]:
    def calling(*args: Any, **kwargs: Any) -> Any:
        try:
            result = call(*args, **kwargs)
        except RuntimeError:
            os.abort()
        return _Aborting(result) if hasattr(result, "wait") else result

    return calling


def as_over_nccl() -> None:
    """Lets a collective of DeepSpeed's end this process where gloo raises, as torch's watchdog does over NCCL.

    What ds_seqpar decides on the host has a gloo group of its own, as it has beside NCCL. Nothing is done where NCCL is there.
    """
    if ON_GPU:
        return
    for name in ("barrier", "all_reduce", "all_gather", "all_gather_into_tensor", "broadcast"):
        setattr(comm.cdb, name, _aborting(getattr(comm.cdb, name)))
    plain = ParallelGroups.around

    def around(tp_group: Any) -> ParallelGroups:
        return dataclasses.replace(plain(tp_group), world_cpu_group=dist.new_group(backend="gloo"))

    ParallelGroups.around = around  # type: ignore[method-assign,assignment]


def train(
    folder: str,
    where: str | None = None,
    fault: str = "",
    *,
    resume: bool = False,
    stage: int = 1,
    aborts: bool = False,
    **ds: Any,
) -> list[float]:
    """Losses of the steps that this run made. It saves after the second; rank 1 is struck in the fourth, or in a later save.

    Or it is struck when it resumes. `aborts`: see as_over_nccl. `ds`: more of DeepSpeed's config.
    """
    if aborts:
        as_over_nccl()
    torch.manual_seed(0)
    model = tiny("llama").train()
    engine = engine_for(model, torch.optim.AdamW(model.parameters(), lr=1e-2), KEY, stage, 1, 1, **ds)
    done = 0
    if resume:
        if where == "load" and dist.get_rank() == 1:
            _strike_in(engine, where, FAULTS[fault])
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
