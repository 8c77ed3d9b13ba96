"""The language model of Hunyuan VL."""

LIKE = "hunyuan_v1_dense"
