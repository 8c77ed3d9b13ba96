"""DeBERTa: q, k, v are interleaved head by head, with biases apart; heads are given the embeddings of relative positions, whole."""

STYLES = {
    "encoder.layer.*.attention.self": "local_params",
    "encoder.layer.*.attention.self.q_bias": "colwise",
    "encoder.layer.*.attention.self.v_bias": "colwise",
    "encoder.layer.*.attention.self.in_proj": "colwise",
    "encoder.layer.*.attention.self.pos_proj": "colwise",
    "encoder.layer.*.attention.self.pos_q_proj": "colwise",
    "encoder.layer.*.attention.output.dense": "rowwise",
    "encoder.layer.*.intermediate.dense": "colwise",
    "encoder.layer.*.output.dense": "rowwise",
}
OPTIONAL = ("encoder.layer.*.attention.self.pos_proj", "encoder.layer.*.attention.self.pos_q_proj")
ROLES = {
    "encoder.layer.*.attention.self.in_proj": ("qkv",),
    "encoder.layer.*.attention.self.*": ("q",),
    "encoder.layer.*.attention.output.dense": ("q",),
}
BLOCKS = ("encoder.layer.*.attention.self", "encoder.layer.*.attention.output")
HEAD_INPUTS = {"encoder.layer.*.attention.self": {"rel_embeddings": "all"}}
SETTINGS = {
    "legacy": (True, "its newer head multiplies with the embedding's weight itself, which is cut by vocabulary"),
    "talking_head": (False, "its heads are mixed with each other"),
}
