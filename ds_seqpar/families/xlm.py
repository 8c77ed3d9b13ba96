"""XLM: its layers are lists of attentions, MLPs and norms."""

STYLES = {
    "attentions.*.q_lin": "colwise",
    "attentions.*.k_lin": "colwise",
    "attentions.*.v_lin": "colwise",
    "attentions.*.out_lin": "rowwise",
    "ffns.*.lin1": "colwise",
    "ffns.*.lin2": "rowwise",
}
ROLES = {
    "attentions.*.q_lin": ("q",),
    "attentions.*.k_lin": ("kv",),
    "attentions.*.v_lin": ("kv",),
    "attentions.*.out_lin": ("q",),
}
BLOCKS = ("attentions.*", "ffns.*")
