"""XLM-RoBERTa-XL: BERT with its norms in front."""

LIKE = "bert"
BLOCKS = (
    "encoder.layer.*.attention.self",
    "encoder.layer.*.attention.self_attn_layer_norm",
    "encoder.layer.*.attention.output",
)
