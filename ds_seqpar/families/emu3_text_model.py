"""The language model of Emu3: its plan in transformers cuts the embedding alone."""

LIKE = "qwen3_vl_text"
