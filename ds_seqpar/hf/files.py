"""How transformers reads, names and writes a checkpoint."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import torch
import transformers
from huggingface_hub import split_torch_state_dict_into_shards
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, core_model_loading
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
from transformers.modeling_utils import remove_tied_weights_from_state_dict

from ..errors import CheckpointError

__all__ = [
    "PartialLoad", "as_saved", "auto_from_pretrained", "empty_model", "loading_parts", "names_in_file", "saved_class",
    "split_into_files", "write_config",
]  # fmt: skip


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
        whole = {name: x.to("meta") for name, x in model.state_dict().items()}
        partial = prepare(model, [str(f) for f in checkpoint_files])
        _place(model, partial, load_config.weight_mapping or [])

        def set_param(model: Any, name: str, value: Tensor, *rest: Any) -> None:
            plain_set(model, name, partial.part(name, value), *rest)

        core_model_loading.set_param_for_module = set_param
        try:
            with _shows_whole(model, whole):
                info, offloaded = plain_load(model, dict(partial.tensors), None, load_config, expected_keys)
        finally:
            core_model_loading.set_param_for_module = plain_set
        partial.loaded(model)
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

    def loaded(self, model: PreTrainedModel) -> None:
        """Told that the parameters of the model are what they stay."""


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


def as_saved(model: PreTrainedModel, tensors: Mapping[str, Tensor], whole: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Some of the model's tensors, whole, under the names, and in the layout, of the original checkpoint.

    `whole`: the model's state dict on the meta device, every tensor whole.
    """
    with _shows_whole(model, whole):
        return revert_weight_conversion(model, dict(tensors))  # type: ignore[no-any-return]


@contextmanager
def _shows_whole(model: PreTrainedModel, whole: Mapping[str, Tensor]) -> Iterator[None]:
    """Conversions ask the model for a parameter's shape, and decide by it whether a tensor lies as the model has it: not a part's."""
    plain = model.get_parameter
    model.get_parameter = lambda target: whole[target] if target in whole else plain(target)
    try:
        yield
    finally:
        del model.get_parameter


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


def write_config(model: PreTrainedModel, folder: Path, tokenizer: Any = None) -> None:
    """Everything of a checkpoint but its weights: config, generation config, the code of a custom model, the tokenizer."""
    PreTrainedModel.save_pretrained(model, str(folder), state_dict={})
    for weights in folder.glob("model*.safetensors*"):
        weights.unlink()
    if tokenizer is not None:
        tokenizer.save_pretrained(str(folder))
