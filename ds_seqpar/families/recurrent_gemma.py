"""RecurrentGemma: recurrent and attention blocks are repeated whole."""

STYLES = {
    "layers.*.temporal_block": "whole",
    "layers.*.mlp_block.gate_proj": "colwise",
    "layers.*.mlp_block.up_proj": "colwise",
    "layers.*.mlp_block.down_proj": "rowwise",
}
