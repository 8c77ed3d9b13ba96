"""ESM: BERT with its norms in front; the head of contacts reads attention weights."""

LIKE = "bert"
BLOCKS = ("encoder.layer.*.attention.self", "encoder.layer.*.attention.LayerNorm", "encoder.layer.*.attention.output")
