"""Everything that is known of transformers: reads a model's facts, its loss, its checkpointing. No other file imports it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.loss.loss_utils import ForCausalLMLoss

from .errors import PlanError
from .plan.facts import ModelFacts, ModuleFacts
from .plan.wrappers import adapter_layer, inner_model_path, is_foreign

__all__ = ["causal_lm_loss", "describe", "enable_full_recompute", "require_model", "write_checkpoint"]


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


def describe(model: PreTrainedModel) -> ModelFacts:
    """The facts that a plan is made of. Raises PlanError for encoder-decoders and multi-part models."""
    config = model.config
    model_type = str(config.model_type)
    base = model.base_model
    base_name = next((name for name, module in model.named_modules() if module is base), "")
    if getattr(config, "is_encoder_decoder", False):
        raise PlanError(f"model type {model_type!r} is an encoder-decoder; only decoder models can be sharded")
    if config.get_text_config() is not config:
        raise PlanError(f"model type {model_type!r} has several parts; only text models can be sharded")
    if getattr(model, "hf_quantizer", None) is not None:
        raise PlanError(
            f"this {model_type} model is quantized ({config.quantization_config}); load it without quantization"
        )
    replaced = next((m for m in (model, base) if "liger" in getattr(m.forward, "__module__", "")), None)
    if replaced is not None:
        raise PlanError(
            f"Liger replaced the forward of {type(replaced).__name__} by one that reads the head's weight itself; apply Liger "
            "with fused_linear_cross_entropy=False (the loss is fused here)"
        )
    plan = {(f"{base_name}.{k}" if base_name else k): v for k, v in (config.base_model_tp_plan or {}).items()}
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    names = {id(module): name for name, module in model.named_modules()}
    if plan and (embedding is None or id(embedding) not in names):
        raise PlanError(f"model type {model_type!r} has no input embedding that can be found")
    heads = int(getattr(config, "num_attention_heads", 0) or 0)
    head_dim = getattr(config, "head_dim", None) or (config.hidden_size // heads if heads else 0)
    return ModelFacts(
        model_type=model_type,
        base=base_name,
        tp_plan=plan,
        modules=_modules(model),
        embedding=names.get(id(embedding), ""),
        head=names[id(head)] if head is not None else None,
        num_heads=heads,
        num_kv_heads=int(getattr(config, "num_key_value_heads", None) or heads),
        head_dim=int(head_dim),
        hidden_size=int(config.hidden_size),
    )


def _modules(model: nn.Module) -> dict[str, ModuleFacts]:
    facts = {}
    wrapped = ""
    for name, module in model.named_modules():
        if wrapped and name.startswith(f"{wrapped}."):
            continue
        if is_foreign(module):
            kind = f"{type(module).__module__}.{type(module).__name__}"
            raise PlanError(f"{name} is a {kind}, which cannot be sharded; LoRA and rsLoRA on linears can")
        wrapper = adapter_layer(module)
        if wrapper is not None:
            wrapped, module = name, getattr(module, wrapper.base)
        shapes = {key: tuple(p.shape) for key, p in module._parameters.items() if p is not None}
        if shapes:
            role = "other"
            if type(module) is nn.Linear:
                role = "linear"
            elif isinstance(module, nn.Embedding):
                role = "embedding"
            facts[name] = ModuleFacts(role, type(module).__name__, shapes)
    return facts


def causal_lm_loss(model: PreTrainedModel) -> Callable[..., Tensor] | None:
    """The model's loss if it is transformers' causal-LM loss, which the fused loss equals; otherwise None."""
    loss = model.loss_function
    return loss if loss is ForCausalLMLoss else None


def enable_full_recompute(model: PreTrainedModel) -> None:
    """Full recompute in Hugging Face's own way, so that `recompute` and gradient_checkpointing_enable() are one thing."""
    model.gradient_checkpointing_enable()


def write_checkpoint(
    model: PreTrainedModel, folder: Path, state_dict: dict[str, Tensor], tokenizer: Any = None
) -> None:
    """Writes config, generation config, weights (and tokenizer) as `save_pretrained` of an unsharded model would."""
    if isinstance(model, PreTrainedModel):
        PreTrainedModel.save_pretrained(model, str(folder), state_dict=state_dict)
    else:
        model.save_pretrained(str(folder), state_dict=state_dict)  # a wrapper writes its own part
    if tokenizer is not None:
        tokenizer.save_pretrained(str(folder))
