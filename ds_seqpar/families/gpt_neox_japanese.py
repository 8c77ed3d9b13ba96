"""GPT-NeoX Japanese: as GPT-NeoX; the last layer's attention owns a bias that the layer adds."""

STYLES = {
    "layers.*.attention.query_key_value": "colwise",
    "layers.*.attention.dense": "rowwise",
    "layers.*.attention.dense_bias": "tokenwise",
    "layers.*.mlp.dense_h_to_4h": "colwise",
    "layers.*.mlp.dense_4h_to_h": "rowwise",
}
ROLES = {"layers.*.attention.query_key_value": ("qkv",), "layers.*.attention.dense": ("q",)}
