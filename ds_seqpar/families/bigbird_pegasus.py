"""BigBird-Pegasus: BART's decoder, BERT's attention in its encoder."""

STYLES = {
    "layers.*.self_attn.self.query": "colwise",
    "layers.*.self_attn.self.key": "colwise",
    "layers.*.self_attn.self.value": "colwise",
    "layers.*.self_attn.output": "rowwise",
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
OPTIONAL = (
    "layers.*.self_attn.self.query",
    "layers.*.self_attn.self.key",
    "layers.*.self_attn.self.value",
    "layers.*.self_attn.output",
)
ROLES = {
    "layers.*.self_attn.self.query": ("q",),
    "layers.*.self_attn.self.key": ("kv",),
    "layers.*.self_attn.self.value": ("kv",),
    "layers.*.self_attn.output": ("q",),
}
BLOCKS = ("layers.*.self_attn.self", "layers.*.self_attn.output")
ATTRIBUTES = {"layers.*.self_attn.self": {"all_head_size": "local_width"}}
STACKS = ("encoder", "decoder")
STATES = ("encoder_hidden_states",)
SETTINGS = {"attention_type": ("original_full", "attention to random blocks draws them anew in every forward, and is chosen by the length")}
