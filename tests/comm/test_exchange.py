"""Gathering and scattering in parts: every transport gives what one collective gives, and whole models stay exact on it."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from exactness import compare_sgd
from ranks import ON_GPU, run_ranks
from sharding import SplitTransport

from ds_seqpar.comm import exchange as exchange_module
from ds_seqpar.comm.collectives import all_gather, reduce_scatter
from ds_seqpar.comm.exchange import Exchange
from ds_seqpar.groups import ParallelGroups

DEVICE = "cuda" if ON_GPU else "cpu"


def _rows(rank: int, rows: int, width: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.arange(rank * 1000, rank * 1000 + rows * width, device=DEVICE, dtype=dtype).view(rows, width)


def _same_as_collectives(transport: str) -> str:
    groups = ParallelGroups.around(dist.group.WORLD)
    exchange = Exchange(groups.tp_group, groups.tp_cpu_group, transport != "plain")
    if transport == "split":
        exchange._transport = lambda *_: SplitTransport(groups.tp_group)
    t, rank = groups.tp_size, groups.tp_rank
    # Sizes go up and down, several in flight: memory is taken, given back, outgrown and taken again.
    for tokens, width, dtype in (
        (8, 4, torch.float32),
        (7, 3, torch.float32),
        (1, 5, torch.float64),
        (4097, 33, torch.float32),
        (2, 4, torch.float32),
    ):
        rows = -(-tokens // t)
        for _ in range(3):
            shard = _rows(rank, rows, width, dtype)
            full = torch.stack([_rows(rank, tokens, width, dtype), _rows(rank + 1, tokens, width, dtype)])[rank % 2]
            wanted = all_gather(shard, groups.tp_group)[:tokens]
            first = exchange.gather(shard, tokens)
            second = exchange.gather_made(shard, lambda memory, shard=shard: torch.add(shard, 1, out=memory), tokens)
            got = torch.full_like(wanted, -1)
            for at, values in first.arrivals():
                got[at] = values
            assert torch.equal(got, wanted)
            assert torch.equal(first.whole(), wanted)
            first.release()
            padded = torch.zeros(t * rows, width, device=DEVICE, dtype=dtype)
            padded[:tokens] = full
            scattering = exchange.scatter(tokens, width, full)
            seen = torch.zeros(tokens, device=DEVICE)
            for at, memory in scattering.parts():
                memory.copy_(full[at])
                seen[at] += 1
            assert torch.equal(second.whole(), wanted + 1)
            second.release()
            assert torch.equal(scattering.wait(), reduce_scatter(padded, groups.tp_group))
            assert bool((seen == 1).all())
    return exchange.remark


@pytest.mark.parametrize("world", [1, 2, 3])
@pytest.mark.parametrize("transport", ["plain", "auto", "split"])
def test_every_transport_equals_one_collective(world: int, transport: str) -> None:
    remarks = run_ranks(world, _same_as_collectives, transport, deepspeed=False)
    assert len(set(remarks)) == 1
    if transport == "auto":
        assert ("copy engines" in remarks[0]) == (ON_GPU and world > 1), remarks[0]


def _exact_when_split(family: str, tp: int, stage: int) -> dict[str, float]:
    transports: dict[int, SplitTransport] = {}
    exchange_module.Exchange._transport = lambda self, *_: transports.setdefault(id(self), SplitTransport(self._group))
    errors = compare_sgd(family, tp, stage, micro=2, seq=7)
    assert all(t.begun and t.begun == t.released for t in transports.values()), "a gathering was not released"
    return errors


@pytest.mark.parametrize(
    ("family", "tp", "stage"),
    [("llama", 2, 1), ("mistral", 2, 1), ("mistral", 3, 2), ("llama", 3, 3), ("gemma3_text", 2, 2), ("phi3", 2, 3)],
)
def test_whole_models_are_exact_in_parts(family: str, tp: int, stage: int) -> None:
    for errors in run_ranks(tp, _exact_when_split, family, tp, stage):
        assert max(errors.values()) <= 1e-5, {n: e for n, e in errors.items() if e > 1e-5}
