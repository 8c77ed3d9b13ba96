"""xLSTM: every rank repeats the cells."""

STYLES = {
    "blocks.*.mlstm_layer": "whole",
    "blocks.*.ffn.proj_up_gate": "colwise",
    "blocks.*.ffn.proj_up": "colwise",
    "blocks.*.ffn.proj_down": "rowwise",
}
