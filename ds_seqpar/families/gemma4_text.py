"""Gemma 4: every layer is given its part of the per-layer embeddings."""

STYLES = {"per_layer_projection_norm": "whole"}
TOKEN_INPUTS = ("per_layer_input",)
