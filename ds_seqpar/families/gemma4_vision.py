"""Gemma 4's vision tower: its encoder is given the patches of images, its linears are wrapped."""

BASE = "encoder"
ROLES = {
    "layers.*.self_attn.q_proj.linear": ("q",),
    "layers.*.self_attn.k_proj.linear": ("kv",),
    "layers.*.self_attn.v_proj.linear": ("kv",),
    "layers.*.self_attn.o_proj.linear": ("q",),
}
