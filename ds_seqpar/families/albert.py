"""ALBERT: groups of layers that run several times; attention adds its input and norms the sum itself."""

STYLES = {
    "encoder.albert_layer_groups.*.albert_layers.*.attention.query": "colwise",
    "encoder.albert_layer_groups.*.albert_layers.*.attention.key": "colwise",
    "encoder.albert_layer_groups.*.albert_layers.*.attention.value": "colwise",
    "encoder.albert_layer_groups.*.albert_layers.*.attention.dense": "rowwise",
    "encoder.albert_layer_groups.*.albert_layers.*.attention.LayerNorm": "tokenwise",
    "encoder.albert_layer_groups.*.albert_layers.*.ffn": "colwise",
    "encoder.albert_layer_groups.*.albert_layers.*.ffn_output": "rowwise",
    "pooler": "whole",
}
OPTIONAL = ("pooler",)
ROLES = {
    "encoder.albert_layer_groups.*.albert_layers.*.attention.query": ("q",),
    "encoder.albert_layer_groups.*.albert_layers.*.attention.key": ("kv",),
    "encoder.albert_layer_groups.*.albert_layers.*.attention.value": ("kv",),
    "encoder.albert_layer_groups.*.albert_layers.*.attention.dense": ("q",),
}
BLOCKS = (
    "encoder.albert_layer_groups.*.albert_layers.*.attention",
    "encoder.albert_layer_groups.*.albert_layers.*.full_layer_layer_norm",
    "encoder.albert_layer_groups.*.albert_layers.*.ffn",
    "encoder.albert_layer_groups.*.albert_layers.*.ffn_output",
)
