"""CTRL: the two linears of the MLP stand in a sequence."""

STYLES = {
    "h.*.multi_head_attention.Wq": "colwise",
    "h.*.multi_head_attention.Wk": "colwise",
    "h.*.multi_head_attention.Wv": "colwise",
    "h.*.multi_head_attention.dense": "rowwise",
    "h.*.ffn.0": "colwise",
    "h.*.ffn.2": "rowwise",
}
ROLES = {
    "h.*.multi_head_attention.Wq": ("q",),
    "h.*.multi_head_attention.Wk": ("kv",),
    "h.*.multi_head_attention.Wv": ("kv",),
    "h.*.multi_head_attention.dense": ("q",),
}
