"""Megatron's BERT: with its norms in front."""

LIKE = "rembert"
BLOCKS = ("encoder.layer.*.attention.self", "encoder.layer.*.attention.ln", "encoder.layer.*.attention.output")
