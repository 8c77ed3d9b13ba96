"""SqueezeBERT."""

REFUSED = "its layers hold tokens in the last dimension, [batch, h, tokens], where [batch, tokens, h] is cut"
