"""A sharded model beside its unsharded twin, without an engine: what the tests of single layers and handles compare."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from exactness import fresh_groups
from models import tiny
from torch import Tensor
from transformers import PreTrainedModel

import ds_seqpar
from ds_seqpar.checks.comparison import full_gradients, relative_error
from ds_seqpar.checks.reference import Skeleton
from ds_seqpar.checks.verification import Verification
from ds_seqpar.comm.collectives import all_gather, reduce_scatter
from ds_seqpar.engine import verified

__all__ = ["SplitTransport", "full_gradients", "proven", "relative_error", "same_loss_and_gradients", "twins"]


def twins(
    family: str = "llama", *, key: dict[str, Any] | None = None, **own: Any
) -> tuple[PreTrainedModel, PreTrainedModel]:
    """(sharded over the whole world, unsharded), equal weights, in float64 and training mode unless `own` says otherwise."""
    fresh_groups()
    own = {"dtype": torch.float64, **own}
    model, reference = tiny(family, **own), tiny(family, **own)
    ds_seqpar.shard(model, {"tp_size": dist.get_world_size(), "loss_chunk_tokens": 4, **(key or {})})
    return model.train(), reference.train()


def same_loss_and_gradients(
    model: Any, reference: Any, loss_of: Callable[[Any], Tensor], *, tolerance: float = 1e-6, what: str = ""
) -> None:
    """Asserts that `loss_of(model)` and its gradients equal those of the reference; clears both models' gradients.

    Hugging Face's RMS norms compute in fp32 whatever the dtype: that is where a tolerance above float64's comes from.
    """
    loss, expected = loss_of(model), loss_of(reference)
    error = relative_error(loss.detach(), expected.detach())
    assert error <= tolerance, f"{what}: loss {float(loss.detach())} instead of {float(expected.detach())}"
    loss.backward()
    expected.backward()
    mine = full_gradients(model)
    errors = {name: relative_error(mine[name], p.grad) for name, p in reference.named_parameters()}
    bad = {name: error for name, error in errors.items() if not error <= tolerance}
    assert not bad, f"{what}: relative errors of gradients: {bad}"
    model.zero_grad()
    reference.zero_grad()


def proven(family: str, key: dict[str, Any], dtype: torch.dtype = torch.float32, **own: Any) -> Verification:
    """The verdict on one sharded model."""
    fresh_groups()
    model = tiny(family, dtype=dtype, **own)
    skeleton = Skeleton(model)
    ds_seqpar.shard(model, {"tp_size": dist.get_world_size(), "loss_chunk_tokens": 4, **key})
    counted = dict(model.seqpar_report.materialised)
    found = verified(model, skeleton, 9)
    assert all(p.grad is None for p in model.parameters()), "gradients were left behind"
    assert dict(model.seqpar_report.materialised) == counted
    return found


class SplitTransport:
    """The order of the copy engines' transport over plain collectives: own rows arrive first, and are made last."""

    def __init__(self, group: Any) -> None:
        self.group, self.rank, self.size = group, dist.get_rank(group), dist.get_world_size(group)
        self.begun = self.released = 0

    def rows_of(self, rank: int, tokens: int) -> slice:
        rows = -(-tokens // self.size)
        return slice(min(rank * rows, tokens), min((rank + 1) * rows, tokens))

    def gather(self, shard: Tensor, tokens: int) -> _SplitGathering:
        self.begun += 1
        return _SplitGathering(self, all_gather(shard, self.group)[:tokens])

    def gather_made(self, like: Tensor, make: Callable[[Tensor], None], tokens: int) -> _SplitGathering:
        memory = torch.full_like(like, float("nan"))
        make(memory)
        return self.gather(memory, tokens)

    def scatter(self, tokens: int, width: int, like: Tensor) -> _SplitScattering:
        return _SplitScattering(self, tokens, like.new_zeros((self.size * -(-tokens // self.size), width)))


class _SplitGathering:
    def __init__(self, by: SplitTransport, full: Tensor) -> None:
        self.by, self.full = by, full

    def arrivals(self) -> Iterator[tuple[slice, Tensor]]:
        for step in range(self.by.size):
            rows = self.by.rows_of((self.by.rank + step) % self.by.size, self.full.shape[0])
            if rows.stop > rows.start:
                yield rows, self.full[rows]

    def whole(self) -> Tensor:
        return self.full

    def release(self) -> None:
        self.full = self.full.new_full(self.full.shape, float("nan"))  # whoever reads on gets nonsense
        self.by.released += 1


class _SplitScattering:
    def __init__(self, by: SplitTransport, tokens: int, full: Tensor) -> None:
        self.by, self.tokens, self.full = by, tokens, full

    def parts(self) -> Iterator[tuple[slice, Tensor]]:
        for step in range(1, self.by.size + 1):
            rows = self.by.rows_of((self.by.rank + step) % self.by.size, self.tokens)
            if rows.stop > rows.start:
                yield rows, self.full[rows]

    def wait(self) -> Tensor:
        return reduce_scatter(self.full, self.by.group)

    def addends(self) -> tuple[Tensor, Tensor | None]:
        total = self.wait()
        part = total * torch.rand(total.shape, device=total.device, dtype=total.dtype)  # neither is the sum
        return total - part, part.unsqueeze(0)
