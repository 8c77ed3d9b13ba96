"""Phi-4 multimodal."""

REFUSED = "its vision and audio towers stand inside the module that holds the layers, where they are not told from what is made of tokens"
