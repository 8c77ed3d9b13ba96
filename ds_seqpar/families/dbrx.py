"""DBRX: q, k, v are packed; its experts, which stand in one weight below each other, are repeated whole."""

STYLES = {
    "blocks.*.norm_attn_norm.attn.Wqkv": "packed_colwise",
    "blocks.*.norm_attn_norm.attn.out_proj": "rowwise",
    "blocks.*.ffn": "whole",
}
ROLES = {
    "blocks.*.norm_attn_norm.attn.Wqkv": ("q", "kv", "kv"),
    "blocks.*.norm_attn_norm.attn.out_proj": ("q",),
}
ATTRIBUTES = {"blocks.*.norm_attn_norm.attn": {"hidden_size": "local_width"}}
BLOCKS = (
    "blocks.*.norm_attn_norm.norm_1",
    "blocks.*.norm_attn_norm.attn",
    "blocks.*.norm_attn_norm.norm_2",
)
