"""LFM2: its plan in transformers cuts the embedding alone; its convolutions are repeated whole."""

LIKE = "lfm2_moe"
STYLES = {
    "layers.*.feed_forward.w1": "colwise",
    "layers.*.feed_forward.w3": "colwise",
    "layers.*.feed_forward.w2": "rowwise",
}
