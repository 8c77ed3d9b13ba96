"""RoBERTa with its norms in front."""

LIKE = "bert"
BLOCKS = (
    "encoder.layer.*.attention.self",
    "encoder.layer.*.attention.LayerNorm",
    "encoder.layer.*.attention.output",
    "encoder.layer.*.intermediate.LayerNorm",
    "encoder.layer.*.intermediate.dense",
)
