"""All ranks meet before what only all of them can do, and learn of each other's errors after it.

Everything here travels over a gloo group, so that it works while a GPU's queue is full and a wait can be bounded.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch.distributed as dist
from torch.distributed import ProcessGroup

from ..errors import CheckpointError, SeqParError

__all__ = ["PATIENCE", "agreed", "everyones", "from_first_rank", "meet"]

PATIENCE = timedelta(minutes=10)
"""How long ranks may arrive after each other: an evaluation on one rank is slow, a call that is missing never comes."""


def meet(what: str, group: ProcessGroup | None) -> None:
    """Returns once every rank of `group` is here. Raises CheckpointError, naming who is missing, after PATIENCE."""
    begun = time.monotonic()
    try:
        dist.monitored_barrier(group, timeout=PATIENCE, wait_all_ranks=True)
    except RuntimeError as problem:
        raise CheckpointError(
            f"{what} must be called on all {dist.get_world_size(group)} ranks, but {_missing(str(problem))} did not call it "
            f"in the {time.monotonic() - begun:.0f} seconds that this rank waited; call it outside `if rank == 0`"
        ) from problem


def _missing(report: str) -> str:
    late = re.search(r"Ranks ([\d, ]+) failed to pass", report)
    if late:
        ranks = [word for word in late.group(1).replace(",", " ").split()]
        return ("rank " if len(ranks) == 1 else "ranks ") + ", ".join(ranks)
    early = re.search(r"waiting for send/recv from rank (\d+)", report)
    return f"rank {early.group(1)}" if early else f"some rank ({report})"


@contextmanager
def agreed(what: str, group: ProcessGroup | None) -> Iterator[Callable[[], None]]:
    """Runs a body that does not communicate; if it raises on any rank, every rank raises CheckpointError with the reason.

    Where the ranks must wait for each other in the body, they call what it is given, equally often on every rank: it raises too.
    """
    told = False

    def wait() -> None:
        nonlocal told
        try:
            _raise_of_any(what, everyones(None, group), None)
        except CheckpointError:
            told = True
            raise

    error: str | None = None
    cause: Exception | None = None
    try:
        yield wait
    except Exception as problem:
        if told:  # a second exchange would find nobody
            raise
        cause = problem
        error = str(problem) if isinstance(problem, SeqParError) else f"{type(problem).__name__}: {problem}"
    _raise_of_any(what, everyones(error, group), cause)


def _raise_of_any(what: str, errors: Sequence[str | None], cause: Exception | None) -> None:
    found: dict[str, list[int]] = {}
    for rank, text in enumerate(errors):
        if text is not None:
            found.setdefault(text, []).append(rank)
    if found:
        parts = [
            f"{text} (on rank{'s' * (len(ranks) > 1)} {', '.join(map(str, ranks))})" for text, ranks in found.items()
        ]
        raise CheckpointError(f"{what}: {'; '.join(parts)}") from cause


def everyones(mine: Any, group: ProcessGroup | None) -> list[Any]:
    """One picklable object from every rank, in rank order, on every rank."""
    gathered: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(gathered, mine, group=group)
    return gathered


def from_first_rank(value: Any, group: ProcessGroup | None) -> Any:
    """Rank 0's picklable object on every rank."""
    box = [value]
    dist.broadcast_object_list(box, src=0, group=group)
    return box[0]
