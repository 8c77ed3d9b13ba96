"""Everything that is known of transformers: reads a model's facts, its loss, its checkpointing. No other file imports it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import split_torch_state_dict_into_shards
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion
from transformers.loss.loss_utils import ForCausalLMLoss
from transformers.modeling_utils import remove_tied_weights_from_state_dict

from .errors import PlanError
from .plan.facts import ModelFacts, ModuleFacts

__all__ = [
    "as_saved", "causal_lm_loss", "describe", "enable_full_recompute", "names_in_file", "require_model", "split_into_files",
    "write_config",
]  # fmt: skip


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
    for name, module in model.named_modules():
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


def names_in_file(model: PreTrainedModel, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The entries of a whole state dict on the meta device that a checkpoint holds: one of tied ones, none that are never saved."""
    ignored = set(model._keys_to_ignore_on_save or ())
    kept = {name: tensor for name, tensor in tensors.items() if name not in ignored}
    return remove_tied_weights_from_state_dict(kept, model)  # type: ignore[no-any-return]


def as_saved(model: PreTrainedModel, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Some of the model's tensors under the names, and in the layout, of the original checkpoint."""
    return revert_weight_conversion(model, dict(tensors))  # type: ignore[no-any-return]


def split_into_files(
    tensors: Mapping[str, Tensor], max_shard_size: int | str, weights_name: str
) -> tuple[dict[str, list[str]], int]:
    """(file name -> names of its tensors, in their order; bytes in all), as Hugging Face splits and names them."""
    stem, dot, suffix = weights_name.rpartition(".")
    split = split_torch_state_dict_into_shards(
        dict(tensors), filename_pattern=f"{stem}{{suffix}}{dot}{suffix}", max_shard_size=max_shard_size
    )
    return split.filename_to_tensors, sum(x.numel() * x.element_size() for x in tensors.values())


def write_config(model: PreTrainedModel, folder: Path, tokenizer: Any = None) -> None:
    """Everything of a checkpoint but its weights: config, generation config, the code of a custom model, the tokenizer."""
    PreTrainedModel.save_pretrained(model, str(folder), state_dict={})
    for weights in folder.glob("model*.safetensors*"):
        weights.unlink()
    if tokenizer is not None:
        tokenizer.save_pretrained(str(folder))
