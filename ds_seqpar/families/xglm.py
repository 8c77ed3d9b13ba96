"""XGLM: OPT's layers, without a decoder around them."""

LIKE = "opt"
BASE = ""
ATTRIBUTES = {"layers.*.self_attn": {"embed_dim": "local_width"}}
