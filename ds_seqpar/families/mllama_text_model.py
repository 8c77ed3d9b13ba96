"""Mllama's language model: layers that attend to images own the gates of what they add."""

LIKE = "qwen3_vl_text"
STYLES = {
    "layers.*.cross_attn.q_proj": "colwise",
    "layers.*.cross_attn.k_proj": "colwise",
    "layers.*.cross_attn.v_proj": "colwise",
    "layers.*.cross_attn.o_proj": "rowwise",
}
OPTIONAL = (
    "layers.*.cross_attn.q_proj",
    "layers.*.cross_attn.k_proj",
    "layers.*.cross_attn.v_proj",
    "layers.*.cross_attn.o_proj",
)
LAYER_PARAMETERS = ("cross_attn_attn_gate", "cross_attn_mlp_gate")
TOKEN_INPUTS = ("full_text_row_masked_out_mask",)
HEAD_INPUTS = {"layers.*.cross_attn": {"cross_attention_states": "all"}}
