"""GPT-BigCode: q, k, v are interleaved head by head; multi-query attention is repeated whole."""

STYLES = {
    "h.*.attn.c_attn": "colwise",
    "h.*.attn.c_proj": "rowwise",
    "h.*.mlp.c_fc": "colwise",
    "h.*.mlp.c_proj": "rowwise",
}
ROLES = {"h.*.attn.c_attn": ("qkv",), "h.*.attn.c_proj": ("q",)}
