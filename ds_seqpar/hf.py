"""Everything that is known of transformers: reads a model's facts, its loss, its checkpointing. No other file imports it."""

from __future__ import annotations

import copy
import difflib
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import torch
import transformers
from huggingface_hub import split_torch_state_dict_into_shards
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, core_model_loading, masking_utils
from transformers.core_model_loading import (
    Concatenate,
    MergeModulelist,
    WeightConverter,
    WeightRenaming,
    dot_natural_key,
    rename_source_key,
    revert_weight_conversion,
)
from transformers.integrations import deepspeed as hf_deepspeed
from transformers.loss.loss_utils import ForCausalLMLoss
from transformers.modeling_utils import remove_tied_weights_from_state_dict
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES
from transformers.pytorch_utils import Conv1D

from .errors import CheckpointError, ConfigError, PlanError
from .families import family, has_data_file
from .plan.facts import ModelFacts, ModuleFacts
from .plan.wrappers import adapter_layer, inner_model_path, is_foreign, runs_copies, unwrapped

__all__ = [
    "PartialLoad", "as_saved", "auto_from_pretrained", "causal_lm_loss", "describe", "empty_model", "enable_full_recompute",
    "leave_hub_kernels", "loading_parts", "masks_as_with_values", "names_in_file", "planned_config", "planned_model",
    "require_model", "saved_class", "split_into_files", "uses_sdpa", "with_layers", "write_config",
]  # fmt: skip

LINEARS = ("FalconLinear",)
"""Subclasses of nn.Linear that compute what it does."""


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
    own = {id(model.get_submodule(stack).get_input_embeddings()) for stack in stacks} - {id(embedding)}
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


@contextmanager
def loading_parts(prepare: Callable[[PreTrainedModel, list[str]], PartialLoad]) -> Iterator[None]:
    """Every `from_pretrained` of the body reads what `prepare` says, instead of whole tensors into whole parameters.

    `prepare(model, files)` gets the model on the meta device and its safetensors files; it may give parameters smaller
    shapes. ZeRO-3's zero.Init, which would partition over the whole world, stays off: the engine partitions later.

    Raises:
        CheckpointError: the checkpoint cannot be read in parts, or lacks a parameter that is cut.
    """
    plain_load = PreTrainedModel._load_pretrained_model
    plain_set, plain_config = core_model_loading.set_param_for_module, hf_deepspeed._hf_deepspeed_config_weak_ref
    background = os.environ.get("HF_DEACTIVATE_ASYNC_LOAD")

    def load(
        model: PreTrainedModel, state_dict: Any, checkpoint_files: Any, load_config: Any, expected_keys: Any = None
    ) -> Any:
        if state_dict is not None or not all(str(f).endswith(".safetensors") for f in checkpoint_files or [""]):
            raise CheckpointError(
                f"only safetensors files can be read in parts, not {checkpoint_files or 'a state_dict'}; save the model with "
                "save_pretrained first"
            )
        if load_config.hf_quantizer is not None or "disk" in (load_config.device_map or {}).values():
            raise CheckpointError("a quantized or disk-offloaded model cannot be read in parts; load it without")
        partial = prepare(model, [str(f) for f in checkpoint_files])
        _place(model, partial, load_config.weight_mapping or [])

        def set_param(model: Any, name: str, value: Tensor, *rest: Any) -> None:
            plain_set(model, name, partial.part(name, value), *rest)

        core_model_loading.set_param_for_module = set_param
        try:
            info, offloaded = plain_load(model, dict(partial.tensors), None, load_config, expected_keys)
        finally:
            core_model_loading.set_param_for_module = plain_set
        tied = set(getattr(model, "all_tied_weights_keys", None) or ())
        lost = sorted((set(info.missing_keys) & partial.cut_names) - tied)
        wrong = sorted(str(entry) for entry in info.mismatched_keys)
        if lost or wrong:
            raise CheckpointError(
                f"{(lost or wrong)[0]} is cut over the ranks, but {'missing from' if lost else 'of another shape in'} the checkpoint; "
                "load the model whole, and save it, first"
            )
        return info, offloaded

    PreTrainedModel._load_pretrained_model = staticmethod(load)
    hf_deepspeed._hf_deepspeed_config_weak_ref = None
    os.environ["HF_DEACTIVATE_ASYNC_LOAD"] = "1"  # in the background, tensors would be read long before they are wanted
    try:
        yield
    finally:
        PreTrainedModel._load_pretrained_model = staticmethod(plain_load)
        hf_deepspeed._hf_deepspeed_config_weak_ref = plain_config
        os.environ.pop("HF_DEACTIVATE_ASYNC_LOAD")
        if background is not None:
            os.environ["HF_DEACTIVATE_ASYNC_LOAD"] = background


