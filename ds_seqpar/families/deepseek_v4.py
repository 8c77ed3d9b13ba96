"""DeepSeek-V4: the streams of the residual are mixed token by token."""

STYLES = {"layers.*.attn_hc": "tokenwise", "layers.*.ffn_hc": "tokenwise"}
