"""Phi-4 multimodal."""

REFUSED = "it has several parts, and adapters of its own in its layers"
