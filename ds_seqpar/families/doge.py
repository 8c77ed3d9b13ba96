"""Doge: its attention makes a mask out of all kv heads at once."""

STYLES = {"layers.*.self_attn": "whole"}
LAYER_PARAMETERS = ("input_residual", "post_attention_residual")
