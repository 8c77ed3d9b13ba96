"""Every autograd edge of comm/regions.py obeys <A x, dy> = <x, A^T dy>, in float64, for the state its name promises.

A tensor that is split or partial has a value of its own on every rank, and an inner product sums over the ranks. A tensor
that is replicated is one tensor: an inner product counts it once, and its gradient must be whole on every rank.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
import torch.distributed as dist
from ranks import run_ranks
from torch import Tensor
from torch.distributed import ProcessGroup

from ds_seqpar.comm import regions

H = 3
SPLIT, REPLICATED, PARTIAL = "split", "replicated", "partial"
Tensors = list[Tensor]


@dataclass(frozen=True)
class Edge:
    """`call` on one rank; `reference` on all ranks' inputs at once; the states of input and output gradient."""

    call: Callable[[Tensor, int, ProcessGroup], Tensor]
    reference: Callable[[Tensors, int], Tensors]
    x: str
    dy: str
    x_shape: Callable[[int, int, int], tuple[int, ...]]  # (T, t, rank)


def _c(tokens: int, t: int) -> int:
    return -(-tokens // t)


def _gathered(xs: Tensors, tokens: int) -> Tensors:
    return [torch.cat(xs)[:tokens]] * len(xs)


def _scattered(full: Tensor, t: int) -> Tensors:
    c = _c(full.shape[0], t)
    return list(torch.cat([full, full.new_zeros(c * t - full.shape[0], H)]).split(c))


def _widths(tokens: int, t: int) -> tuple[int, ...]:
    """Uneven columns, the first rank's not the widest."""
    return tuple(2 + (tokens + rank) % 3 for rank in range(t))


EDGES = {
    "gather_for_partial": Edge(
        lambda x, tokens, group: regions.gather_for_partial(x, tokens, group),
        _gathered,
        SPLIT,
        PARTIAL,
        lambda tokens, t, rank: (_c(tokens, t), H),
    ),
    "gather_for_replicated": Edge(
        lambda x, tokens, group: regions.gather_for_replicated(x, tokens, group),
        _gathered,
        SPLIT,
        REPLICATED,
        lambda tokens, t, rank: (_c(tokens, t), H),
    ),
    "scatter": Edge(
        lambda x, tokens, group: regions.scatter(x, group),
        lambda xs, tokens: _scattered(xs[0], len(xs)),
        REPLICATED,
        SPLIT,
        lambda tokens, t, rank: (tokens, H),
    ),
    "reduce_scatter_partial": Edge(
        lambda x, tokens, group: regions.reduce_scatter_partial(x, group),
        lambda xs, tokens: _scattered(torch.stack(xs).sum(0), len(xs)),
        PARTIAL,
        SPLIT,
        lambda tokens, t, rank: (tokens, H),
    ),
    "copy_for_partial": Edge(
        lambda x, tokens, group: regions.copy_for_partial(x, group),
        lambda xs, tokens: [xs[0]] * len(xs),
        REPLICATED,
        PARTIAL,
        lambda tokens, t, rank: (tokens, H),
    ),
    "reduce_partial": Edge(
        lambda x, tokens, group: regions.reduce_partial(x, group),
        lambda xs, tokens: [torch.stack(xs).sum(0)] * len(xs),
        PARTIAL,
        REPLICATED,
        lambda tokens, t, rank: (tokens, H),
    ),
    "gather_columns": Edge(
        lambda x, tokens, group: regions.gather_columns(x, _widths(tokens, dist.get_world_size(group)), group),
        lambda xs, tokens: [torch.cat(xs, dim=-1)] * len(xs),
        SPLIT,
        REPLICATED,
        lambda tokens, t, rank: (tokens, _widths(tokens, t)[rank]),
    ),
}


def _random(shapes: list[tuple[int, ...]], state: str, contiguous: bool, seed: int) -> Tensors:
    """One tensor a rank; the same one for all where it is replicated. Every rank draws all of them."""
    generator = torch.Generator().manual_seed(seed)
    drawn = [torch.randn(shape[::-1], generator=generator, dtype=torch.float64).t() for shape in shapes]
    if state == REPLICATED:
        drawn = [drawn[0]] * len(drawn)
    return [x.contiguous() for x in drawn] if contiguous else drawn


def _inner(xs: Tensors, ys: Tensors, state: str) -> float:
    pairs = [float((x * y).sum()) for x, y in zip(xs, ys, strict=True)]
    return pairs[0] if state == REPLICATED else sum(pairs)


def _from_all(x: Tensor, shapes: list[tuple[int, ...]], group: ProcessGroup) -> Tensors:
    parts = [torch.empty(shape, dtype=x.dtype) for shape in shapes]
    for source, part in zip(dist.get_process_group_ranks(group), parts, strict=True):
        if source == dist.get_rank():
            part.copy_(x)
        dist.broadcast(part, source, group=group)
    return parts


def _check(name: str, tokens: int, contiguous: bool, group: ProcessGroup) -> None:
    edge, t, rank = EDGES[name], dist.get_world_size(group), dist.get_rank(group)
    where = f"{name}, T={tokens}, t={t}, contiguous={contiguous}"
    shapes = [edge.x_shape(tokens, t, r) for r in range(t)]
    xs = [x.requires_grad_() for x in _random(shapes, edge.x, contiguous, seed=tokens)]
    x = xs[rank].detach().requires_grad_()
    assert contiguous or x.is_contiguous() == (min(x.shape) <= 1), where

    expected = edge.reference(xs, tokens)
    y = edge.call(x, tokens, group)
    torch.testing.assert_close(y, expected[rank], rtol=1e-12, atol=1e-12, msg=lambda m: f"{where}: forward: {m}")

    dys = _random([tuple(e.shape) for e in expected], edge.dy, contiguous, seed=1000 + tokens)
    (dx,) = torch.autograd.grad(y, x, dys[rank])
    counted = range(1) if edge.dy == REPLICATED else range(t)
    value = torch.stack([(expected[r] * dys[r]).sum() for r in counted]).sum()
    reference = torch.autograd.grad(value, xs[0] if edge.x == REPLICATED else xs[rank])[0]
    torch.testing.assert_close(dx, reference, rtol=1e-12, atol=1e-12, msg=lambda m: f"{where}: backward: {m}")

    dxs, ys = _from_all(dx, shapes, group), _from_all(y.detach(), [tuple(e.shape) for e in expected], group)
    left, right = _inner(ys, dys, edge.dy), _inner([v.detach() for v in xs], dxs, edge.x)
    assert abs(left - right) <= 1e-12 * max(1.0, abs(left)), f"{where}: <A x, dy> = {left}, <x, A^T dy> = {right}"
    if edge.x == REPLICATED:
        assert all(torch.equal(other, dxs[0]) for other in dxs), f"{where}: the gradient differs between ranks"


def _check_all(group_size: int) -> None:
    world = dist.get_world_size()
    groups = [dist.new_group(list(range(a, a + group_size))) for a in range(0, world, group_size)]
    group = groups[dist.get_rank() // group_size]
    for name in EDGES:
        for tokens in (1, 3, 4, 5, 8, 11):
            for contiguous in (True, False):
                _check(name, tokens, contiguous, group)


@pytest.mark.parametrize(("world", "group_size"), [(1, 1), (2, 2), (4, 4), (4, 2)])
def test_every_edge_obeys_the_adjoint_law(world: int, group_size: int) -> None:
    run_ranks(world, _check_all, group_size, deepspeed=False, timeout=120)


def _check_shares() -> None:
    group = dist.group.WORLD
    x = torch.randn(5, H, dtype=torch.float64, generator=torch.Generator().manual_seed(0), requires_grad=True)
    y = regions.share_of_replicated(x, group)
    dy = torch.randn(5, H, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    assert torch.equal(y, x)
    (share,) = torch.autograd.grad(y, x, dy)
    dist.all_reduce(share)
    torch.testing.assert_close(share, dy, rtol=1e-12, atol=1e-12)
    (between,) = torch.autograd.grad(regions.share_of_replicated(regions.whole_of_share(x, group), group), x, dy)
    torch.testing.assert_close(between, dy, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("world", [1, 2, 3])
def test_the_shares_of_a_replicated_gradient_sum_to_it(world: int) -> None:
    run_ranks(world, _check_shares, deepspeed=False, timeout=120)


def test_every_edge_is_tested() -> None:
    assert {*EDGES, "share_of_replicated", "whole_of_share"} == set(regions.__all__)


def _keeps_nothing() -> None:
    """No edge modifies its input or the gradient it is given: both may be used again by others."""
    group = dist.group.WORLD
    for name, edge in EDGES.items():
        x = torch.randn(edge.x_shape(5, 2, dist.get_rank()), dtype=torch.float64).requires_grad_()
        before = x.detach().clone()
        y = edge.call(x, 5, group)
        dy = torch.randn_like(y)
        dy_before = dy.clone()
        (dx,) = torch.autograd.grad(y, x, dy, retain_graph=True)
        (again,) = torch.autograd.grad(y, x, dy)
        assert torch.equal(x.detach(), before) and torch.equal(dy, dy_before) and torch.equal(dx, again), name


def test_edges_leave_their_arguments_alone() -> None:
    run_ranks(2, _keeps_nothing, deepspeed=False, timeout=60)
