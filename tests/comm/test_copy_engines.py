"""The copy engines' order of events, between processes that share one GPU: rows arrive whole however late a rank is."""

from __future__ import annotations

import random

import pytest
import torch
import torch.distributed as dist
from ranks import run_ranks

from ds_seqpar.comm.exchange import Exchange
from ds_seqpar.comm.symmetric import SymmetricMemory


def _late(rng: random.Random) -> None:
    """Sometimes this rank's GPU has other things to do."""
    if rng.random() < 0.3:
        torch.cuda._sleep(int(rng.random() * 2e6))  # up to about a millisecond


def _rows(rank: int, step: int, rows: int, width: int) -> torch.Tensor:
    """What `rank` gives in `step`: bf16 would round it, so float32."""
    numbers = torch.arange(rows * width, device="cuda", dtype=torch.float32).view(rows, width)
    return numbers + (1000 * rank + 10 * step)


def _exchanged_while_late(steps: int) -> int:
    """A layer's traffic again and again: two gatherings and a scattering overlap, and their memory is used again."""
    exchange, rank, t = Exchange(dist.group.WORLD, dist.group.WORLD, True), dist.get_rank(), dist.get_world_size()
    rng = random.Random(rank)
    wrong = torch.zeros((), device="cuda", dtype=torch.int64)
    for step in range(steps):
        tokens, width = 3000 - step % 3, 256
        rows = -(-tokens // t)
        shards = [_rows(r, step, rows, width) for r in range(t)]
        wanted = torch.cat(shards)[:tokens]
        _late(rng)
        first = exchange.gather(shards[rank], tokens)
        for at, values in first.arrivals():
            _late(rng)
            wrong += (values != wanted[at]).sum()
        _late(rng)
        scattering = exchange.scatter(tokens, width, wanted)
        for at, memory in scattering.parts():
            _late(rng)
            memory.copy_(wanted[at] * (rank + 1))
        second = exchange.gather_made(
            shards[rank], lambda memory, mine=shards[rank]: torch.add(mine, 1, out=memory), tokens
        )
        _late(rng)
        wrong += (first.whole() != wanted).sum()
        first.release()
        mine = torch.zeros(t * rows, width, device="cuda")
        mine[:tokens] = wanted * sum(range(1, t + 1))
        wrong += (scattering.wait() != mine[rank * rows : (rank + 1) * rows]).sum()
        _late(rng)
        wrong += (second.whole() != wanted + 1).sum()
        second.release()
    return int(wrong)


@pytest.mark.parametrize("world", [2, 3])
def test_rows_arrive_whole_however_late_a_rank_is(world: int) -> None:
    assert run_ranks(world, _exchanged_while_late, 150, deepspeed=False, one_gpu=True) == [0] * world


def _exchanged_too_early(steps: int) -> int:
    SymmetricMemory._meet = lambda memory: None  # type: ignore[method-assign]
    return _exchanged_while_late(steps)


def test_without_barriers_they_do_not() -> None:
    assert sum(run_ranks(2, _exchanged_too_early, 150, deepspeed=False, one_gpu=True)) > 0


def _reused_too_early(steps: int) -> int:
    def take_at_once(memory: SymmetricMemory, nbytes: int) -> object:
        fitting = [slot for slot in memory._slots if not slot.in_use and slot.memory.nbytes >= nbytes]
        if not fitting:
            return memory._allocate(nbytes)
        fitting[-1].in_use, fitting[-1].unread = True, None
        return fitting[-1]

    SymmetricMemory.take = take_at_once  # type: ignore[method-assign, assignment]
    return _exchanged_while_late(steps)


def test_memory_that_is_reused_without_waiting_spoils_rows() -> None:
    assert sum(run_ranks(2, _reused_too_early, 150, deepspeed=False, one_gpu=True)) > 0
