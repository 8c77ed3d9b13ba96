"""A collective that fails because of another rank says so: which call, which step, how long it waited, where to look."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch.distributed as dist

from ..comm.failures import STOPPED_GPU, is_of_another_rank
from ..errors import RankLostError

__all__ = ["explained"]

def _first_line(problem: BaseException) -> str:
    line = str(problem).strip().splitlines()[0][:200]
    if STOPPED_GPU in line:
        line += '; unless a line "CUDASymmetricMemory::barrier" above names the ranks, a kernel of this one failed'
    return line


def explained(call: Callable[..., Any], what: str, step: Callable[[], int], timeout_s: int) -> Callable[..., Any]:
    """`call`, which raises RankLostError instead of what a communication library raises about another rank."""

    @functools.wraps(call)
    def explaining(*args: Any, **kwargs: Any) -> Any:
        try:
            return call(*args, **kwargs)
        except RuntimeError as problem:
            if not is_of_another_rank(problem):
                raise
            limit = (
                f"{timeout_s} s"
                if timeout_s
                else 'the process groups\' own limit (set "ds_seqpar.timeout_s" for a shorter one)'
            )
            raise RankLostError(
                f"rank {dist.get_rank()} stopped in {what}, step {step()}: a collective failed, because another rank ended, raised an "
                f"error, or did not arrive within {limit}. The cause stands in the output of another rank; start again from the last "
                f"checkpoint, which is complete ({_first_line(problem)})"
            ) from problem

    return explaining
