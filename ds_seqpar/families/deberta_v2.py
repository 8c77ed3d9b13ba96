"""DeBERTa v2 and v3: every layer's heads are given the embeddings of relative positions, whole."""

STYLES = {
    "encoder.layer.*.attention.self.query_proj": "colwise",
    "encoder.layer.*.attention.self.key_proj": "colwise",
    "encoder.layer.*.attention.self.value_proj": "colwise",
    "encoder.layer.*.attention.self.pos_key_proj": "colwise",
    "encoder.layer.*.attention.self.pos_query_proj": "colwise",
    "encoder.layer.*.attention.output.dense": "rowwise",
    "encoder.layer.*.intermediate.dense": "colwise",
    "encoder.layer.*.output.dense": "rowwise",
}
OPTIONAL = ("encoder.layer.*.attention.self.pos_key_proj", "encoder.layer.*.attention.self.pos_query_proj")
ROLES = {
    "encoder.layer.*.attention.self.*": ("q",),
    "encoder.layer.*.attention.output.dense": ("q",),
}
BLOCKS = ("encoder.layer.*.attention.self", "encoder.layer.*.attention.output")
HEAD_INPUTS = {"encoder.layer.*.attention.self": {"rel_embeddings": "all"}}
SETTINGS = {"legacy": (True, "its newer head multiplies with the embedding's weight itself, which is cut by vocabulary")}
