"""GPT-2: linears are stored [in, out]; q, k, v are packed, and sliced by a width that attention keeps."""

STYLES = {
    "h.*.attn.c_attn": "packed_colwise",
    "h.*.attn.c_proj": "rowwise",
    "h.*.mlp.c_fc": "colwise",
    "h.*.mlp.c_proj": "rowwise",
}
ROLES = {
    "h.*.attn.c_attn": ("q", "kv", "kv"),
    "h.*.attn.c_proj": ("q",),
}
ATTRIBUTES = {"h.*.attn": {"split_size": "local_width"}}
