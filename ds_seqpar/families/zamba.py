"""Zamba: some layers hold a transformer that they share, which is also given the embeddings; the mixers are repeated whole."""

STYLES = {
    "layers.*.mamba": "whole",
    "layers.*.mamba_decoder.mamba": "whole",
    "layers.*.shared_transf.self_attn.q_proj": "colwise",
    "layers.*.shared_transf.self_attn.k_proj": "colwise",
    "layers.*.shared_transf.self_attn.v_proj": "colwise",
    "layers.*.shared_transf.self_attn.o_proj": "rowwise",
    "layers.*.shared_transf.feed_forward.gate_proj": "colwise",
    "layers.*.shared_transf.feed_forward.up_proj": "colwise",
    "layers.*.shared_transf.feed_forward.down_proj": "rowwise",
}
OPTIONAL = ("layers.*.mamba",)
BLOCKS = (
    "layers.*.mamba_decoder.mamba",
    "layers.*.mamba_decoder.input_layernorm",
    "layers.*.shared_transf.self_attn",
    "layers.*.shared_transf.feed_forward",
    "layers.*.shared_transf.input_layernorm",
    "layers.*.shared_transf.pre_ff_layernorm",
)
TOKEN_INPUTS = ("original_hidden_states",)
