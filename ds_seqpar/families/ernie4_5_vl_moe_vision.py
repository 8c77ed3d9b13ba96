"""A vision tower."""

REFUSED = (
    "it is a vision tower whose patches are packed in one dimension, [patches, h], where [batch, tokens, h] is cut"
)
