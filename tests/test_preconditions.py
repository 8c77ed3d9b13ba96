"""What tells whether ranks built the same weights: any one value that differs, wherever a parameter lies in memory."""

from __future__ import annotations

import pytest
import torch

from ds_seqpar.preconditions import _checksum


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float8_e4m3fn])
@pytest.mark.parametrize("size", [0, 1, 3, 8, 21])
def test_a_value_that_differs_shows_wherever_it_lies(dtype: torch.dtype, size: int) -> None:
    memory = torch.randn(size + 9, generator=torch.Generator().manual_seed(size)).to(dtype)
    sums = {_checksum(memory[:size].clone())}
    moved = torch.empty_like(memory)
    for start in range(9):  # parts of a flat buffer need not begin where a word does
        moved[start : start + size] = memory[:size]
        sums.add(_checksum(moved[start : start + size]))
    assert len(sums) == 1, "the place in memory counts"
    for i in range(size):
        changed = memory[:size].clone()
        changed.view(torch.uint8).view(size, -1)[i, -1] ^= 1
        assert _checksum(changed) not in sums


def test_integers_and_columns_are_summed_too() -> None:
    x = torch.arange(12.0).view(3, 4)
    assert _checksum(x.t()) == _checksum(x.t().contiguous())
    assert _checksum(torch.arange(5)) == 10
