"""GPT: GPT-2 with its norms behind."""

LIKE = "gpt2"
