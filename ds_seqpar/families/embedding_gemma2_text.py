"""EmbeddingGemma 2: every layer is given its part of the per-layer embeddings."""

STYLES = {"ple.per_layer_projection_norm": "whole"}
TOKEN_INPUTS = ("per_layer_input",)
