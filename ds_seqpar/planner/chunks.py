"""A loss of many chunks, of which a trace runs four: the long ones would take a trace most of its time."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import count
from typing import Any

from torch import Tensor

from ..layers import loss
from .trace import Tracker, Work

__all__ = ["few_chunks"]

_FIRST = 3
"""Chunks that run before the last. The third is there to be gathered while the second runs, as the fourth is while the third."""


@contextmanager
def few_chunks(tracker: Tracker) -> Iterator[None]:
    """Of the chunks of a loss the first three and the last run; the second's work counts for each that does not.

    Every chunk but the first and the last does and holds what the second does.
    """
    plain_chunks, plain_gathered = loss._chunks, loss._gathered_chunks
    left_out = 0
    held: list[Any] = []

    def chunks(targets: Tensor, options: Any) -> Iterator[tuple[slice, Tensor]]:
        nonlocal left_out
        every = list(plain_chunks(targets, options))
        left_out = max(0, len(every) - _FIRST - 1)
        held[:] = every if options.region.cut else []  # their targets live until the last is done
        return iter([*every[:_FIRST], every[-1]] if left_out else every)

    def gathered(hidden: Tensor, targets: Tensor, options: Any) -> Iterator[tuple[slice, Tensor, Tensor]]:
        steps, before = plain_gathered(hidden, targets, options), Work()
        for number in count():
            if number == 1:
                before = tracker.work.plus(Work())
            if number == 2:
                after = tracker.work
                tracker.segments[-1].work = after.plus(after.plus(before, -1), left_out)
            step = next(steps, None)
            if step is None:
                held.clear()
                return
            yield step

    loss._chunks, loss._gathered_chunks = chunks, gathered
    try:
        yield
    finally:
        loss._chunks, loss._gathered_chunks = plain_chunks, plain_gathered
