"""TRL: its trainers take per-token log-probabilities from a forward that they put on the model object before it is sharded.

That forward reads the head's weight itself, which on a rank is a part of it. On a sharded model the figures come from the
vocabulary-parallel head instead, in chunks, equal on every rank. TRL is imported by whoever uses it, never here.

Private names it relies on, each held by a contract test:
`trl.trainer.utils._fused_forward`.
"""

from __future__ import annotations

import functools
import inspect
import types
from collections.abc import Callable
from typing import Any

from torch import Tensor
from torch.nn.functional import pad

from ds_seqpar.engine import ADOPTED_FORWARDS
from ds_seqpar.errors import PlanError
from ds_seqpar.layers.logits import ShardedLogits

from . import trl_online
from .accelerate import WHEN_ON

__all__ = ["install"]


def install() -> None:
    """Adapts TRL. Idempotent."""
    ADOPTED_FORWARDS["trl.trainer.utils", "_fused_forward"] = _sharded_fused_forward
    if trl_online.adapt not in WHEN_ON:
        WHEN_ON.append(trl_online.adapt)


def _sharded_fused_forward(model: Any, fused: Callable[..., Any]) -> Callable[..., Any]:
    """The same forward for the same settings, which only its closure knows, on a sharded model."""
    settings = inspect.getclosurevars(
        inspect.unwrap(fused, stop=lambda f: f.__code__.co_name == "_fused_forward")
    ).nonlocals
    if settings["cast_lm_head_to_fp32"]:
        raise PlanError("cast_lm_head_to_fp32=True is not available on a sharded head; set it to False")
    scale, softcap, temperature = (settings[k] for k in ("logit_scale", "final_logit_softcapping", "temperature"))

    def transform(z: Tensor) -> Tensor:
        z = z * scale
        z = z if softcap is None else softcap * (z / softcap).tanh()
        return z / temperature  # type: ignore[no-any-return]

    @functools.wraps(type(model).forward)
    def forward(self: Any, *args: Any, fused_lm_head: bool = False, **kwargs: Any) -> Any:
        if not fused_lm_head:
            return type(self).forward(self, *args, **kwargs)
        labels, shifted = kwargs.pop("labels", None), kwargs.pop("shift_labels", None)
        return _fused(self, args, {**kwargs, "use_cache": False}, labels, shifted, transform, settings["outputs"])

    return types.MethodType(forward, model)


def _fused(
    model: Any, args: Any, kwargs: Any, labels: Tensor, shifted: Tensor | None, transform: Any, outputs: tuple[str, ...]
) -> Any:
    from trl.trainer.utils import FusedCausalLMOutput

    items = kwargs.pop("num_items_in_batch", None)
    if kwargs.get("output_router_logits"):
        raise PlanError("TRL's auxiliary loss of a mixture of experts is not available here")
    logits = model.get_output_embeddings()(model.base_model(*args, **kwargs).last_hidden_state)
    if not isinstance(logits, ShardedLogits):
        raise PlanError(f"the head of this {type(model).__name__} is not sharded")
    ours = pad(labels, (0, 1), value=-100)[..., 1:] if shifted is None else shifted
    mask = ours != -100
    logits.made.lost = True
    figures = logits.head.token_figures(
        logits.source, logits.region, ours.clamp(min=0).reshape(-1), vocab_size=logits.head.vocab_size,
        chunk_tokens=logits.state.loss_chunk_tokens, transforms=(transform,),
    )  # fmt: skip
    last = None if shifted is not None else -1
    named = {
        name: getattr(figures, name).view(mask.shape).masked_fill(~mask, 0)[:, :last]
        for name in ("log_probs", *outputs)
    }
    mask = mask[:, :last]
    counted = mask.sum().clamp(min=1) if items is None else items
    return FusedCausalLMOutput(loss=-named["log_probs"].sum() / counted, label_mask=mask, **named)
