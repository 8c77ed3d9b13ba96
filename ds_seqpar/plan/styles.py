"""The words of a plan: the styles of transformers' `tp_plan`, and which heads a projection is made of."""

from __future__ import annotations

from enum import Enum

__all__ = ["CONVENTIONAL", "NORMS_OVER_HEADS", "ROLES_BY_NAME", "ROUTER_NAMES", "BlockKind", "Role", "Style"]


class Style(str, Enum):
    """What a module becomes. Values are transformers' words where it has one."""

    COLUMN = "colwise"
    ROW = "rowwise"
    PACKED_COLUMN = "packed_colwise"  # several column-parallel linears in one weight
    PACKED_ROW = "packed_rowwise"  # the same in an expert weight that is stored transposed
    HEAD = "colwise_gather_output"  # the language-model head; inside a layer, a column-parallel linear
    ROW_OF_WHOLE = "rowwise_split_input"  # its counterpart: a row-parallel linear
    EMBEDDING = "embedding_rowwise"
    EMBEDDING_COLUMN = "embedding_colwise"  # an embedding inside a block, cut by heads: relative position biases
    WHOLE_COLUMN = "replicate"  # an embedding, which is cut by vocabulary all the same
    PARTIAL = "replicated_with_grad_allreduce"
    LATENT = "mla_kv_a_proj"  # computed on this rank's tokens, then gathered: the latent is narrower than the input
    EXPERTS = "moe_tp_experts"
    IDENTITY = "moe_identity_expert"
    LOCAL = "local_params"  # a module whose own parameters are cut
    SUMMED = "all_reduce"  # a module whose output is a partial sum
    CUT_NORM = "norm_over_cut_dim"  # ours: an RMS norm over all heads, cut with them
    WHOLE = "whole"  # ours: every rank repeats the block on all tokens
    ONCE = "added_once"  # ours: a bias of experts, added by the first rank alone
    TOKENWISE = "tokenwise"  # ours: runs on this rank's tokens
    SHARED = "shared"  # ours: holds parameters of the vocabulary that another module uses
    ROUTER = "router"  # ours: chooses experts, alike on every rank


class BlockKind(str, Enum):
    """How a block is entered and left."""

    GROUPED = "grouped"  # column-parallel linears share one gather, row-parallel ones reduce-scatter their output
    ENTRY = "entry"  # column-parallel linears alone; a neighbour block is the exit
    EXIT = "exit"  # row-parallel linears alone, and what follows them
    SUMMED = "summed"  # one gather, and one reduce-scatter of what the block returns: mixtures of experts
    EXPERTS = "experts"  # the block is the experts module itself: tokens, choices and weights are gathered
    WHOLE = "whole"
    UNDECIDED = "undecided"  # no plan says anything: token-wise if it proves to be, otherwise whole


class Role(str, Enum):
    """What one section of a cut dimension is made of, hence where it may be cut."""

    QUERY = "q"  # num_attention_heads x anything
    KV = "kv"  # num_key_value_heads x anything
    QKV = "qkv"  # kv head by kv head: the query heads of its group, its key, its value, each head_dim wide
    EVEN = "even"  # anywhere
    TILES = "tiles"  # between tiles of 8, if it is made of them: products over all experts want aligned rows
    PAIRS = "pairs"  # between pairs: gate and up interleaved; aligned as tiles are


ROLES_BY_NAME: dict[str, tuple[str, ...]] = {
    "q_proj": ("q",), "k_proj": ("kv",), "v_proj": ("kv",), "o_proj": ("q",), "q_b_proj": ("q",), "kv_b_proj": ("q",),
    "q_norm": ("q",), "k_norm": ("kv",), "sinks": ("q",), "gate_bias": ("q",), "g_proj": ("q",), "q_gate_proj": ("q",),
}  # fmt: skip
"""Projections whose name says what they hold, in nearly every model; a family's data file says it for the others."""

NORMS_OVER_HEADS = ("q_norm", "k_norm", "q_layernorm", "k_layernorm")

ROUTER_NAMES = ("gate", "router")
"""What the choice of experts is called, beside the experts."""

CONVENTIONAL: tuple[dict[str, Style], ...] = (
    {"q_proj": Style.COLUMN, "k_proj": Style.COLUMN, "v_proj": Style.COLUMN, "o_proj": Style.ROW},
    {"gate_proj": Style.COLUMN, "up_proj": Style.COLUMN, "down_proj": Style.ROW},
    {
        "q_proj": Style.COLUMN, "q_a_proj": Style.LATENT, "q_b_proj": Style.COLUMN, "kv_a_proj_with_mqa": Style.LATENT,
        "kv_b_proj": Style.COLUMN, "o_proj": Style.ROW,
    },
)  # fmt: skip
"""Blocks that a plan is silent about are cut all the same if their linears carry exactly names out of one of these."""
