"""The facts of a Hugging Face model that a plan is made of."""

from __future__ import annotations

from typing import Any

from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from ..errors import PlanError
from ..families import family, has_data_file
from ..plan.facts import ModelFacts, ModuleFacts
from ..plan.wrappers import adapter_layer, is_foreign, runs_copies, unwrapped

__all__ = ["describe"]

LINEARS = ("FalconLinear",)
"""Subclasses of nn.Linear that compute what it does."""


def describe(model: PreTrainedModel) -> ModelFacts:
    """The facts that a plan is made of: of the language model, if the model has other parts.

    Raises PlanError for encoder-decoders without a data file, and for settings that cannot be kept exact.
    """
    config = model.config
    model_type = str(config.model_type)
    text = _text_config(config)
    top = model if text is config else _language_model(model, text)
    data_file = model_type if has_data_file(model_type) else str(text.model_type)
    data = family(data_file)
    stacks = _stacks(model, data.stacks)
    if getattr(config, "is_encoder_decoder", False) and not stacks:
        raise PlanError(
            f"model type {model_type!r} is an encoder-decoder without a data file that names its stacks; it cannot be sharded"
        )
    names = {id(module): name for name, module in model.named_modules()}
    base = _base_of(top, data.base)
    base_name, plans_name = names[id(base)], names[id(_base_of(top, ""))]
    if getattr(model, "hf_quantizer", None) is not None:
        how = getattr(config, "quantization_config", None)
        method = how.get("quant_method") if isinstance(how, dict) else getattr(how, "quant_method", None)
        raise PlanError(
            f"this {model_type} model is quantized ({getattr(method, 'value', method)}); packed weights cannot be cut, so QLoRA is not "
            "available: load the model without quantization and use LoRA"
        )
    replaced = next((m for m in (model, base) if "liger" in getattr(m.forward, "__module__", "")), None)
    if replaced is not None:
        raise PlanError(
            f"Liger replaced the forward of {type(replaced).__name__} by one that reads the head's weight itself; apply Liger "
            "with fused_linear_cross_entropy=False (the loss is fused here)"
        )
    _refuse_settings(text)
    for name, (value, why) in data.settings.items():
        if getattr(text, name, value) != value:
            raise PlanError(f"{name}={getattr(text, name)!r} cannot be sharded exactly: {why}; set it to {value!r}")
    plan = {(f"{plans_name}.{k}" if plans_name else k): v for k, v in (text.base_model_tp_plan or {}).items()}
    embedding, head = _input_embedding(model), model.get_output_embeddings()
    heads = int(_common(text, "num_attention_heads") or 0)
    head_dim = _common(text, "head_dim") or (text.hidden_size // heads if heads else 0)
    kv_heads = int(_common(text, "num_key_value_heads") or _common(text, "num_kv_heads") or heads)
    return ModelFacts(
        model_type=model_type,
        text_type=str(text.model_type),
        data_file=data_file,
        base=base_name,
        tp_plan=plan,
        modules=_modules(model),
        embedding=names.get(id(embedding)),
        head=names.get(id(head)),
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=int(head_dim),
        hidden_size=int(text.hidden_size),
        block_heads=_block_heads(model, heads, kv_heads),
        stacks=stacks,
        more_embeddings=_more_embeddings(model, stacks, embedding),
        tied=_tied(model),
    )


def _text_config(config: Any) -> Any:
    """The config of the language model; the model's own if it is nothing else."""
    try:
        return config.get_text_config()
    except ValueError:
        raise PlanError(
            f"model type {config.model_type!r} has more than one language model; shard the one that is trained by itself"
        ) from None


def _language_model(model: PreTrainedModel, text: Any) -> PreTrainedModel:
    """The outermost part of a model of several that the config `text` describes."""
    parts = [m for m in model.modules() if isinstance(m, PreTrainedModel) and m is not model]
    of_text = [m for m in parts if m.config is text] or [m for m in parts if type(m.config) is type(text)]
    if not of_text:
        raise PlanError(
            f"model type {model.config.model_type!r} has several parts, and none of them is a model of its own for its language "
            f"({text.model_type!r})"
        )
    return of_text[0]


def _base_of(model: PreTrainedModel, path: str) -> nn.Module:
    """The module that is called with the inputs: at `path` if there is one, otherwise transformers' base model."""
    base: nn.Module = model.get_submodule(path) if path else model.base_model
    if base is not model:
        return base
    # some models name no base, but have one with the same config
    parts = (m for m in model.children() if isinstance(m, PreTrainedModel) and m.config is model.config)
    return next(parts, model)


def _input_embedding(model: PreTrainedModel) -> nn.Module | None:
    """What transformers calls the input embedding; None if that is a list of them, or a tower's projection of patches."""
    try:
        embedding = model.get_input_embeddings()
    except NotImplementedError:
        return None
    return embedding if isinstance(unwrapped(embedding), nn.Embedding) else None


def _stacks(model: PreTrainedModel, called: tuple[str, ...]) -> tuple[str, ...]:
    """Names of the models inside `model` that are called with tokens, each for itself; `called` are their last names."""
    return tuple(
        name
        for name, module in model.named_modules()
        if name.rpartition(".")[2] in called and isinstance(module, PreTrainedModel)
    )


def _more_embeddings(model: PreTrainedModel, stacks: tuple[str, ...], embedding: Any) -> tuple[str, ...]:
    """Names of the stacks' own embedding modules; tied or not, they are not the model's."""
    own = {id(_input_embedding(model.get_submodule(stack))) for stack in stacks} - {id(embedding), id(None)}
    return tuple(name for name, module in model.named_modules() if id(module) in own)


def _tied(model: PreTrainedModel) -> dict[str, str]:
    """Name of a parameter -> the first name of the same parameter, where there are several, or will be once it is loaded."""
    first: dict[int, str] = {}
    found: dict[str, str] = {}
    parameters = dict(model.named_parameters(remove_duplicate=False))
    for name, parameter in parameters.items():
        if first.setdefault(id(parameter), name) != name:
            found[name] = first[id(parameter)]
    to_be: dict[str, str] = getattr(model, "all_tied_weights_keys", None) or {}
    for name, source in to_be.items():
        unloaded = name in parameters and parameters[name].is_meta
        if unloaded and source in parameters and parameters[source] is not parameters[name]:
            found[name] = found.get(source, source)
    return found


def _refuse_settings(config: Any) -> None:
    for name in ("layerdrop", "encoder_layerdrop", "decoder_layerdrop"):
        if getattr(config, name, 0.0):
            raise PlanError(
                f"{name}={getattr(config, name)}: layers are skipped by random numbers that differ between ranks; set it to 0.0"
            )
    if getattr(config, "drop_path_rate", 0.0):
        raise PlanError(
            f"drop_path_rate={config.drop_path_rate}: a block's output is dropped image by image, where a rank holds tokens of several; "
            "set it to 0.0"
        )
    if getattr(config, "chunk_size_feed_forward", 0):
        raise PlanError(
            f"chunk_size_feed_forward={config.chunk_size_feed_forward} cuts the sequence inside a layer; set it to 0 (the "
            '"recompute" field of the ds_seqpar key saves the same memory)'
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
        own = tuple(vars(module).get(count) for count in ("num_heads", "num_key_value_heads"))
        if all(type(count) is int for count in own) and own != (num_heads, num_kv_heads) and not hasattr(module, "k_proj"):
            found[name] = own  # of a packed weight
        head_dim, key = getattr(module, "head_dim", None), unwrapped(getattr(module, "k_proj", None))
        groups = getattr(module, "num_key_value_groups", 1 if hasattr(module, "embed_dim") else None)
        if not (isinstance(head_dim, int) and isinstance(key, nn.Linear) and isinstance(groups, int)):
            continue
        kv = key.out_features // head_dim
        if (kv * groups, kv) != (num_heads, num_kv_heads):
            found[name] = (kv * groups, kv)
    return found


def _modules(model: nn.Module) -> dict[str, ModuleFacts]:
    facts = {}
    wrapped = ""
    for name, module in model.named_modules():
        if wrapped and name.startswith(f"{wrapped}."):
            continue
        if is_foreign(module):
            kind = f"{type(module).__module__}.{type(module).__name__}"
            raise PlanError(f"{name} is a {kind}, which cannot be sharded; LoRA and rsLoRA can")
        if adapter_layer(module) is not None or runs_copies(module):
            wrapped, module = name, unwrapped(module)
            if any(True for child in module.children() for _ in child.parameters()):
                raise PlanError(
                    f"{name} is trained as a copy of a module with parts; name the parts that own parameters instead"
                )
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
