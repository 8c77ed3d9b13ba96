"""MVP: BART whose attentions keep the width of all heads."""

LIKE = "bart"
ATTRIBUTES = {
    "layers.*.self_attn": {"embed_dim": "local_width"},
    "layers.*.encoder_attn": {"embed_dim": "local_width"},
}
SETTINGS = {"use_prompt": (False, "prompts stand in front of the tokens as keys and values of all heads")}
