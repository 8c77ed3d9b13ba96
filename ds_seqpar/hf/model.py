"""A Hugging Face model's own switches: its loss, its checkpointing, its kernels."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.loss.loss_utils import ForCausalLMLoss

from ..errors import PlanError
from ..plan.wrappers import inner_model_path

__all__ = ["causal_lm_loss", "enable_full_recompute", "leave_hub_kernels", "require_model", "uses_sdpa"]


def require_model(model: object) -> PreTrainedModel:
    """`model`, or the one inside a known wrapper, if it is a Hugging Face model. Raises PlanError otherwise."""
    path = inner_model_path(model)
    if path is not None and isinstance(model, nn.Module):
        model = model.get_submodule(path)
    if isinstance(model, PreTrainedModel):
        return model
    inner = getattr(model, "module", None)
    if isinstance(inner, PreTrainedModel):
        raise PlanError(
            f"the model is wrapped in {type(model).__name__}; pass the Hugging Face model itself, before any wrapper"
        )
    raise PlanError(f"ds_seqpar shards Hugging Face models (transformers.PreTrainedModel), not {type(model).__name__}")


def causal_lm_loss(model: PreTrainedModel) -> Callable[..., Tensor] | None:
    """The model's loss if it is transformers' causal-LM loss, which the fused loss equals; otherwise None."""
    loss = model.loss_function
    return loss if loss is ForCausalLMLoss else None


def enable_full_recompute(model: PreTrainedModel) -> None:
    """Full recompute in Hugging Face's own way, so that `recompute` and gradient_checkpointing_enable() are one thing."""
    model.gradient_checkpointing_enable()


def leave_hub_kernels(model: PreTrainedModel) -> int:
    """Takes the forwards of `use_kernels` off the module objects, and keeps `train()` and `eval()` from putting them back.

    Returns how many there were. They change with the mode, so that each switch would hide the sharded modules' own forwards.
    """
    if not getattr(model, "use_kernels", False):
        return 0
    model._use_kernels = False
    kernelized = [m for m in model.modules() if hasattr(type(m), "kernel_layer_name") and "forward" in vars(m)]
    for module in kernelized:
        del module.forward
    return len(kernelized)


def uses_sdpa(model: PreTrainedModel) -> bool:
    """Whether the model's attention goes through torch's scaled_dot_product_attention."""
    return str(getattr(model.config, "_attn_implementation", "")) == "sdpa"
