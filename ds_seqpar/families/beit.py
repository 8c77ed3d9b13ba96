"""BEiT: layers scale what they add, feature by feature; heads are given biases of relative positions with the mask."""

LIKE = "vit"
LAYER_PARAMETERS = ("lambda_1", "lambda_2")
HEAD_INPUTS = {"layers.*.attention": {"attention_mask": "batch, heads"}}
SETTINGS = {"use_relative_position_bias": (False, "each layer has a table of positions beside its blocks")}
