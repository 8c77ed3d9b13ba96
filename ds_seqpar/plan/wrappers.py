"""What others put around a model, or around its linears, before it is sharded: as data, found by class name.

Names in a plan are those of the unwrapped model; whoever touches a module asks here what stands in its place.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

__all__ = [
    "AdapterLayer", "adapter_layer", "adapters_around", "inner_model_path", "is_foreign", "places", "runs_copies", "saved_names",
    "unwrapped",
]  # fmt: skip


@dataclass(frozen=True)
class AdapterLayer:
    """A module around a base layer that adds up(down(dropout(x))) to its output. Fields name its attributes.

    `dropout`, `down`, `up` are mappings from an adapter's name to a module. `lookup`, `mix`: those of an embedding, mappings to
    parameters [r, V] and [h, r]. `parameter` holds the name of the one parameter of the base layer that up and down change.
    `refused`: attributes that must be empty, and what it means if they are not.
    """

    base: str
    dropout: str
    down: str = ""
    up: str = ""
    lookup: str = ""
    mix: str = ""
    parameter: str = ""
    refused: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class ModelWrapper:
    """A module around a model. `inner`: where in it the model stands.

    `picks`: (module, function) that takes the wrapper, `state_dict=` and `adapter_name=` and returns the entries that its
    `save_pretrained` writes, for each of the names in the attribute `adapters`.
    """

    inner: str
    adapters: str
    picks: tuple[str, str]


_VARIANTS = {"lora_variant": "a LoRA variant such as DoRA, whose weight norms run over columns that other ranks hold"}

ADAPTER_LAYERS: dict[str, AdapterLayer] = {
    "peft.tuners.lora.layer.Linear": AdapterLayer(
        base="base_layer", dropout="lora_dropout", down="lora_A", up="lora_B", refused=_VARIANTS
    ),
    "peft.tuners.lora.layer.Embedding": AdapterLayer(
        base="base_layer",
        dropout="lora_dropout",
        lookup="lora_embedding_A",
        mix="lora_embedding_B",
        refused=_VARIANTS,
    ),
    "peft.tuners.lora.layer.ParamWrapper": AdapterLayer(
        base="base_layer",
        dropout="lora_dropout",
        down="lora_A",
        up="lora_B",
        parameter="parameter_name",
        refused=_VARIANTS,
    ),
}
MODEL_WRAPPERS: dict[str, ModelWrapper] = {
    "peft.peft_model.PeftModel": ModelWrapper(
        "base_model.model", "peft_config", ("peft.utils.save_and_load", "get_peft_model_state_dict")
    )
}
COPIES: dict[str, tuple[str, str]] = {"peft.utils.other.ModulesToSaveWrapper": ("original_module", "modules_to_save")}
"""Class that runs one of several copies of a module -> its attributes: the frozen copy, and a mapping to the trained ones."""
FOREIGN = ("peft.",)
"""Modules of these packages that no table names are refused: what they compute is not known."""


def _class_names(thing: Any) -> list[str]:
    return [f"{cls.__module__}.{cls.__qualname__}" for cls in type(thing).__mro__]


def adapter_layer(module: Any) -> AdapterLayer | None:
    """How `module` wraps a base layer; None if it does not. Exact classes only: a subclass computes something else."""
    return ADAPTER_LAYERS.get(_class_names(module)[0])


def adapters_around(module: Any) -> list[tuple[Any, AdapterLayer]]:
    """The adapter layers that are put around a base layer, the outermost first; none if `module` is no adapter layer."""
    found = []
    while (layer := adapter_layer(module)) is not None:
        found.append((module, layer))
        module = getattr(module, layer.base)
    return found


def runs_copies(module: Any) -> bool:
    """True for a module that runs one of several copies of another."""
    return _class_names(module)[0] in COPIES


def places(module: Any) -> dict[str, Any]:
    """Path inside `module` -> a module that does its work: the base layer of adapters, each of several copies, or itself ("")."""
    if runs_copies(module):
        frozen, trained = COPIES[_class_names(module)[0]]
        found = {f".{trained}.{name}": copy for name, copy in getattr(module, trained).items()}
        return {**found, f".{frozen}": getattr(module, frozen)}
    path = ""
    for outer, layer in adapters_around(module):
        module, path = getattr(outer, layer.base), f"{path}.{layer.base}"
    return {path: module}


def unwrapped(module: Any) -> Any:
    """What does the work of `module` (see `places`): the first, if there are several."""
    return next(iter(places(module).values()))


def is_foreign(module: Any) -> bool:
    """True for a wrapper's module that no table names."""
    foreign = _class_names(module)[0].startswith(FOREIGN)
    return foreign and adapter_layer(module) is None and not runs_copies(module)


def model_wrapper(model: Any) -> ModelWrapper | None:
    """What is known of a wrapper of a model; None if `model` is not a known wrapper."""
    return next((MODEL_WRAPPERS[name] for name in _class_names(model) if name in MODEL_WRAPPERS), None)


def inner_model_path(model: Any) -> str | None:
    """Where in a wrapper the model itself stands, as a module path; None if `model` is not a known wrapper."""
    known = model_wrapper(model)
    return None if known is None else known.inner


def saved_names(wrapper: Any, state: Mapping[str, Any]) -> list[str]:
    """The names of `state`, the wrapper's whole state dict, that the wrapper's own `save_pretrained` writes; in their order.

    All of them if it would write something that is not in `state` as it is.
    """
    known = model_wrapper(wrapper)
    assert known is not None, "only known wrappers are sharded"
    module, function = known.picks
    picks = getattr(importlib.import_module(module), function)
    names = {id(value): name for name, value in state.items()}
    taken = [
        id(value)
        for adapter in getattr(wrapper, known.adapters)
        for value in picks(wrapper, state_dict=dict(state), adapter_name=adapter).values()
    ]
    if not set(taken) <= set(names):
        return list(state)
    wanted = {names[one] for one in taken}
    return [name for name in state if name in wanted]
