"""BigBird with full attention."""

LIKE = "rembert"
SETTINGS = {"attention_type": ("original_full", "attention to random blocks draws them anew in every forward, and is chosen by the length")}
