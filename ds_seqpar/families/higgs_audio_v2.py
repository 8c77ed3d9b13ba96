"""Higgs Audio: layers norm audio tokens by weights of their own."""

TOKEN_INPUTS = ("audio_token_mask",)
