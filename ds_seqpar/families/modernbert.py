"""ModernBERT: q, k, v are packed into one weight, and so are the MLP's input and gate."""

STYLES = {
    "layers.*.attn.Wqkv": "packed_colwise",
    "layers.*.attn.Wo": "rowwise",
    "layers.*.mlp.Wi": "packed_colwise",
    "layers.*.mlp.Wo": "rowwise",
}
ROLES = {
    "layers.*.attn.Wqkv": ("q", "kv", "kv"),
    "layers.*.attn.Wo": ("q",),
    "layers.*.mlp.Wi": ("even", "even"),
}
