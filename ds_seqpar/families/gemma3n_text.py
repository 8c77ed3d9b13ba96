"""Gemma 3n."""

REFUSED = "its hidden states carry several predictions of every token in front of the batch, where tokens are not found by position"
