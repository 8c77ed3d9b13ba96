"""Inkling 2."""

REFUSED = "its layers attend to the hidden states of earlier layers, which are kept as whole sequences"
