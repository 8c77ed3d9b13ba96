"""What a model's own `tp_plan` cannot say, one small data file for each model type that needs one.

A type's file carries its name, with _ for -.

A file may hold these names, all optional; patterns are relative to the base model, `*` is a layer's number:

    STYLES      pattern -> style, over what the model's tp_plan says
    ROLES       pattern -> the sections of the cut dimension ("q", "kv", "qkv", "even"; see plan.styles.Role)
    ATTRIBUTES  block pattern -> {attribute: "num_local_heads" | "num_local_kv_heads" | "local_width"}; "config.x" is read through a view
                of the config that only this block sees
    LAYER_PARAMETERS  names of parameters that layers own themselves and use token by token
    TOKEN_INPUTS      names of arguments of a layer's forward, beside the hidden states, that hold something for each token
    HEAD_INPUTS       block pattern -> {argument of its forward: "heads" | "batch x heads" | "batch, heads"}, its first dimensions; "all"
                      for what every head is given whole
    BLOCKS      patterns of the modules that are blocks, where a layer's direct child is too much
    OPTIONAL    patterns of STYLES that some configurations of the type have no module for
    STACKS      what the modules are called that are called with tokens, where there are several; patterns are relative to each
    STATES      names of arguments of a stack's forward that are another stack's output
    REPEATS_STATES    True if the blocks that read STATES are repeated whole
    PADS        True if a stack pads its tokens itself, so that they are counted where its first layer is given them
    BASE        name of the module that is called with the inputs, where it is not transformers' base model
    LIKE        another model type whose file this one starts from; a type of which that is all stands in `relatives.py` instead
    SETTINGS    name in the config -> (the one value that can be sharded exactly, why no other can)
    REFUSED     why the type cannot be sharded exactly
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from .relatives import RELATIVES

__all__ = ["MEASURED_WITH", "RESULTS", "TESTED", "Family", "family", "has_data_file"]

_FILE = json.loads((Path(__file__).parent / "results.json").read_text())
MEASURED_WITH: str = _FILE["transformers"]
"""The transformers release that RESULTS were measured with."""

RESULTS: Mapping[str, Mapping[str, Any]] = _FILE["types"]
"""Model type -> what `python tests/parity.py` measured of it: status, styles, the largest relative error of a gradient."""

TESTED = tuple(name for name, result in RESULTS.items() if result["status"] == "exact")
"""Model types whose every gradient equals the unsharded model's in the tests."""


@dataclass(frozen=True)
class Family:
    """The contents of one data file."""

    styles: Mapping[str, str] = field(default_factory=dict)
    roles: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    attributes: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    layer_parameters: tuple[str, ...] = ()
    token_inputs: tuple[str, ...] = ()
    head_inputs: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    blocks: tuple[str, ...] = ()
    optional: tuple[str, ...] = ()
    stacks: tuple[str, ...] = ()
    states: tuple[str, ...] = ()
    repeats_states: bool = False
    pads: bool = False
    base: str = ""
    settings: Mapping[str, tuple[Any, str]] = field(default_factory=dict)
    refused: str = ""


def has_data_file(model_type: str) -> bool:
    """Whether there is a data file of the type, or of one that is the same in all that a file says."""
    return _file_of(model_type) is not None


def _file_of(model_type: str) -> str | None:
    name = RELATIVES.get(model_type, model_type).replace("-", "_")
    return name if name.isidentifier() and find_spec(f"{__name__}.{name}") is not None else None


def family(model_type: str) -> Family:
    """The data of a model type; empty if it needs none."""
    name = _file_of(model_type)
    if name is None:
        return Family()
    data = vars(import_module(f"{__name__}.{name}"))
    base = family(data["LIKE"]) if "LIKE" in data else Family()
    return Family(
        {**base.styles, **data.get("STYLES", {})},
        {**base.roles, **data.get("ROLES", {})},
        {**base.attributes, **data.get("ATTRIBUTES", {})},
        data.get("LAYER_PARAMETERS", base.layer_parameters),
        data.get("TOKEN_INPUTS", base.token_inputs),
        {**base.head_inputs, **data.get("HEAD_INPUTS", {})},
        data.get("BLOCKS", base.blocks),
        data.get("OPTIONAL", base.optional),
        data.get("STACKS", base.stacks),
        data.get("STATES", base.states),
        data.get("REPEATS_STATES", base.repeats_states),
        data.get("PADS", base.pads),
        data.get("BASE", base.base),
        {**base.settings, **data.get("SETTINGS", {})},
        data.get("REFUSED", base.refused),
    )
