"""What others put around a model, or around its linears, before it is sharded: as data, found by class name.

Names in a plan are those of the unwrapped model; whoever touches a module asks here what stands in its place.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

__all__ = ["AdapterLayer", "adapter_layer", "inner_model_path", "is_foreign"]


@dataclass(frozen=True)
class AdapterLayer:
    """A module around a base layer that adds up(down(dropout(x))) to its output. Fields name its attributes.

    `dropout`, `down`, `up` are mappings from an adapter's name to a module. `whole` are mappings to parameters that stay whole
    on every rank. `refused`: attributes that must be empty, and what it means if they are not.
    """

    base: str
    dropout: str
    down: str = ""
    up: str = ""
    whole: tuple[str, ...] = ()
    refused: Mapping[str, str] = field(default_factory=dict)


_VARIANTS = {"lora_variant": "a LoRA variant such as DoRA, whose weight norms run over columns that other ranks hold"}

ADAPTER_LAYERS: dict[str, AdapterLayer] = {
    "peft.tuners.lora.layer.Linear": AdapterLayer(
        base="base_layer", dropout="lora_dropout", down="lora_A", up="lora_B", refused=_VARIANTS
    ),
    "peft.tuners.lora.layer.Embedding": AdapterLayer(
        base="base_layer", dropout="lora_dropout", whole=("lora_embedding_A", "lora_embedding_B"), refused=_VARIANTS
    ),
}
MODEL_WRAPPERS: dict[str, str] = {"peft.peft_model.PeftModel": "base_model.model"}
"""Class of a wrapper -> where in it the model stands."""
FOREIGN = ("peft.",)
"""Modules of these packages that no table names are refused: what they compute is not known."""


def _class_names(thing: Any) -> list[str]:
    return [f"{cls.__module__}.{cls.__qualname__}" for cls in type(thing).__mro__]


def adapter_layer(module: Any) -> AdapterLayer | None:
    """How `module` wraps a base layer; None if it does not. Exact classes only: a subclass computes something else."""
    return ADAPTER_LAYERS.get(_class_names(module)[0])


def is_foreign(module: Any) -> bool:
    """True for a wrapper's module that no table names."""
    return _class_names(module)[0].startswith(FOREIGN) and adapter_layer(module) is None


def inner_model_path(model: Any) -> str | None:
    """Where in a wrapper the model itself stands, as a module path; None if `model` is not a known wrapper."""
    return next((MODEL_WRAPPERS[name] for name in _class_names(model) if name in MODEL_WRAPPERS), None)
