"""A gradient's all-gather, started by the node that makes the gradient, which writes it to where the peers read.

Rows that a row-parallel linear makes go, by the sum with their residual, to the next norm. In backward that norm makes the gradient of
these rows, and the linear needs it from all ranks: to copy it there first would read and write it once more.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..comm.exchange import Gathering, Transport

__all__ = ["EarlyGatherings", "RowsMark"]


class RowsMark:
    """Of the rows that one call of a row-parallel linear makes; lies on the tensors that are these rows, or their sum with others."""

    def put(self, rows: Tensor) -> None:
        """Lets whoever takes `rows` find this."""
        rows._seqpar_mark = self  # type: ignore[attr-defined]

    @classmethod
    def of(cls, rows: Tensor) -> RowsMark | None:
        """What lies on `rows`."""
        return getattr(rows, "_seqpar_mark", None)


@dataclass
class _Started:
    mark: RowsMark
    task: int
    gradient: Tensor
    version: int
    gathering: Gathering


class EarlyGatherings:
    """Of one model: at most one is under way. All ranks make the same calls in the same order.

    What a hook makes of a gradient may be one rank's own, so where any rank has hooks on modules there is none of this.
    """

    def __init__(self) -> None:
        self._started: _Started | None = None

    def start(
        self,
        mark: RowsMark,
        transport: Transport,
        like: Tensor,
        tokens: int,
        make: Callable[[Tensor], Tensor],
    ) -> Tensor:
        """What `make(memory)` returns, the gradient [..] of the marked rows, which it writes to `memory` [c, h] too.

        `like` is of memory's shape, dtype and device.
        """
        self.let_go()  # of a backward pass that did not reach the linear
        made: list[Tensor] = []
        gathering = transport.gather_made(like, lambda memory: made.append(make(memory)), tokens)
        (gradient,) = made
        self._started = _Started(mark, _task(), gradient, gradient._version, gathering)
        return gradient

    def take(self, mark: RowsMark | None, dy: Tensor) -> Gathering | None:
        """The gathering of dy, the gradient of the marked rows; None unless it is under way.

        It is not if dy is another than was made: a sum with what the rows got from elsewhere, or what a hook made of it.
        """
        started = self._started
        if started is None or mark is None or started.mark is not mark:
            return None
        gradient = started.gradient
        same = _place(dy) == _place(gradient) and dy.numel() == gradient.numel() and dy.is_contiguous()
        if same and started.task == _task() and gradient._version == started.version:
            self._started = None
            return started.gathering
        self.let_go()
        return None

    def let_go(self) -> None:
        """Gives back what was gathered and not taken."""
        if self._started is not None:
            self._started.gathering.whole()
            self._started.gathering.release()
            self._started = None


def _place(x: Tensor) -> Any:
    return x.untyped_storage()._cdata, x.storage_offset()


def _task() -> Any:
    """The backward pass that is running."""
    return torch._C._current_graph_task_id()
