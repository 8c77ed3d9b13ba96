"""Phi-3: q, k, v and gate, up are packed into one weight each; its attention slices by counts it reads from the config."""

STYLES = {
    "layers.*.self_attn.qkv_proj": "packed_colwise",
    "layers.*.self_attn.o_proj": "rowwise",
    "layers.*.mlp.gate_up_proj": "packed_colwise",
    "layers.*.mlp.down_proj": "rowwise",
}
ROLES = {
    "layers.*.self_attn.qkv_proj": ("q", "kv", "kv"),
    "layers.*.mlp.gate_up_proj": ("even", "even"),
}
ATTRIBUTES = {
    "layers.*.self_attn": {
        "config.num_attention_heads": "num_local_heads",
        "num_key_value_heads": "num_local_kv_heads",
    },
}
