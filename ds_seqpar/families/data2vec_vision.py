"""Data2Vec's vision transformer: layers scale what they add, feature by feature."""

STYLES = {
    "encoder.layer.*.attention.attention.query": "colwise",
    "encoder.layer.*.attention.attention.key": "colwise",
    "encoder.layer.*.attention.attention.value": "colwise",
    "encoder.layer.*.attention.output.dense": "rowwise",
    "encoder.layer.*.intermediate.dense": "colwise",
    "encoder.layer.*.output.dense": "rowwise",
}
ROLES = {
    "encoder.layer.*.attention.attention.query": ("q",),
    "encoder.layer.*.attention.attention.key": ("kv",),
    "encoder.layer.*.attention.attention.value": ("kv",),
    "encoder.layer.*.attention.output.dense": ("q",),
}
ATTRIBUTES = {"encoder.layer.*.attention.attention": {"all_head_size": "local_width"}}
BLOCKS = ("encoder.layer.*.attention.attention", "encoder.layer.*.attention.output")
LAYER_PARAMETERS = ("lambda_1", "lambda_2")
SETTINGS = {"use_relative_position_bias": (False, "each layer has a table of positions beside its blocks")}
