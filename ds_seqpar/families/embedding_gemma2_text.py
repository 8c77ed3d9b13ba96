"""EmbeddingGemma 2."""

REFUSED = "its gradients are not exact yet: layers whose heads differ in size read per-layer inputs"
