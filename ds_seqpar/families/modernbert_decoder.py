"""ModernBERT as a decoder: q, k, v are three linears."""

STYLES = {
    "layers.*.attn.q_proj": "colwise",
    "layers.*.attn.k_proj": "colwise",
    "layers.*.attn.v_proj": "colwise",
    "layers.*.attn.Wo": "rowwise",
    "layers.*.mlp.Wi": "packed_colwise",
    "layers.*.mlp.Wo": "rowwise",
}
ROLES = {"layers.*.attn.Wo": ("q",), "layers.*.mlp.Wi": ("even", "even")}
