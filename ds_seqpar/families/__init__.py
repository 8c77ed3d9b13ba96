"""What a model's own `tp_plan` cannot say, one small data file for each model type that needs one.

A file may hold these names, all optional; patterns are relative to the base model, `*` is a layer's number:

    STYLES      pattern -> style, over what the model's tp_plan says
    ROLES       pattern -> the sections of the cut dimension ("q", "kv", "qkv", "even")
    ATTRIBUTES  block pattern -> {attribute: "num_local_heads" | "num_local_kv_heads"}; "config.x" is read through a view
                of the config that only this block sees
    NORM_EPS    pattern -> the attribute that holds the epsilon of a norm over all heads
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib import import_module
from importlib.util import find_spec

__all__ = ["TESTED", "Family", "family"]

TESTED = (
    "llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3_text", "phi3", "smollm3", "olmo2", "granite", "gpt_neox",
)  # fmt: skip
"""Model types whose every gradient is compared with the unsharded model's by the tests."""


@dataclass(frozen=True)
class Family:
    """The contents of one data file."""

    styles: Mapping[str, str] = field(default_factory=dict)
    roles: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    attributes: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    norm_eps: Mapping[str, str] = field(default_factory=dict)


def family(model_type: str) -> Family:
    """The data of a model type; empty if it needs none."""
    name = f"{__name__}.{model_type.replace('-', '_')}"
    if not model_type.isidentifier() or find_spec(name) is None:
        return Family()
    data = vars(import_module(name))
    return Family(data.get("STYLES", {}), data.get("ROLES", {}), data.get("ATTRIBUTES", {}), data.get("NORM_EPS", {}))
