"""What a plan needs to know of a model, as plain data."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

__all__ = ["ModelFacts", "ModuleFacts"]


@dataclass(frozen=True)
class ModuleFacts:
    """A module that owns parameters. `role`: "linear", "embedding" or "other"; shapes of its own parameters only."""

    role: str
    type_name: str
    shapes: Mapping[str, tuple[int, ...]]
    transposed: bool = False  # a linear whose weight is [in, out]
    interleaved: bool = False  # experts that keep gate and up in alternating rows


@dataclass(frozen=True)
class ModelFacts:
    """A model, by name and number. Module names are full; `tp_plan` patterns are full too.

    Of a model of several parts (a vision tower and a language model) everything but the names is the language model's.
    """

    model_type: str
    text_type: str  # model type of the language model; the same if the model is nothing else
    data_file: str  # whose data file holds: the model's own, otherwise its language model's
    base: str  # name of the base model, "" if the model is its own
    tp_plan: Mapping[str, str]
    modules: Mapping[str, ModuleFacts]
    embedding: str | None  # None: whatever embeds is not an nn.Embedding of the model's own, and stays whole
    head: str | None
    num_heads: int
    num_kv_heads: int
    head_dim: int
    hidden_size: int
    block_heads: Mapping[str, tuple[int, int]] = field(default_factory=dict)  # where a block's differ from the model's
    stacks: tuple[
        str, ...
    ] = ()  # an encoder and a decoder, each called with tokens of its own, where there are several
    more_embeddings: tuple[str, ...] = ()  # further tables over the vocabulary, tied to `embedding` or not
    tied: Mapping[str, str] = field(default_factory=dict)  # parameter -> the first parameter that is the same object

    def heads_of(self, block: str) -> tuple[int, int]:
        """(query heads, kv heads) of an attention block."""
        return self.block_heads.get(block, (self.num_heads, self.num_kv_heads))

    @property
    def has_other_parts(self) -> bool:
        """True if there is more than a language model: towers, whose tokens are others."""
        return self.text_type != self.model_type

    @property
    def bases(self) -> tuple[str, ...]:
        """Names of the modules that are called with tokens, and cut them: the base model, or each of its stacks."""
        return self.stacks or (self.base,)

    def full_names(self, relative: str) -> tuple[str, ...]:
        """A name relative to a base, made full: one for each base."""
        return tuple(f"{base}.{relative}" if base else relative for base in self.bases)
