"""A sharded model beside its unsharded twin, without an engine: what the tests of single layers and handles compare."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from exactness import fresh_groups
from models import tiny
from torch import Tensor
from transformers import PreTrainedModel

import ds_seqpar
from ds_seqpar.checkpoint.gathering import gather_parameter

__all__ = ["full_gradients", "relative_error", "same_loss_and_gradients", "twins"]


def twins(
    family: str = "llama", *, key: dict[str, Any] | None = None, **own: Any
) -> tuple[PreTrainedModel, PreTrainedModel]:
    """(sharded over the whole world, unsharded), equal weights, in float64 and training mode unless `own` says otherwise."""
    fresh_groups()
    own = {"dtype": torch.float64, **own}
    model, reference = tiny(family, **own), tiny(family, **own)
    ds_seqpar.shard(model, {"tp_size": dist.get_world_size(), "loss_chunk_tokens": 4, **(key or {})})
    return model.train(), reference.train()


def full_gradients(model: Any) -> dict[str, Tensor | None]:
    """Every parameter's whole gradient by name, on every rank. Collective."""
    entries, group = model.seqpar_report.parameters(), model.seqpar.groups.tp_group
    gradients: dict[str, Tensor | None] = {}
    for name, parameter in model.named_parameters():
        cut, grad = entries[name].cut, parameter.grad
        gradients[name] = grad if cut is None or grad is None else gather_parameter(grad, cut, group)
    return gradients


def relative_error(mine: Tensor | None, theirs: Tensor | None) -> float:
    """|mine - theirs| / |theirs|; infinite if only one of them is there or one is not finite where the other is."""
    if mine is None or theirs is None:
        return 0.0 if mine is theirs else float("inf")
    if not bool(torch.isfinite(theirs).all()):
        return 0.0 if torch.equal(mine.isnan(), theirs.isnan()) else float("inf")
    error = float((mine.double() - theirs.double()).norm() / theirs.double().norm().clamp_min(1e-9))
    return error if error == error else float("inf")


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
