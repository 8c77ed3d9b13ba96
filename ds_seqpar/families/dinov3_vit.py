"""DINOv3: a vision transformer with rotary positions, whose blocks' outputs are scaled, feature by feature."""

STYLES = {
    "layer.*.attention.q_proj": "colwise",
    "layer.*.attention.k_proj": "colwise",
    "layer.*.attention.v_proj": "colwise",
    "layer.*.attention.o_proj": "rowwise",
    "layer.*.mlp.gate_proj": "colwise",
    "layer.*.mlp.up_proj": "colwise",
    "layer.*.mlp.down_proj": "rowwise",
}
OPTIONAL = ("layer.*.mlp.gate_proj",)
BASE = "model"
