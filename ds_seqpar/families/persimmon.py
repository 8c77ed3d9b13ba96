"""Persimmon: q, k, v are interleaved head by head and normed."""

STYLES = {
    "layers.*.self_attn.query_key_value": "colwise",
    "layers.*.self_attn.dense": "rowwise",
    "layers.*.self_attn.q_layernorm": "replicated_with_grad_allreduce",
    "layers.*.self_attn.k_layernorm": "replicated_with_grad_allreduce",
    "layers.*.mlp.dense_h_to_4h": "colwise",
    "layers.*.mlp.dense_4h_to_h": "rowwise",
}
OPTIONAL = ("layers.*.self_attn.q_layernorm", "layers.*.self_attn.k_layernorm")
ROLES = {"layers.*.self_attn.query_key_value": ("qkv",), "layers.*.self_attn.dense": ("q",)}
