"""Gemma 3n: every layer is given its part of the per-layer embeddings."""

TOKEN_INPUTS = ("per_layer_input",)
