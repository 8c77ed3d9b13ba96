"""Llama 4's vision tower: its encoder is given the patches of images."""

BASE = "model"
STYLES = {"layers.*.mlp.fc1": "colwise", "layers.*.mlp.fc2": "rowwise"}
