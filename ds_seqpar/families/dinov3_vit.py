"""DINOv3: a vision transformer with rotary positions, whose blocks' outputs are scaled, feature by feature."""

STYLES = {
    "model.layer.*.attention.q_proj": "colwise",
    "model.layer.*.attention.k_proj": "colwise",
    "model.layer.*.attention.v_proj": "colwise",
    "model.layer.*.attention.o_proj": "rowwise",
    "model.layer.*.mlp.gate_proj": "colwise",
    "model.layer.*.mlp.up_proj": "colwise",
    "model.layer.*.mlp.down_proj": "rowwise",
}
OPTIONAL = ("model.layer.*.mlp.gate_proj",)
