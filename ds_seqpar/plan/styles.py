"""The words of a plan: the styles of transformers' `tp_plan`, and which heads a projection is made of."""

from __future__ import annotations

from enum import Enum

__all__ = ["ROLES_BY_NAME", "Role", "Style"]


class Style(str, Enum):
    """What a module becomes. Values are transformers' words where it has one."""

    COLUMN = "colwise"
    ROW = "rowwise"
    PACKED_COLUMN = "packed_colwise"  # several column-parallel linears in one weight
    HEAD = "colwise_gather_output"  # the language-model head
    EMBEDDING = "embedding_rowwise"
    PARTIAL = "replicated_with_grad_allreduce"
    CUT_NORM = "norm_over_cut_dim"  # ours: an RMS norm over all heads, cut with them


class Role(str, Enum):
    """What one section of a cut dimension is made of, hence where it may be cut."""

    QUERY = "q"  # num_attention_heads x head_dim
    KV = "kv"  # num_key_value_heads x head_dim
    QKV = "qkv"  # num_attention_heads x 3 x head_dim, interleaved head by head
    EVEN = "even"  # anywhere


ROLES_BY_NAME: dict[str, tuple[str, ...]] = {"q_proj": ("q",), "k_proj": ("kv",), "v_proj": ("kv",), "o_proj": ("q",)}
"""Projections whose name says what they hold, in nearly every model; a family's data file says it for the others."""
