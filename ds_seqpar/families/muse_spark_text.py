"""Muse Spark: gates on the residual take two states of each token."""

STYLES = {"layers.*.post_attention_residual_gate": "tokenwise", "layers.*.post_feedforward_residual_gate": "tokenwise"}
