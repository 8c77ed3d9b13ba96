"""T5: two stacks; the first layer of each holds the position biases of all, one a head."""

STYLES = {
    "block.*.layer.*.SelfAttention.q": "colwise",
    "block.*.layer.*.SelfAttention.k": "colwise",
    "block.*.layer.*.SelfAttention.v": "colwise",
    "block.*.layer.*.SelfAttention.o": "rowwise",
    "block.*.layer.*.SelfAttention.relative_attention_bias": "embedding_colwise",
    "block.*.layer.*.EncDecAttention.q": "colwise",
    "block.*.layer.*.EncDecAttention.k": "colwise",
    "block.*.layer.*.EncDecAttention.v": "colwise",
    "block.*.layer.*.EncDecAttention.o": "rowwise",
    "block.*.layer.*.DenseReluDense.wi": "colwise",
    "block.*.layer.*.DenseReluDense.wi_0": "colwise",
    "block.*.layer.*.DenseReluDense.wi_1": "colwise",
    "block.*.layer.*.DenseReluDense.wo": "rowwise",
}
OPTIONAL = (
    "block.*.layer.*.EncDecAttention.q",
    "block.*.layer.*.EncDecAttention.k",
    "block.*.layer.*.EncDecAttention.v",
    "block.*.layer.*.EncDecAttention.o",
    "block.*.layer.*.DenseReluDense.wi",
    "block.*.layer.*.DenseReluDense.wi_0",
    "block.*.layer.*.DenseReluDense.wi_1",
)
ROLES = {
    "block.*.layer.*.*.q": ("q",),
    "block.*.layer.*.*.k": ("kv",),
    "block.*.layer.*.*.v": ("kv",),
    "block.*.layer.*.*.o": ("q",),
    "block.*.layer.*.*.relative_attention_bias": ("q",),
}
BLOCKS = (
    "block.*.layer.*.SelfAttention",
    "block.*.layer.*.EncDecAttention",
    "block.*.layer.*.DenseReluDense",
    "block.*.layer.*.layer_norm",
)
STACKS = ("encoder", "decoder")
STATES = ("encoder_hidden_states",)
