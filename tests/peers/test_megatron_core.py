"""What Megatron-core's unit tests of mappings, layers, random and cross-entropy promise, asked of ours; exactly where they are."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from ranks import run_ranks
from sharding import twins
from torch import Tensor

from ds_seqpar.comm import regions
from ds_seqpar.comm.exchange import Exchange
from ds_seqpar.groups import ParallelGroups
from ds_seqpar.layers.linear import column_parallel
from ds_seqpar.layers.loss import vocab_parallel_linear_cross_entropy
from ds_seqpar.layers.random import ParallelRandom
from ds_seqpar.layers.region import TokenRegion


def _both(edge: Any, x: Tensor, dy: Tensor, *more: Any) -> tuple[Tensor, Tensor]:
    x = x.clone().requires_grad_()
    y = edge(x, *more, dist.group.WORLD)
    y.backward(dy)
    assert x.grad is not None
    return y.detach(), x.grad


def _mappings() -> None:
    """Each rank holds its rank + 1 everywhere, so that sums and places can be said in one number."""
    t, r = dist.get_world_size(), dist.get_rank()
    mine, total = float(r + 1), t * (t + 1) / 2
    part, whole = torch.full((2, 3), mine), torch.full((2 * t, 3), mine)
    ranks = torch.arange(1.0, t + 1).repeat_interleave(2)[:, None].expand(2 * t, 3)
    rows = slice(2 * r, 2 * r + 2)

    y, dx = _both(regions.copy_for_partial, part, part)
    assert torch.equal(y, part) and torch.equal(dx, torch.full_like(part, total))
    y, dx = _both(regions.reduce_partial, part, part)
    assert torch.equal(y, torch.full_like(part, total)) and torch.equal(dx, part)
    y, dx = _both(regions.scatter, ranks.contiguous(), part)
    assert torch.equal(y, ranks[rows]) and torch.equal(dx, ranks)
    y, dx = _both(regions.gather_for_replicated, part, ranks.contiguous(), 2 * t)
    assert torch.equal(y, ranks) and torch.equal(dx, ranks[rows])
    y, dx = _both(regions.gather_for_partial, part, whole, 2 * t)
    assert torch.equal(y, ranks) and torch.equal(dx, torch.full_like(part, total))
    y, dx = _both(regions.reduce_scatter_partial, whole, part)
    assert torch.equal(y, torch.full_like(part, total)) and torch.equal(dx, ranks)


def test_mappings_are_exact_forward_and_backward() -> None:
    for world in (1, 2, 4):
        run_ranks(world, _mappings, deepspeed=False)


def _frozen() -> tuple[int, int]:
    """(bytes that a trainable and a frozen column-parallel linear keep for backward) beside their weights."""
    model, reference = twins("llama", num_hidden_layers=1)
    kept = []
    for frozen in (False, True):
        for part in (model, reference):
            for linear in (part.model.layers[0].mlp.up_proj, part.model.layers[0].mlp.gate_proj):
                linear.requires_grad_(not frozen)
        x = torch.randn(1, 8, 48, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
        mine, theirs = x.clone().requires_grad_(), x.clone().requires_grad_()
        state = model.seqpar
        region = state.region_for(1, 8)
        weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
        saved: list[int] = []

        def note(tensor: Tensor, weights: set[int] = weights, saved: list[int] = saved) -> Tensor:
            if tensor.untyped_storage().data_ptr() not in weights:
                saved.append(tensor.nbytes)
            return tensor

        members = [model.model.layers[0].mlp.up_proj, model.model.layers[0].mlp.gate_proj]
        with torch.autograd.graph.saved_tensors_hooks(note, lambda x: x), state.within(region):
            local = region.local_of_replicated(mine)
            saved.clear()
            outputs = column_parallel(local, region, members)
        kept.append(sum(saved))
        torch.cat([y.flatten() for y in outputs]).sum().backward()
        mlp = reference.model.layers[0].mlp
        (mlp.up_proj(theirs).sum() + mlp.gate_proj(theirs).sum()).backward()
        torch.testing.assert_close(mine.grad, theirs.grad)
        assert all((m.weight.grad is None) == frozen for m in members)
        model.zero_grad(), reference.zero_grad()
    return kept[0], kept[1]


def test_a_frozen_weight_gives_the_input_gradient_and_keeps_no_activation() -> None:
    for trainable, frozen in run_ranks(2, _frozen):
        assert trainable > 0 and frozen == 0


def _random() -> tuple[list[float], list[float]]:
    """(what is drawn inside forks, and outside around them)."""
    random = ParallelRandom(ParallelGroups.around(dist.group.WORLD))
    torch.manual_seed(11)
    outside, inside = [float(torch.rand(()))], []
    before = torch.get_rng_state()
    with random.fork(5, per_rank=True):
        inside.append(float(torch.rand(())))
    with random.fork(5, per_rank=False):
        inside.append(float(torch.rand(())))
    torch.set_rng_state(before)
    with random.fork(5, per_rank=True):
        inside.append(float(torch.rand(())))
    with random.fork(6, per_rank=True):
        pass
    outside.append(float(torch.rand(())))
    return inside, outside


def test_streams_fork_and_come_back() -> None:
    (inside, outside), (others, alike) = run_ranks(2, _random, deepspeed=False)
    assert outside == alike, "outside of forks the ranks draw alike"
    assert inside[0] == inside[2] and others[0] == others[2], "a stream repeats itself"
    assert inside[0] != others[0] and inside[1] == others[1], "per rank apart, replicated alike"


def _cross_entropy() -> None:
    groups = ParallelGroups.around(dist.group.WORLD)
    t, r = groups.tp_size, groups.tp_rank
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(13, 6, dtype=torch.float64, generator=generator)
    weight = torch.randn(8 * t, 6, dtype=torch.float64, generator=generator)
    targets = torch.randint(0, 8 * t, (13,), generator=generator)
    region = TokenRegion(1, 13, False, groups, Exchange(groups.tp_group, groups.tp_cpu_group, True))
    mine, part = hidden.clone().requires_grad_(), weight[8 * r : 8 * r + 8].clone().requires_grad_()
    loss, counted = vocab_parallel_linear_cross_entropy(
        mine, part, None, targets, region, vocab_start=8 * r, vocab_size=8 * t, chunk_tokens=5
    )
    theirs, whole = hidden.requires_grad_(), weight.requires_grad_()
    expected = torch.nn.functional.cross_entropy(theirs @ whole.t(), targets, reduction="sum")
    loss.backward()
    expected.backward()
    assert int(counted) == 13 and whole.grad is not None
    torch.testing.assert_close((loss, mine.grad, part.grad), (expected, theirs.grad, whole.grad[8 * r : 8 * r + 8]))


def test_the_vocabulary_parallel_cross_entropy_is_torchs() -> None:
    for world in (1, 2, 4):
        run_ranks(world, _cross_entropy, deepspeed=False)
