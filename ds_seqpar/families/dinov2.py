"""DINOv2: a vision transformer whose blocks' outputs are scaled, feature by feature; its MLP is plain or gated."""

STYLES = {
    "layer.*.attention.q_proj": "colwise",
    "layer.*.attention.k_proj": "colwise",
    "layer.*.attention.v_proj": "colwise",
    "layer.*.attention.o_proj": "rowwise",
    "layer.*.mlp.fc1": "colwise",
    "layer.*.mlp.fc2": "rowwise",
    "layer.*.mlp.weights_in": "packed_colwise",
    "layer.*.mlp.weights_out": "rowwise",
}
ROLES = {"layer.*.mlp.weights_in": ("even", "even")}
OPTIONAL = (
    "layer.*.mlp.fc1",
    "layer.*.mlp.fc2",
    "layer.*.mlp.weights_in",
    "layer.*.mlp.weights_out",
)
STACKS = ("encoder",)
