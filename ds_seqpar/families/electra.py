"""ELECTRA: embeddings may be narrower than the layers; it has no pooler."""

LIKE = "bert"
