"""Higgs Audio."""

REFUSED = "its layers pick audio tokens out of a batch by a mask over whole sequences"
