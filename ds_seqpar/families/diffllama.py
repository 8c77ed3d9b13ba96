"""DiffLlama: its plan in transformers cuts the embedding alone; attention, whose two maps
share the value heads in halves, is repeated whole."""

STYLES = {
    "layers.*.mlp.gate_proj": "colwise",
    "layers.*.mlp.up_proj": "colwise",
    "layers.*.mlp.down_proj": "rowwise",
}
