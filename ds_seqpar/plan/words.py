"""What has been said of a model's modules: transformers' plan, the type's data file over it, the user's own over both."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass

from ..errors import PlanError
from ..families import Family
from .facts import ModelFacts
from .patterns import all_names, matches, starred
from .styles import Role, Style

__all__ = ["BY_NAME", "TRANSFORMERS", "USERS", "Word", "Words", "data_file_of", "read_words"]

Word = tuple[Style, str]
"""A style, and who said so."""

TRANSFORMERS, USERS, BY_NAME = (
    "transformers' tp_plan",
    "the plan in the ds_seqpar key",
    "its name is the usual one",
)


def data_file_of(facts: ModelFacts) -> str:
    """How the type's data file is called as the ground of a plan."""
    return f"data file of {facts.data_file}"


@dataclass(frozen=True)
class Words:
    """`of`: module, parameter or block name -> style and ground. `roles`: the user's patterns -> roles of a weight's sections."""

    of: Mapping[str, Word]
    roles: Mapping[str, tuple[str, ...]]


def read_words(facts: ModelFacts, family: Family, users: Mapping[str, str]) -> Words:
    """Every word of the three plans, by the name that it is about. Raises PlanError for one that fits nothing, or twice."""
    found: dict[str, Word] = {}
    roles_of: dict[str, tuple[str, ...]] = {}
    styles: dict[tuple[str, ...], tuple[str, str]] = {
        (pattern,): (word, TRANSFORMERS) for pattern, word in facts.tp_plan.items()
    }
    for pattern, word in family.styles.items():
        styles[facts.full_names(pattern)] = (word, data_file_of(facts))
    for pattern, word in users.items():
        word, _, roles = word.partition(":")
        if roles:
            roles_of[pattern] = _roles_of(pattern, roles)
        styles[(pattern,)] = (word, USERS)
    optional = {facts.full_names(pattern) for pattern in family.optional}
    names = all_names(facts.modules)
    for patterns, (word, why) in styles.items():
        pattern = " or ".join(patterns)
        hits = [name for name in names if any(matches(p, name) for p in patterns)]
        if (
            not hits and why != TRANSFORMERS and patterns not in optional
        ):  # theirs is for every configuration of the type
            close = difflib.get_close_matches(pattern, {starred(name) for name in names}, n=3, cutoff=0.5)
            raise PlanError(
                f"plan pattern {pattern!r} ({why}) matches no module of this {facts.model_type} model; near it are {close}"
            )
        for name in hits:
            if name in found and found[name][1] != why and why == USERS:
                pass  # the user's word replaces transformers' and the data file's
            elif name in found:
                raise PlanError(f"{name} is matched by two plan patterns; the second is {pattern!r} ({why})")
            found[name] = (_style(word, name), why)
    if not found:
        raise PlanError(f"no pattern of the plan matches a module of this {facts.model_type} model: {list(styles)}")
    return Words(found, roles_of)


def _roles_of(pattern: str, words: str) -> tuple[str, ...]:
    roles = tuple(word.strip() for word in words.split(","))
    known = [role.value for role in Role]
    unknown = [role for role in roles if role not in known]
    if unknown:
        raise PlanError(f"plan pattern {pattern!r}: unknown role(s) {unknown} after the colon; known roles: {known}")
    return roles


def _style(word: str, name: str) -> Style:
    try:
        return Style(word)
    except ValueError:
        known = [style.value for style in Style]
        raise PlanError(
            f"{name}: style {word!r} has no sequence-parallel counterpart yet; known styles: {known}"
        ) from None
