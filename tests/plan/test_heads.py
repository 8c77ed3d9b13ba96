"""Which heads a rank holds: every query head once, its kv head beside it, a ratio that attention code can use."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ds_seqpar.errors import PlanError
from ds_seqpar.plan.heads import HeadPartition, even_bounds


def _check(num_heads: int, num_kv_heads: int, t: int, heads: HeadPartition) -> None:
    group = num_heads // num_kv_heads
    assert len(heads.queries) == len(heads.kvs) == t
    queries = [q for start, stop in heads.queries for q in range(start, stop)]
    assert queries == list(range(num_heads)), "every query head exactly once, in the model's order"
    assert {kv for start, stop in heads.kvs for kv in range(start, stop)} == set(range(num_kv_heads))
    for rank in range(t):
        local, local_kv = heads.num_local_heads(rank), heads.num_local_kv_heads(rank)
        (first, last), (first_kv, last_kv) = heads.queries[rank], heads.kvs[rank]
        assert local == last - first >= 1 and local_kv == last_kv - first_kv >= 1
        assert local % local_kv == 0, "num_key_value_groups is an integer"
        for i in range(local):  # attention code pairs local query i with local kv i // ratio
            assert first_kv + i // (local // local_kv) == (first + i) // group
    assert heads.copied == (num_kv_heads < t)


@given(st.integers(1, 64), st.integers(1, 12), st.integers(1, 64))
@settings(max_examples=400, deadline=None, derandomize=True)
def test_every_query_head_once_with_its_kv_head(group: int, num_kv_heads: int, t: int) -> None:
    num_heads = group * num_kv_heads
    if t > num_heads:
        with pytest.raises(PlanError, match=rf"num_attention_heads={num_heads} .*tp_size={t}; use at most {num_heads}"):
            HeadPartition.of(num_heads, num_kv_heads, t)
        return
    try:
        heads = HeadPartition.of(num_heads, num_kv_heads, t)
    except PlanError:
        pytest.fail(
            f"{num_heads} heads over {num_kv_heads} kv heads leave every one of {t} ranks a head, but were refused"
        )
    _check(num_heads, num_kv_heads, t, heads)


@given(st.integers(-3, 100), st.integers(-3, 100), st.integers(1, 100))
@settings(max_examples=400, deadline=None, derandomize=True)
def test_whatever_the_numbers_nothing_but_a_plan_error(num_heads: int, num_kv_heads: int, t: int) -> None:
    try:
        heads = HeadPartition.of(num_heads, num_kv_heads, t)
    except PlanError as error:
        assert str(num_heads) in str(error)
        return
    _check(num_heads, num_kv_heads, t, heads)


@pytest.mark.parametrize(
    ("num_heads", "num_kv_heads", "t", "queries", "kvs"),
    [
        (8, 8, 2, ((0, 4), (4, 8)), ((0, 4), (4, 8))),
        (6, 3, 2, ((0, 4), (4, 6)), ((0, 2), (2, 3))),  # uneven: a kv head takes its whole group along
        (6, 3, 3, ((0, 2), (2, 4), (4, 6)), ((0, 1), (1, 2), (2, 3))),
        (8, 2, 4, ((0, 2), (2, 4), (4, 6), (6, 8)), ((0, 1), (0, 1), (1, 2), (1, 2))),  # copies
        (6, 3, 4, ((0, 1), (1, 2), (2, 4), (4, 6)), ((0, 1), (0, 1), (1, 2), (2, 3))),  # one kv head copied, two not
        (5, 1, 3, ((0, 2), (2, 4), (4, 5)), ((0, 1),) * 3),
    ],
)
def test_partitions_by_hand(
    num_heads: int, num_kv_heads: int, t: int, queries: tuple[tuple[int, int], ...], kvs: tuple[tuple[int, int], ...]
) -> None:
    heads = HeadPartition.of(num_heads, num_kv_heads, t)
    assert heads.queries == queries and heads.kvs == kvs


def test_kv_heads_that_do_not_divide_are_refused_by_name() -> None:
    with pytest.raises(PlanError, match=r"num_attention_heads=7 .*num_key_value_heads=2"):
        HeadPartition.of(7, 2, 1)
    with pytest.raises(PlanError, match=r"num_key_value_heads=0"):
        HeadPartition.of(4, 0, 1)


@given(st.integers(0, 1000), st.integers(1, 64))
@settings(deadline=None, derandomize=True)
def test_even_bounds_are_consecutive_and_differ_by_at_most_one(size: int, parts: int) -> None:
    bounds = even_bounds(size, parts)
    assert len(bounds) == parts and bounds[0][0] == 0 and bounds[-1][1] == size
    assert all(a[1] == b[0] for a, b in pairwise(bounds))
    widths = [stop - start for start, stop in bounds]
    assert max(widths) - min(widths) <= 1 and widths == sorted(widths, reverse=True)