def _place(model: PreTrainedModel, partial: PartialLoad, mapping: list[Any]) -> None:
    """Tells `partial` which tensor of the files becomes which parameter, by transformers' own rules."""
    renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
    of_pattern = {pattern: converter for converter in converters for pattern in converter.source_patterns}
    known = model.state_dict()
    sources: dict[str, dict[str, list[str]]] = {}
    for key, tensor in sorted(partial.tensors.items(), key=lambda item: dot_natural_key(item[0])):
        name, pattern = rename_source_key(key, renamings, converters, model.base_model_prefix, known)
        if name not in known and key in known:
            name, pattern = key, None
        if pattern is None:
            partial.place(tensor, name)
        else:
            sources.setdefault(name, {}).setdefault(pattern, []).append(key)
    for name, keys in sources.items():
        converter = of_pattern[next(iter(keys))]
        dim = _merged_in(converter)
        renamed = rename_source_key(name, renamings, converters, model.base_model_prefix, known)
        if dim is not None and keys.keys() == set(converter.source_patterns) and renamed == (name, None):
            partial.merge(name, [keys[pattern] for pattern in converter.source_patterns], dim)


def _merged_in(converter: WeightConverter) -> int | None:
    """The dimension in which a conversion puts stacks of tensors side by side; None if it does anything else."""
    kinds = [type(operation) for operation in converter.operations]
    if len(converter.target_patterns) > 1 or kinds[:1] != [MergeModulelist] or converter.operations[0].dim != 0:
        return None
    if kinds == [MergeModulelist]:
        return 1 if len(converter.source_patterns) == 1 else None
    return (
        converter.operations[1].dim
        if kinds == [MergeModulelist, Concatenate] and converter.operations[1].dim > 0
        else None
    )


class PartialLoad(Protocol):
    """What is read of a checkpoint."""

    cut_names: set[str]

    @property
    def tensors(self) -> Mapping[str, Any]:
        """Key in the file -> an object that reads its tensor when it is asked for [...]."""

    def place(self, tensor: Any, name: str) -> None:
        """Told that a tensor of the file becomes parameter `name` as it is, before it is read."""

    def merge(self, name: str, keys: list[list[str]], dim: int) -> None:
        """Told that the stacks of these tensors, side by side in `dim`, become parameter `name`; may replace them by one tensor."""

    def part(self, name: str, value: Tensor) -> Tensor:
        """This rank's part of what was read or made for a parameter."""


def auto_from_pretrained(path: str, model_class: Any, options: dict[str, Any]) -> PreTrainedModel:
    """`model_class.from_pretrained`; a causal language model if no class is given."""
    return (model_class or AutoModelForCausalLM).from_pretrained(path, **options)


def saved_class(path: str) -> Any:
    """The class that wrote the checkpoint at `path`, by its config; None if transformers has none of that name."""
    names = AutoConfig.from_pretrained(path).architectures or ["none"]
    return getattr(transformers, names[0], None)


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


def empty_model(folder: Path) -> PreTrainedModel:
    """The model that a saved config describes, on the meta device. Raises CheckpointError for a class transformers lacks."""
    config = AutoConfig.from_pretrained(folder)
    name = (config.architectures or ["none"])[0]
    cls = getattr(transformers, name, None)
    if cls is None:
        raise CheckpointError(
            f"{folder / 'config.json'} names the class {name}, which transformers {transformers.__version__} lacks"
        )
    with torch.device("meta"):
        return cls(config)


