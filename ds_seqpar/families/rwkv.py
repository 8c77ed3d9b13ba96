"""RWKV: both blocks of a layer mix each token with the one before, and gate their output feature by feature, so both are repeated whole."""

STYLES = {"blocks.*.attention": "whole", "blocks.*.feed_forward": "whole"}
