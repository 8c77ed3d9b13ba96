"""Everything that is known of transformers: reads a model's facts, its loss, its checkpointing. No other file imports it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.loss.loss_utils import ForCausalLMLoss
from transformers.pytorch_utils import Conv1D

from .errors import PlanError
from .families import family
from .plan.facts import ModelFacts, ModuleFacts

__all__ = ["causal_lm_loss", "describe", "enable_full_recompute", "require_model", "write_checkpoint"]

LINEARS = ("FalconLinear",)
"""Subclasses of nn.Linear that compute what it does."""


def require_model(model: object) -> PreTrainedModel:
    """`model`, if it is a Hugging Face model that nothing wraps. Raises PlanError otherwise."""
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
    if base is model:  # some models name no base, but have one with the same config
        parts = (m for m in model.children() if isinstance(m, PreTrainedModel) and m.config is config)
        base = next(parts, model)
    data = family(model_type)
    if data.base:
        base = model.get_submodule(data.base)
    base_name = next((name for name, module in model.named_modules() if module is base), "")
    if getattr(config, "is_encoder_decoder", False):
        raise PlanError(f"model type {model_type!r} is an encoder-decoder; only decoder models can be sharded")
    if config.get_text_config() is not config:
        raise PlanError(f"model type {model_type!r} has several parts; only text models can be sharded")
    if getattr(model, "hf_quantizer", None) is not None:
        raise PlanError(
            f"this {model_type} model is quantized ({config.quantization_config}); load it without quantization"
        )
    replaced = next((m for m in (model, base) if "liger" in type(m).forward.__module__), None)
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
    heads = int(_common(config, "num_attention_heads") or 0)
    head_dim = _common(config, "head_dim") or (config.hidden_size // heads if heads else 0)
    kv_heads = int(_common(config, "num_key_value_heads") or _common(config, "num_kv_heads") or heads)
    return ModelFacts(
        model_type=model_type,
        base=base_name,
        tp_plan=plan,
        modules=_modules(model),
        embedding=names.get(id(embedding), ""),
        head=names[id(head)] if head is not None else None,
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=int(head_dim),
        hidden_size=int(config.hidden_size),
        block_heads=_block_heads(model, heads, kv_heads),
    )


def _common(config: Any, name: str) -> Any:
    """A value of the config; None if it has none, or if its layers differ in it."""
    try:
        return getattr(config, name, None)
    except RuntimeError:
        return None


def _block_heads(model: nn.Module, num_heads: int, num_kv_heads: int) -> dict[str, tuple[int, int]]:
    """(query heads, kv heads) of the attention modules whose sizes say something else than the config."""
    found = {}
    for name, module in model.named_modules():
        head_dim, key = getattr(module, "head_dim", None), getattr(module, "k_proj", None)
        groups = getattr(module, "num_key_value_groups", None)
        if not (isinstance(head_dim, int) and isinstance(key, nn.Linear) and isinstance(groups, int)):
            continue
        kv = key.out_features // head_dim
        if (kv * groups, kv) != (num_heads, num_kv_heads):
            found[name] = (kv * groups, kv)
    return found


def _modules(model: nn.Module) -> dict[str, ModuleFacts]:
    facts = {}
    for name, module in model.named_modules():
        shapes = {key: tuple(p.shape) for key, p in module._parameters.items() if p is not None}
        if shapes:
            role = "other"
            transposed = type(module) is Conv1D
            if type(module) is nn.Linear or type(module).__name__ in LINEARS or transposed:
                role = "linear"
            elif isinstance(module, nn.Embedding):
                role = "embedding"
            interleaved = getattr(module, "is_concatenated", True) is False
            facts[name] = ModuleFacts(role, type(module).__name__, shapes, transposed, interleaved)
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
    PreTrainedModel.save_pretrained(model, str(folder), state_dict=state_dict)
    if tokenizer is not None:
        tokenizer.save_pretrained(str(folder))
