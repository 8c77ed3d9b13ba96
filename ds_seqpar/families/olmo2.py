"""OLMo-2: q and k are normalised over all heads at once, so the mean square is summed over the ranks."""

STYLES = {
    "layers.*.self_attn.q_norm": "norm_over_cut_dim",
    "layers.*.self_attn.k_norm": "norm_over_cut_dim",
}
