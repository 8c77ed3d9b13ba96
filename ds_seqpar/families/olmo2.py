"""OLMo-2: q and k are normalised over all heads at once, so the mean square is summed over the ranks."""

STYLES = {
    "layers.*.self_attn.q_proj": "colwise",
    "layers.*.self_attn.k_proj": "colwise",
    "layers.*.self_attn.v_proj": "colwise",
    "layers.*.self_attn.o_proj": "rowwise",
    "layers.*.self_attn.q_norm": "norm_over_cut_dim",
    "layers.*.self_attn.k_norm": "norm_over_cut_dim",
}
ROLES = {
    "layers.*.self_attn.q_norm": ("q",),
    "layers.*.self_attn.k_norm": ("kv",),
}
NORM_EPS = {
    "layers.*.self_attn.q_norm": "variance_epsilon",
    "layers.*.self_attn.k_norm": "variance_epsilon",
}
