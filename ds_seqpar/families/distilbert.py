"""DistilBERT."""

STYLES = {
    "transformer.layer.*.attention.q_lin": "colwise",
    "transformer.layer.*.attention.k_lin": "colwise",
    "transformer.layer.*.attention.v_lin": "colwise",
    "transformer.layer.*.attention.out_lin": "rowwise",
    "transformer.layer.*.ffn.lin1": "colwise",
    "transformer.layer.*.ffn.lin2": "rowwise",
}
ROLES = {
    "transformer.layer.*.attention.q_lin": ("q",),
    "transformer.layer.*.attention.k_lin": ("kv",),
    "transformer.layer.*.attention.v_lin": ("kv",),
    "transformer.layer.*.attention.out_lin": ("q",),
}
