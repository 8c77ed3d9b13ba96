"""One step of a planned model type, sharded and not: every parameter's gradient, accumulation 2."""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch
import torch.distributed as dist
from exactness import fresh_groups
from model_types import batches_for, causal, tiny_of
from sharding import full_gradients, relative_error
from torch import Tensor

import ds_seqpar

__all__ = ["parity"]


def _loss(model: Any, batch: dict[str, Tensor]) -> Tensor:
    if causal(model.config):
        return model(**batch).loss  # type: ignore[no-any-return]
    last = model(input_ids=batch["input_ids"]).last_hidden_state
    weight = torch.linspace(-1.0, 1.0, last.numel(), dtype=last.dtype, device=last.device).view(last.shape)
    return (last * weight).square().mean() + (last * weight).mean()


def parity(model_type: str, seq: int = 7) -> dict[str, Any]:
    """{"error": worst relative error, "worst": its parameter, "kinds": ..., "remarks": ...}; run on every rank."""
    fresh_groups()
    model, reference = tiny_of(model_type), tiny_of(model_type)
    styles = sorted(set((model.config.base_model_tp_plan or {}).values()))
    report = ds_seqpar.shard(model, {"tp_size": dist.get_world_size(), "loss_chunk_tokens": 4})
    model.train(), reference.train()
    errors: dict[str, float] = {}
    for i, batch in enumerate(batches_for(2, 3, seq)):
        loss, expected = _loss(model, batch) / 2, _loss(reference, batch) / 2
        errors[f"loss {i}"] = relative_error(loss.detach(), expected.detach())
        loss.backward()
        expected.backward()
    mine = full_gradients(model)
    for name, parameter in reference.named_parameters():
        errors[name] = relative_error(mine[name], parameter.grad)
    worst = max(errors, key=lambda name: errors[name])
    entries = report.parameters()
    total = sum(p.numel() for p in reference.parameters())
    held = sum(torch.Size(entry.local_shape).numel() for entry in {id(e): e for e in entries.values()}.values())
    return {
        "error": errors[worst], "worst": worst, "styles": styles, "parameters": total, "held": held,
        "bad": [f"{n} {e:.1e}" for n, e in errors.items() if not e <= 1e-5][:12],
        "kinds": dict(Counter(entry.kind for entry in entries.values())),
        "remarks": [r for r in report.remarks if "not among the model types" not in r],
        "materialised": dict(report.materialised),
    }  # fmt: skip
