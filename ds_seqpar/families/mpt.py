"""MPT: q, k, v are packed; every head has its slope of the alibi."""

STYLES = {
    "blocks.*.attn.Wqkv": "packed_colwise",
    "blocks.*.attn.out_proj": "rowwise",
    "blocks.*.ffn.up_proj": "colwise",
    "blocks.*.ffn.down_proj": "rowwise",
}
ROLES = {
    "blocks.*.attn.Wqkv": ("q", "kv", "kv"),
    "blocks.*.attn.out_proj": ("q",),
}
HEAD_INPUTS = {"blocks.*.attn": {"position_bias": "heads"}}
