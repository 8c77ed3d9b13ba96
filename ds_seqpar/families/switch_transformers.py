"""Switch Transformers: T5 with mixtures of experts, which drop tokens beyond their capacity and are repeated whole."""

LIKE = "t5"
STYLES = {
    "block.*.layer.*.mlp.wi": "colwise",
    "block.*.layer.*.mlp.wi_0": "colwise",
    "block.*.layer.*.mlp.wi_1": "colwise",
    "block.*.layer.*.mlp.wo": "rowwise",
    "block.*.layer.*.mlp.router.classifier": "whole",
}
OPTIONAL = (
    "block.*.layer.*.DenseReluDense.wi",
    "block.*.layer.*.DenseReluDense.wi_0",
    "block.*.layer.*.DenseReluDense.wi_1",
    "block.*.layer.*.DenseReluDense.wo",
    "block.*.layer.*.mlp.wi",
    "block.*.layer.*.mlp.wi_0",
    "block.*.layer.*.mlp.wi_1",
    "block.*.layer.*.mlp.wo",
    "block.*.layer.*.mlp.router.classifier",
)
BLOCKS = (
    "block.*.layer.*.SelfAttention",
    "block.*.layer.*.EncDecAttention",
    "block.*.layer.*.mlp",
    "block.*.layer.*.layer_norm",
)
