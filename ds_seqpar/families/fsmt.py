"""FSMT."""

REFUSED = "its layers hold [tokens, batch, h], where [batch, tokens, h] is cut"
