"""MiniMax-M3: gate and up of dense MLPs and of the shared experts are packed into one weight."""

STYLES = {
    "layers.*.mlp.gate_up_proj": "packed_colwise",
    "layers.*.mlp.down_proj": "rowwise",
    "layers.*.mlp.shared_experts.gate_up_proj": "packed_colwise",
    "layers.*.mlp.shared_experts.down_proj": "rowwise",
}
OPTIONAL = (
    "layers.*.mlp.gate_up_proj",
    "layers.*.mlp.down_proj",
    "layers.*.mlp.shared_experts.gate_up_proj",
    "layers.*.mlp.shared_experts.down_proj",
)
ROLES = {
    "layers.*.mlp.gate_up_proj": ("even", "even"),
    "layers.*.mlp.shared_experts.gate_up_proj": ("even", "even"),
}
