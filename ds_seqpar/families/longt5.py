"""LongT5: its encoder attends within windows, or to sums of others, too; that is repeated whole."""

LIKE = "t5"
STYLES = {
    "block.*.layer.*.LocalSelfAttention.q": "colwise",
    "block.*.layer.*.LocalSelfAttention.k": "colwise",
    "block.*.layer.*.LocalSelfAttention.v": "colwise",
    "block.*.layer.*.LocalSelfAttention.o": "rowwise",
    "block.*.layer.*.LocalSelfAttention.relative_attention_bias": "embedding_colwise",
    "block.*.layer.*.TransientGlobalSelfAttention": "whole",
}
OPTIONAL = (
    "block.*.layer.*.DenseReluDense.wi",
    "block.*.layer.*.DenseReluDense.wi_0",
    "block.*.layer.*.DenseReluDense.wi_1",
    "block.*.layer.*.LocalSelfAttention.q",
    "block.*.layer.*.LocalSelfAttention.k",
    "block.*.layer.*.LocalSelfAttention.v",
    "block.*.layer.*.LocalSelfAttention.o",
    "block.*.layer.*.LocalSelfAttention.relative_attention_bias",
    "block.*.layer.*.TransientGlobalSelfAttention",
)
BLOCKS = (
    "block.*.layer.*.SelfAttention",
    "block.*.layer.*.LocalSelfAttention",
    "block.*.layer.*.TransientGlobalSelfAttention",
    "block.*.layer.*.EncDecAttention",
    "block.*.layer.*.DenseReluDense",
    "block.*.layer.*.layer_norm",
)
ATTRIBUTES = {"block.*.layer.*.LocalSelfAttention": {"inner_dim": "local_width"}}
