"""XGLM: OPT's layers, without a decoder around them."""

LIKE = "opt"
BASE = ""
