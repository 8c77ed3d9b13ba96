"""T5Gemma 2's decoder."""

REFUSED = "its attention reads an encoder's states beside its own tokens"
