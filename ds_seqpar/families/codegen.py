"""CodeGen: q, v, k are packed in four groups whose number its code writes out, so attention is repeated whole."""

STYLES = {
    "h.*.attn": "whole",
    "h.*.mlp.fc_in": "colwise",
    "h.*.mlp.fc_out": "rowwise",
}
