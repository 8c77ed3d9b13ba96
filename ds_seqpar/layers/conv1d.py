"""GPT-2's linears, whose weight is stored [in, out], cut as the others are."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from torch import Tensor, nn

from .linear import ColumnParallelLinear, RowParallelLinear

__all__ = ["ColumnParallelConv1D", "RowParallelConv1D"]


class ColumnParallelConv1D(ColumnParallelLinear):
    """weight [in, out] -> [in, out_r]; otherwise a ColumnParallelLinear."""

    def as_linear(self) -> Any:
        """What the grouped computation takes of a linear: its weight as [out_r, in], and its bias."""
        return SimpleNamespace(weight=self.weight.t(), bias=self.bias)


class RowParallelConv1D(RowParallelLinear):
    """weight [in, out] -> [in_r, out]; otherwise a RowParallelLinear."""

    def forward(self, input: Tensor, up: Tensor | None = None, act: str | None = None) -> Tensor:
        """As RowParallelLinear's."""
        return RowParallelLinear.forward(_Transposed(self), input, up, act)  # type: ignore[arg-type]


class _Transposed:
    def __init__(self, module: nn.Linear) -> None:
        self.weight, self.bias, self.seqpar = module.weight.t(), module.bias, module.seqpar
