"""Voxtral Realtime's decoder."""

REFUSED = "it is driven by an audio encoder's states, which its layers take beside the hidden states"
