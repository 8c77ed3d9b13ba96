"""The raw collectives: new tensors, any strides, asynchronous as synchronous, a world of one like any other."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import pytest
import torch
import torch.distributed as dist
from ranks import run_ranks
from torch import Tensor

from ds_seqpar.comm.collectives import all_gather, all_gather_async, all_reduce, reduce_scatter, reduce_scatter_async
from ds_seqpar.comm.tokens import (
    gather_rows,
    own_rows,
    reduce_scatter_rows,
)

WORLDS = (1, 2, 3)
ROWS = 6  # divides by every world here


def _strided(rank: int, dtype: torch.dtype, layout: str, rows: int = ROWS) -> Tensor:
    """What `rank` holds, [rows, 4]; the same values in every layout, and small integers so that sums are exact."""
    x = (torch.arange(rows * 4, dtype=dtype).view(rows, 4) * 3 + 7 * rank) % 64
    if layout == "transposed":
        return x.t().contiguous().t()
    if layout == "sliced":
        wide = torch.full((rows, 9), -1.0, dtype=dtype)
        wide[:, 1::2] = x
        return wide[:, 1::2]
    if layout == "expanded":
        return x[:, :1].contiguous().expand(rows, 4)
    return x


def _everyone(dtype: torch.dtype, layout: str, size: int, first: int = 0) -> list[Tensor]:
    return [_strided(first + rank, dtype, layout) for rank in range(size)]


def _check_collectives(x: Tensor, everyone: list[Tensor], group: dist.ProcessGroup) -> None:
    before, total, rank = x.clone(), torch.stack(everyone).sum(0), dist.get_rank(group)
    rows = ROWS // len(everyone)
    mine = slice(rank * rows, (rank + 1) * rows)
    expected: list[tuple[Callable[[], Tensor], Tensor]] = [
        (lambda: all_gather(x, group), torch.cat(everyone)),
        (lambda: all_gather_async(x, group).wait(), torch.cat(everyone)),
        (lambda: reduce_scatter(x, group), total[mine]),
        (lambda: reduce_scatter_async(x, group).wait(), total[mine]),
        (lambda: all_reduce(x, group), total),
        (lambda: all_reduce(x, group, dist.ReduceOp.MAX), torch.stack(everyone).max(0).values),
    ]
    for run, wanted in expected:
        result = run()
        assert torch.equal(result, wanted) and result.dtype is x.dtype
        assert result.is_contiguous()
        result.fill_(-5)  # a new tensor: its change reaches neither the input nor a second call
        assert torch.equal(x, before)
        assert torch.equal(run(), wanted)


def _collectives() -> None:
    group, size, rank = dist.group.WORLD, dist.get_world_size(), dist.get_rank()
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        for layout in ("plain", "transposed", "sliced", "expanded"):
            assert (layout == "plain") == _strided(rank, dtype, layout).is_contiguous()
            _check_collectives(_strided(rank, dtype, layout), _everyone(dtype, layout, size), group)


@pytest.mark.parametrize("world", WORLDS)
def test_collectives_return_new_tensors_for_any_strides_and_async_equals_sync(world: int) -> None:
    run_ranks(world, _collectives, deepspeed=False, timeout=60)


def _waiting_twice() -> None:
    x = torch.arange(8.0) + dist.get_rank()
    pending = all_gather_async(x, dist.group.WORLD)
    assert pending.wait() is pending.wait()
    del x  # nobody but the pending collective holds its input
    pendings = [all_gather_async(torch.full((1000,), float(i)), dist.group.WORLD) for i in range(8)]
    for i, pending in enumerate(pendings):
        assert torch.equal(pending.wait(), torch.full((1000 * dist.get_world_size(),), float(i)))


def test_a_pending_collective_keeps_its_input_and_can_be_waited_for_again() -> None:
    run_ranks(2, _waiting_twice, deepspeed=False, timeout=60)


def _groups_within_a_world() -> None:
    """The group is the argument's, not the world's."""
    pairs = [dist.new_group([0, 1]), dist.new_group([2, 3])]
    which = dist.get_rank() // 2
    x = _strided(dist.get_rank(), torch.float64, "plain")
    everyone = _everyone(torch.float64, "plain", 2, first=2 * which)
    assert torch.equal(all_gather(x, pairs[which]), torch.cat(everyone))
    assert torch.equal(all_reduce(x, pairs[which]), everyone[0] + everyone[1])
    own = dist.get_rank(pairs[which])
    assert torch.equal(reduce_scatter(x, pairs[which]), (everyone[0] + everyone[1])[own * 3 : own * 3 + 3])


def test_collectives_stay_within_their_group() -> None:
    run_ranks(4, _groups_within_a_world, deepspeed=False, timeout=60)


def _rows() -> None:
    """Rows beyond T are zero where they enter and gone where they leave; c = ceil(T/t) on every rank, however few tokens."""
    group, size, rank = dist.group.WORLD, dist.get_world_size(), dist.get_rank()
    for tokens in (1, 2, 5, 6, 7, 11):
        c = -(-tokens // size)
        fulls = [_strided(r, torch.float64, "sliced", tokens) for r in range(size)]
        padded = torch.cat([torch.stack(fulls).sum(0), torch.zeros(c * size - tokens, 4, dtype=torch.float64)])
        mine = padded[rank * c : (rank + 1) * c]
        assert torch.equal(reduce_scatter_rows(fulls[rank], group), mine)
        padded[:tokens] = fulls[0]
        own = own_rows(fulls[0], group)
        assert torch.equal(own, padded[rank * c : (rank + 1) * c])
        assert own.untyped_storage().nbytes() <= c * 4 * 8, "own rows keep the full tensor alive"
        assert torch.equal(gather_rows(own, tokens, group), fulls[0])


@pytest.mark.parametrize("world", WORLDS)
def test_dead_rows_never_leave(world: int) -> None:
    run_ranks(world, _rows, deepspeed=False, timeout=60)


def test_every_row_belongs_to_one_rank() -> None:
    from ds_seqpar.comm.tokens import rows_per_rank

    for size in range(1, 9):
        for tokens in range(1, 40):
            c = rows_per_rank(tokens, size)
            bounds = [min(rank * c, tokens) for rank in range(size + 1)]
            assert bounds[0] == 0 and bounds[-1] == tokens
            assert all(stop - start <= c for start, stop in pairwise(bounds))
            assert c * size - tokens < size, "at most t-1 dead rows"
