"""GPT-OSS: experts keep gate and up interleaved and have biases; every head has a sink."""

STYLES = {
    "layers.*.self_attn": "local_params",
    "layers.*.self_attn.sinks": "colwise",
    "layers.*.self_attn.q_proj": "colwise",
    "layers.*.self_attn.k_proj": "colwise",
    "layers.*.self_attn.v_proj": "colwise",
    "layers.*.self_attn.o_proj": "rowwise",
    "layers.*.mlp.experts": "moe_tp_experts",
    "layers.*.mlp.experts.gate_up_proj": "packed_rowwise",
    "layers.*.mlp.experts.gate_up_proj_bias": "packed_rowwise",
    "layers.*.mlp.experts.down_proj": "colwise",
    "layers.*.mlp.experts.down_proj_bias": "added_once",
}
