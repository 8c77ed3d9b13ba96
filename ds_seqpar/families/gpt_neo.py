"""GPT-Neo: attention stands one level deeper."""

STYLES = {
    "h.*.attn.attention.q_proj": "colwise",
    "h.*.attn.attention.k_proj": "colwise",
    "h.*.attn.attention.v_proj": "colwise",
    "h.*.attn.attention.out_proj": "rowwise",
    "h.*.mlp.c_fc": "colwise",
    "h.*.mlp.c_proj": "rowwise",
}
