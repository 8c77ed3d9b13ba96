"""Diffusion Gemma: the text model is Gemma 4's."""

TOKEN_INPUTS = ("per_layer_input",)