def planned_config(source: str, sizes: Mapping[str, Any] | None = None) -> Any:
    """The config of a folder, a config.json, a model type (with `sizes` over its defaults) or a name on the Hub.

    Raises ConfigError in one line: unknown, gated, not reachable, or not what the config class takes.
    """
    path = Path(source)
    try:
        if source and (path.is_dir() or path.is_file()):
            config = AutoConfig.from_pretrained(path)
        elif source in CONFIG_MAPPING:
            _require_sizes(CONFIG_MAPPING[source](), sizes or {})
            return CONFIG_MAPPING[source](**(sizes or {}))
        elif source.count("/") == 1 and path.suffix != ".json" and source[0] not in "./~":
            config = AutoConfig.from_pretrained(source)
        else:
            raise ConfigError(
                f"{source!r} is neither a folder with a config.json, nor such a file, nor a model type of transformers "
                f"{transformers.__version__}"
            )
        _require_sizes(config, sizes or {})
        for name, value in (sizes or {}).items():
            setattr(config, name, value)
        return config
    except ConfigError:
        raise
    except Exception as problem:  # whatever a config class or the Hub's client throws at what a user typed
        here = path.exists() or source in CONFIG_MAPPING
        why = "is not one that can be used" if here else "cannot be had (gated, unknown, or unreachable?)"
        raise ConfigError(f"the config of {source!r} {why}: {_one_line(problem)}") from problem


def _one_line(problem: Exception) -> str:
    """The first line of its message, and the next where that only announces it."""
    lines = [text.strip() for text in str(problem).splitlines() if text.strip()] or [type(problem).__name__]
    return " ".join(lines[: 2 if lines[0].endswith(":") else 1])


def _require_sizes(config: Any, sizes: Mapping[str, Any]) -> None:
    """Raises ConfigError for a field that the config has not, or a size that no model can have."""
    for name, value in sizes.items():
        if not hasattr(config, name) and name != "head_dim":  # which many models read, and few configs name
            near = difflib.get_close_matches(name, config.to_dict(), n=1)
            hint = f"; did you mean {near[0]}?" if near else ""
            raise ConfigError(f"the config of {config.model_type!r} has no field {name!r}{hint}")
        if name.endswith(("_size", "_layers", "_heads", "_dim")) and isinstance(value, int) and value < 1:
            raise ConfigError(f"{name}={value}: a size must be at least 1")


def is_encoder(config: Any) -> bool:
    """Whether the model of a config predicts masked tokens (or has an encoder that does), and no next ones."""
    return getattr(config, "is_decoder", None) is False and config.model_type in MODEL_FOR_MASKED_LM_MAPPING_NAMES


def planned_model(config: Any, dtype: torch.dtype) -> PreTrainedModel:
    """The causal language model of a config, without memory for its weights. Raises PlanError if there is none."""
    config = copy.deepcopy(config)
    config.use_cache = False
    try:
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(config, dtype=dtype)
    except Exception as problem:  # a class that is not there, or sizes that its code cannot work with
        raise PlanError(
            f"transformers makes no causal language model of type {config.model_type!r}: {_one_line(problem)[:200]}"
        ) from problem


@contextmanager
def masks_as_with_values() -> Iterator[None]:
    """Attention masks of fake tensors are left out where those of real, unpadded and unpacked tokens are."""
    plain = masking_utils.is_tracing
    masking_utils.is_tracing = lambda tensor=None: False
    try:
        yield
    finally:
        masking_utils.is_tracing = plain


def with_layers(model: PreTrainedModel, keep: Mapping[str, list[int]]) -> None:
    """Keeps of each list of layers (by its name) these, and of the config's lists that have an entry a layer the same."""
    config = model.config
    for name, indices in keep.items():
        owner, _, attribute = name.rpartition(".")
        layers = getattr(model.get_submodule(owner), attribute)
        for key, value in list(vars(config).items()):
            if isinstance(value, list | tuple) and len(value) == len(layers):
                setattr(config, key, [value[i] for i in indices])
        setattr(model.get_submodule(owner), attribute, nn.ModuleList([layers[i] for i in indices]))
        config.num_hidden_layers = len(indices)


def write_config(model: PreTrainedModel, folder: Path, tokenizer: Any = None) -> None:
    """Everything of a checkpoint but its weights: config, generation config, the code of a custom model, the tokenizer."""
    PreTrainedModel.save_pretrained(model, str(folder), state_dict={})
    for weights in folder.glob("model*.safetensors*"):
        weights.unlink()
    if tokenizer is not None:
        tokenizer.save_pretrained(str(folder))
