"""Qwen4-Exp: the streams of the residual are mixed token by token."""

STYLES = {"layers.*.attn_hyper_connection": "tokenwise", "layers.*.mlp_hyper_connection": "tokenwise"}
