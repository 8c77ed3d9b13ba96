"""Nystromformer: its attention starts the inverse of a matrix from the largest sum over all heads, so it is repeated whole."""

STYLES = {
    "encoder.layer.*.attention": "whole",
    "encoder.layer.*.intermediate.dense": "colwise",
    "encoder.layer.*.output.dense": "rowwise",
}
