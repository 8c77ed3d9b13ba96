"""Module names: patterns that match them, and the layers and blocks that they stand in."""

from __future__ import annotations

import re
from collections.abc import Mapping

from .facts import ModelFacts, ModuleFacts

__all__ = ["all_names", "child_of", "layer_of", "matches", "matches_in", "starred"]


def all_names(modules: Mapping[str, ModuleFacts]) -> list[str]:
    """Names that a pattern may match: modules with parameters, the modules around them, and the parameters."""
    names: dict[str, None] = {}
    for name, module in modules.items():
        parts = name.split(".")
        names.update({".".join(parts[:i]): None for i in range(1, len(parts) + 1)})
        names.update({f"{name}.{key}" if name else key: None for key in module.shapes})
    return list(names)


def starred(name: str) -> str:
    return ".".join("*" if part.isdigit() else part for part in name.split("."))


def matches(pattern: str, name: str) -> bool:
    """True if `name` is `pattern` with each `*` standing for one part of it."""
    return re.fullmatch(re.escape(pattern).replace(r"\*", r"[^.]+"), name) is not None


def matches_in(facts: ModelFacts, relative: str, name: str) -> bool:
    """`matches`, for a pattern relative to the model's base, or to each of its stacks."""
    return any(matches(pattern, name) for pattern in facts.full_names(relative))


def layer_of(name: str) -> str | None:
    found = re.match(r"(.*?\.?[^.\d][^.]*\.\d+)\.", name)
    return found.group(1) if found else None


def child_of(layer: str, name: str) -> str:
    """The child of `layer` that holds `name`; in a list of children, the one by number."""
    child, *rest = name[len(layer) + 1 :].split(".")
    return f"{layer}.{child}.{rest[0]}" if rest and rest[0].isdigit() else f"{layer}.{child}"
