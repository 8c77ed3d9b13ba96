"""EmbeddingGemma 2: every layer is given its part of the per-layer embeddings, and mixes it in token by token."""

STYLES = {"ple.per_layer_projection_norm": "whole", "layers.*.ple_block": "tokenwise"}
TOKEN_INPUTS = ("per_layer_input",)
