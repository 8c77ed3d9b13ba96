"""A vision tower."""

REFUSED = "it is a vision tower: its tokens are patches of images, not of a sequence that is cut"
