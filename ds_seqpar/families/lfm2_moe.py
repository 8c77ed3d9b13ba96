"""LFM2-MoE: transformers plans its experts alone; its convolutions are repeated whole."""

STYLES = {
    "layers.*.self_attn.q_proj": "colwise",
    "layers.*.self_attn.k_proj": "colwise",
    "layers.*.self_attn.v_proj": "colwise",
    "layers.*.self_attn.out_proj": "rowwise",
    "layers.*.self_attn.q_layernorm": "replicated_with_grad_allreduce",
    "layers.*.self_attn.k_layernorm": "replicated_with_grad_allreduce",
}
ROLES = {"layers.*.self_attn.out_proj": ("q",)}
OPTIONAL = (
    "layers.*.self_attn.q_proj",
    "layers.*.self_attn.k_proj",
    "layers.*.self_attn.v_proj",
    "layers.*.self_attn.out_proj",
    "layers.*.self_attn.q_layernorm",
    "layers.*.self_attn.k_layernorm",
)
