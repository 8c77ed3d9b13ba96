"""BitNet: what goes into the row-parallel linears is normed over all heads, and over all features."""

LIKE = "qwen3_vl_text"
STYLES = {
    "layers.*.self_attn.attn_sub_norm": "norm_over_cut_dim",
    "layers.*.mlp.ffn_sub_norm": "norm_over_cut_dim",
}
ROLES = {"layers.*.self_attn.attn_sub_norm": ("q",)}
