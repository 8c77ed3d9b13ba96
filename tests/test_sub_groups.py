"""ZeRO 3 with parts of different sizes: as many sub-groups on every rank, and so as many sums of the norm."""

from __future__ import annotations

import exactness
import pytest
from hypothesis import given
from hypothesis import strategies as st
from ranks import run_ranks

from ds_seqpar.engine.sub_groups import equal_size, sub_groups


def _uneven(sizes: list[int]) -> list[dict[str, float]]:
    """Three key/value heads and 50 columns of the MLP over two ranks; some sizes make the ranks' sub-groups differ."""
    plain = exactness.engine_for
    results = []
    for size in sizes:
        zero = {"stage": 3, "sub_group_size": size, "stage3_param_persistence_threshold": 0}
        exactness.engine_for = lambda *args, zero=zero, **more: plain(*args, **more, zero_optimization=zero)
        try:
            results.append(exactness.compare_adamw("llama", 2, 3, accumulation=1, key={"timeout_s": 30}))
        finally:
            exactness.engine_for = plain
    return results


@pytest.mark.parametrize("sizes", [[1500], pytest.param([900, 1200, 2000, 3000, 5000], marks=pytest.mark.slow)])
def test_uneven_parts_in_several_sub_groups_train_exactly(sizes: list[int]) -> None:
    for results in run_ranks(2, _uneven, sizes):
        for size, found in zip(sizes, results, strict=True):
            wrong = {name: error for name, error in found.items() if not error < 2e-4}
            assert not wrong, f"sub_group_size {size}: {wrong}"


_GROUP = st.lists(st.tuples(st.integers(1, 50), st.integers(1, 50)), min_size=1, max_size=12)


@given(st.lists(_GROUP, min_size=1, max_size=3), st.integers(1, 200))
def test_the_size_found_makes_equally_many(groups: list[list[tuple[int, int]]], size: int) -> None:
    everyone = [[[pair[rank] for pair in group] for group in groups] for rank in range(2)]
    found = equal_size(everyone, size)
    first, second = ([sub_groups(sizes, found) for sizes in rank] for rank in everyone)
    assert found >= size and first == second
