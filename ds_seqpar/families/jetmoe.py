"""JetMoE: attention, whose heads are chosen as experts are, is repeated whole."""

STYLES = {
    "layers.*.self_attention": "whole",
    "layers.*.mlp": "local_params",
    "layers.*.mlp.bias": "added_once",
    "layers.*.mlp.input_linear": "moe_tp_experts",
    "layers.*.mlp.input_linear.weight": "packed_colwise",
    "layers.*.mlp.output_linear": "moe_tp_experts",
    "layers.*.mlp.output_linear.weight": "rowwise",
}
