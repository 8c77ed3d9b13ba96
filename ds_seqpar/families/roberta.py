"""RoBERTa."""

LIKE = "bert"
