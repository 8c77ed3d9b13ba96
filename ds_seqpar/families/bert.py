"""BERT: each layer's attention and MLP are split over two modules, the second of which adds the residual and norms the sum."""

STYLES = {
    "encoder.layer.*.attention.self.query": "colwise",
    "encoder.layer.*.attention.self.key": "colwise",
    "encoder.layer.*.attention.self.value": "colwise",
    "encoder.layer.*.attention.output.dense": "rowwise",
    "encoder.layer.*.intermediate.dense": "colwise",
    "encoder.layer.*.output.dense": "rowwise",
    "pooler.dense": "whole",
}
OPTIONAL = ("pooler.dense",)
ROLES = {
    "encoder.layer.*.attention.self.query": ("q",),
    "encoder.layer.*.attention.self.key": ("kv",),
    "encoder.layer.*.attention.self.value": ("kv",),
    "encoder.layer.*.attention.output.dense": ("q",),
}
BLOCKS = ("encoder.layer.*.attention.self", "encoder.layer.*.attention.output")
