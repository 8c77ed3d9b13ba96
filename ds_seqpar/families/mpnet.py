"""MPNet: BERT whose heads are given biases of relative positions."""

STYLES = {
    "encoder.layer.*.attention.attn.q": "colwise",
    "encoder.layer.*.attention.attn.k": "colwise",
    "encoder.layer.*.attention.attn.v": "colwise",
    "encoder.layer.*.attention.attn.o": "rowwise",
    "encoder.layer.*.intermediate.dense": "colwise",
    "encoder.layer.*.output.dense": "rowwise",
    "pooler.dense": "whole",
}
OPTIONAL = ("pooler.dense",)
ROLES = {
    "encoder.layer.*.attention.attn.q": ("q",),
    "encoder.layer.*.attention.attn.k": ("kv",),
    "encoder.layer.*.attention.attn.v": ("kv",),
    "encoder.layer.*.attention.attn.o": ("q",),
}
BLOCKS = ("encoder.layer.*.attention.attn", "encoder.layer.*.attention.LayerNorm")
ATTRIBUTES = {"encoder.layer.*.attention.attn": {"all_head_size": "local_width"}}
HEAD_INPUTS = {"encoder.layer.*.attention.attn": {"position_bias": "batch, heads"}}
