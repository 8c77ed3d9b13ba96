"""The grouped column-parallel and the row-parallel function obey <A x, dy> = <x, A^T dy> in float64, dead rows and all."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from ranks import run_ranks
from torch import Tensor, nn

from ds_seqpar.comm.exchange import Exchange
from ds_seqpar.groups import ParallelGroups
from ds_seqpar.kernels.addition import sum_with
from ds_seqpar.layers.early import RowsMark
from ds_seqpar.layers.linear import column_parallel
from ds_seqpar.layers.products import RowParallel
from ds_seqpar.layers.region import TokenRegion


def _total(a: Tensor, b: Tensor) -> float:
    product = (a * b).sum()
    dist.all_reduce(product)
    return float(product)


def _adjoint(seq: int, overlap: bool) -> list[tuple[float, float]]:
    groups = ParallelGroups.around(dist.group.WORLD)
    region = TokenRegion(1, seq, True, groups, Exchange(groups.tp_group, groups.tp_cpu_group, overlap))
    generator = torch.Generator().manual_seed(dist.get_rank())
    draw = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)  # noqa: E731
    dead = max(0, min(region.rows, region.rows * (groups.tp_rank + 1) - seq))
    alive = torch.ones(region.rows, 1, dtype=torch.float64)
    alive[region.rows - dead :] = 0
    pairs = []
    x = (draw(region.rows, 6) * alive).requires_grad_()
    members = [nn.Linear(6, n, bias=False, dtype=torch.float64) for n in (3, 5)]
    outputs = column_parallel(x.view(1, region.rows, 6), region, members)
    dys = [draw(*y.shape) for y in outputs]
    (dx,) = torch.autograd.grad(outputs, x, dys)
    pairs.append((sum(_total(y.detach(), dy) for y, dy in zip(outputs, dys, strict=True)), _total(x.detach(), dx)))
    x, weight = draw(seq, 4).requires_grad_(), draw(6, 4)
    for later in (None, RowsMark()):
        y = RowParallel.apply(x, None, None, weight, region, later)
        y = sum_with(*y, None) if later else y
        dy = draw(*y.shape) * alive
        (dx,) = torch.autograd.grad(y, x, dy)
        pairs.append((_total(y.detach(), dy), _total(x.detach(), dx)))
    return pairs


@pytest.mark.parametrize("overlap", [True, False])
@pytest.mark.parametrize("world", [1, 2, 4])
def test_sharded_linears_obey_the_adjoint_law(world: int, overlap: bool) -> None:
    for seq in (8, 7):
        for forward, backward in run_ranks(world, _adjoint, seq, overlap, deepspeed=False)[0]:
            assert abs(forward - backward) <= 1e-12 * max(1.0, abs(forward))
