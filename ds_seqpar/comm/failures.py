"""What communication libraries raise on one rank because of another."""

from __future__ import annotations

import torch
import torch.distributed as dist

from ..errors import SeqParError

__all__ = ["STOPPED_GPU", "is_of_another_rank"]

_SIGNS = (
    "gloo",
    "nccl",
    "closed by peer",
    "reset by peer",
    "broken pipe",
    "timed out",
    "application timeout",
    "pair closure",
)
"""What torch's communication libraries write into a plain RuntimeError when a peer is gone or late."""
STOPPED_GPU = "unspecified launch failure"
"""What CUDA says after a barrier of symmetric memory has waited too long; a broken kernel may cause it too."""


def is_of_another_rank(problem: BaseException) -> bool:
    """Whether `problem` was raised here because of what happened to another rank."""
    if isinstance(problem, SeqParError | torch.OutOfMemoryError) or not isinstance(problem, RuntimeError):
        return False
    return isinstance(problem, dist.DistError) or any(sign in str(problem).lower() for sign in (*_SIGNS, STOPPED_GPU))
