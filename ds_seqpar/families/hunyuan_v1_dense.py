"""Hunyuan V1: its plan in transformers cuts the embedding alone."""

LIKE = "qwen3_vl_text"
STYLES = {
    "layers.*.self_attn.query_layernorm": "replicated_with_grad_allreduce",
    "layers.*.self_attn.key_layernorm": "replicated_with_grad_allreduce",
}
