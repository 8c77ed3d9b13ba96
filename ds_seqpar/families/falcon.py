"""Falcon: q, k, v are interleaved kv head by kv head; multi-query attention is repeated whole."""

STYLES = {
    "h.*.self_attention.query_key_value": "colwise",
    "h.*.self_attention.dense": "rowwise",
    "h.*.mlp.dense_h_to_4h": "colwise",
    "h.*.mlp.dense_4h_to_h": "rowwise",
}
ROLES = {
    "h.*.self_attention.query_key_value": ("qkv",),
    "h.*.self_attention.dense": ("q",),
}
HEAD_INPUTS = {"h.*.self_attention": {"alibi": "batch, heads", "attention_mask": "batch, heads"}}
