"""Inkling 2 with a loop over its middle layers."""

REFUSED = "its layers attend to the hidden states of earlier layers, which are kept as whole sequences"
