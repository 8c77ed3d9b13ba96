"""Falcon-H1: its plan in transformers cuts the embedding alone; the state-space mixer beside each attention is repeated whole."""

LIKE = "bamba"
