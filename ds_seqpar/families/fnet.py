"""FNet: every rank repeats the Fourier transforms, which run over all tokens and all features."""

STYLES = {
    "encoder.layer.*.fourier": "whole",
    "encoder.layer.*.intermediate.dense": "colwise",
    "encoder.layer.*.output.dense": "rowwise",
    "pooler.dense": "whole",
}
OPTIONAL = ("pooler.dense",)
