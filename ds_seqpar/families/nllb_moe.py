"""NLLB-MoE: mixtures of experts, which drop tokens beyond their capacity, are repeated whole."""

STYLES = {
    "layers.*.self_attn.q_proj": "colwise",
    "layers.*.self_attn.k_proj": "colwise",
    "layers.*.self_attn.v_proj": "colwise",
    "layers.*.self_attn.out_proj": "rowwise",
    "layers.*.cross_attention.q_proj": "colwise",
    "layers.*.cross_attention.k_proj": "colwise",
    "layers.*.cross_attention.v_proj": "colwise",
    "layers.*.cross_attention.out_proj": "rowwise",
    "layers.*.ffn.fc1": "colwise",
    "layers.*.ffn.fc2": "rowwise",
    "layers.*.ffn.router.classifier": "whole",
}
OPTIONAL = ("layers.*.ffn.fc1", "layers.*.ffn.fc2", "layers.*.ffn.router.classifier")
STACKS = ("encoder", "decoder")
STATES = ("encoder_hidden_states",)
