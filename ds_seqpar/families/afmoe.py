"""AFMoE: the block of experts owns the bias that its choice is corrected by."""

STYLES = {"layers.*.mlp": "replicated_with_grad_allreduce"}
