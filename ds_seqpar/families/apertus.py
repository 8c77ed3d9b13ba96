"""Apertus: the activation of the MLP has two numbers that are trained."""

STYLES = {"layers.*.mlp.act_fn": "replicated_with_grad_allreduce"}
OPTIONAL = ("layers.*.mlp.act_fn",)
