"""A short training run under the replica check, which a test may harm on the way."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from exactness import engine_for
from models import batches, tiny

from ds_seqpar import ReplicaMismatchError

__all__ = ["KEY", "train_with_checks"]

KEY = {"tp_size": 2, "replica_check_interval": 2}
ONE_KV = dict(num_key_value_heads=1, num_attention_heads=6)


def train_with_checks(
    stage: int, harm: Callable[[Any], None] | None, steps: int = 5, lr: float = 1e-3, **ds: Any
) -> str:
    """Trains with a check every other step; `harm(engine)` on rank 1 after the third. What the check said, or "trained"."""
    torch.manual_seed(0)
    model = tiny("qwen2", **ONE_KV).train()
    engine = engine_for(model, torch.optim.AdamW(model.parameters(), lr=lr), KEY, stage, 1, 2, **ds)
    try:
        for i, batch in enumerate(batches(2 * steps, 1)):
            engine.backward(engine(**batch).loss)
            engine.step()
            if i == 5 and harm is not None and dist.get_rank() == 1:
                harm(engine)
    except ReplicaMismatchError as problem:
        return str(problem)
    finally:
        engine.destroy()
    return "trained"
