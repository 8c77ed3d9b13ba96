"""A talker of Qwen3-Omni."""

REFUSED = "it is driven by the hidden states of another model through several embeddings, not by token ids"
