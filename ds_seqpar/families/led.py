"""LED: its encoder pads its tokens to whole windows, and its attention is repeated whole."""

STYLES = {
    "layers.*.self_attn.longformer_self_attn.query": "whole",
    "layers.*.self_attn.q_proj": "colwise",
    "layers.*.self_attn.k_proj": "colwise",
    "layers.*.self_attn.v_proj": "colwise",
    "layers.*.self_attn.out_proj": "rowwise",
    "layers.*.encoder_attn.q_proj": "colwise",
    "layers.*.encoder_attn.k_proj": "colwise",
    "layers.*.encoder_attn.v_proj": "colwise",
    "layers.*.encoder_attn.out_proj": "rowwise",
    "layers.*.fc1": "colwise",
    "layers.*.fc2": "rowwise",
}
STACKS = ("encoder", "decoder")
STATES = ("encoder_hidden_states",)
PADS = True
