"""The language model of Hunyuan V4 VL."""

LIKE = "hy_v4"
