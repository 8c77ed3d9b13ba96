"""TrOCR's decoder: its attentions view their output in the shape of their input, and are repeated whole."""

STYLES = {
    "layers.*.self_attn": "whole",
    "layers.*.encoder_attn": "whole",
    "layers.*.fc1": "colwise",
    "layers.*.fc2": "rowwise",
}
STACKS = ("decoder",)
STATES = ("encoder_hidden_states",)
REPEATS_STATES = True
