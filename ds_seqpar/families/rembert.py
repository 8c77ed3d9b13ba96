"""RemBERT: BERT whose attention keeps the width of all heads."""

LIKE = "bert"
ATTRIBUTES = {"encoder.layer.*.attention.self": {"all_head_size": "local_width"}}
