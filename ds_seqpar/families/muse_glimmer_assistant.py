"""Muse Glimmer's assistant."""

REFUSED = "it is given noise and the context's hidden states instead of tokens"
