"""Where DeepSpeed's own save or load waits for other ranks, it waits over gloo.

Over NCCL a wait for a rank that is gone ends in no exception: the host stands in the GPU's queue, and after the time limit torch's
watchdog aborts the process before it can say anything. Over gloo it ends in one, and nothing is left in the queue.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

__all__ = ["after", "waiting_over_gloo"]

Meet = Callable[[], object]

_OF_THE_ENGINE = ("load_module_state_dict",)
_OF_ITS_OPTIMIZER = ("checkpoint_event_epilogue", "update_lp_params")
"""What DeepSpeed calls on every rank after it wrote or read files, and what may gather over data-parallel ranks."""


@contextmanager
def waiting_over_gloo(engine: Any, comm: Any, meet: Meet) -> Iterator[None]:
    """While the body runs DeepSpeed's save or load; `meet` waits for all ranks over gloo, `comm` is deepspeed.comm.

        comm.barrier of all ranks                        `meet` in its place
        engine._checkpoint_tag_validation, all-reduces   nothing in its place: the ranks agreed on the folder before
        gathers of parameters over data-parallel ranks   `meet` first
    """  # fmt: skip
    plain_barrier = comm.barrier

    def barrier(group: Any = None, *args: Any, **kwargs: Any) -> Any:
        return meet() if group is None else plain_barrier(group, *args, **kwargs)

    with ExitStack() as stack:
        stack.enter_context(_instead(comm, "barrier", barrier))
        stack.enter_context(_instead(engine, "_checkpoint_tag_validation", lambda tag: None))
        for owner, names in ((engine, _OF_THE_ENGINE), (engine.optimizer, _OF_ITS_OPTIMIZER)):
            for name in names:
                if hasattr(owner, name):
                    stack.enter_context(_instead(owner, name, after(meet, getattr(owner, name))))
        yield


def after(meet: Meet, call: Callable[..., Any]) -> Callable[..., Any]:
    """`call`, once every rank is there."""

    def meeting(*args: Any, **kwargs: Any) -> Any:
        meet()
        return call(*args, **kwargs)

    return meeting


@contextmanager
def _instead(owner: Any, name: str, value: Any) -> Iterator[None]:
    missing = object()
    before = vars(owner).get(name, missing)
    setattr(owner, name, value)
    try:
        yield
    finally:
        if before is missing:
            delattr(owner, name)
        else:
            setattr(owner, name, before)
