"""Zamba2: some layers hold a transformer that they share, with adapters of their own, which is also given the embeddings; the mixers are
repeated whole."""

STYLES = {
    "layers.*.mamba": "whole",
    "layers.*.mamba_decoder.mamba": "whole",
    "layers.*.shared_transformer.self_attn.q_proj": "colwise",
    "layers.*.shared_transformer.self_attn.k_proj": "colwise",
    "layers.*.shared_transformer.self_attn.v_proj": "colwise",
    "layers.*.shared_transformer.self_attn.linear_q_adapter_list.*.0": "replicated_with_grad_allreduce",
    "layers.*.shared_transformer.self_attn.linear_q_adapter_list.*.1": "colwise",
    "layers.*.shared_transformer.self_attn.linear_k_adapter_list.*.0": "replicated_with_grad_allreduce",
    "layers.*.shared_transformer.self_attn.linear_k_adapter_list.*.1": "colwise",
    "layers.*.shared_transformer.self_attn.linear_v_adapter_list.*.0": "replicated_with_grad_allreduce",
    "layers.*.shared_transformer.self_attn.linear_v_adapter_list.*.1": "colwise",
    "layers.*.shared_transformer.self_attn.o_proj": "rowwise",
    "layers.*.shared_transformer.feed_forward.gate_up_proj": "packed_colwise",
    "layers.*.shared_transformer.feed_forward.gate_up_proj_adapter_list.*.0": "replicated_with_grad_allreduce",
    "layers.*.shared_transformer.feed_forward.gate_up_proj_adapter_list.*.1": "packed_colwise",
    "layers.*.shared_transformer.feed_forward.down_proj": "rowwise",
}
OPTIONAL = (
    "layers.*.mamba",
    "layers.*.shared_transformer.self_attn.linear_q_adapter_list.*.0",
    "layers.*.shared_transformer.self_attn.linear_q_adapter_list.*.1",
    "layers.*.shared_transformer.self_attn.linear_k_adapter_list.*.0",
    "layers.*.shared_transformer.self_attn.linear_k_adapter_list.*.1",
    "layers.*.shared_transformer.self_attn.linear_v_adapter_list.*.0",
    "layers.*.shared_transformer.self_attn.linear_v_adapter_list.*.1",
)
ROLES = {
    "layers.*.shared_transformer.self_attn.linear_q_adapter_list.*.1": ("q",),
    "layers.*.shared_transformer.self_attn.linear_k_adapter_list.*.1": ("kv",),
    "layers.*.shared_transformer.self_attn.linear_v_adapter_list.*.1": ("kv",),
    "layers.*.shared_transformer.feed_forward.gate_up_proj_adapter_list.*.1": ("even", "even"),
}
BLOCKS = (
    "layers.*.mamba_decoder.mamba",
    "layers.*.mamba_decoder.input_layernorm",
    "layers.*.shared_transformer.self_attn",
    "layers.*.shared_transformer.feed_forward",
    "layers.*.shared_transformer.input_layernorm",
    "layers.*.shared_transformer.pre_ff_layernorm",
)
TOKEN_INPUTS = ("original_hidden_states",)
