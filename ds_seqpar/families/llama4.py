"""Llama 4 with its vision tower."""

REFUSED = "it has several parts; its text model, llama4_text, can be sharded"
