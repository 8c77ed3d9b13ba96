"""AFMoE: the block of experts owns the bias that its choice is corrected by; attention's output is gated, head by head."""

STYLES = {
    "layers.*.mlp": "replicated_with_grad_allreduce",
    "layers.*.self_attn.q_proj": "colwise",
    "layers.*.self_attn.k_proj": "colwise",
    "layers.*.self_attn.v_proj": "colwise",
    "layers.*.self_attn.gate_proj": "colwise",
    "layers.*.self_attn.o_proj": "rowwise",
    "layers.*.self_attn.q_norm": "replicated_with_grad_allreduce",
    "layers.*.self_attn.k_norm": "replicated_with_grad_allreduce",
}
ROLES = {"layers.*.self_attn.gate_proj": ("q",)}
