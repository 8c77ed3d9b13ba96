"""Longformer: it pads its tokens to whole windows; attention reads masks of all heads, and is repeated whole."""

LIKE = "nystromformer"
STYLES = {"pooler.dense": "whole"}
OPTIONAL = ("pooler.dense",)
PADS = True
