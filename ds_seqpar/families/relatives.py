"""Model types that are another one in all that a data file says: they share its file."""

from __future__ import annotations

from collections.abc import Mapping

__all__ = ["RELATIVES"]

_SHARING: Mapping[str, tuple[str, ...]] = {
    "bart": ("blenderbot", "blenderbot-small", "m2m_100", "marian", "mbart", "pegasus", "plbart", "whisper"),
    "bert": (
        "bert-generation", "camembert", "data2vec-text", "ernie", "layoutlm", "markuplm", "roberta", "roc_bert", "xlm-roberta",
    ),
    "dinov2": ("dinov2_with_registers",),
    "rembert": ("roformer", "tapas"),
    "gpt2": ("gpt-sw3",),
    "clip_vision_model": ("clip_text_model", "siglip_text_model", "siglip_vision_model"),
    "nystromformer": ("convbert", "yoso"),
    "mamba": ("falcon_mamba", "mamba2"),
    "qwen3_vl_text": ("nomic_bert", "stablelm"),
    "xlm": ("flaubert",),
    "xglm": ("biogpt",),
    "t5": ("mt5", "umt5"),
    "vit": ("audio-spectrogram-transformer", "deit", "ijepa", "vit_mae", "vit_msn"),
}  # fmt: skip

RELATIVES: Mapping[str, str] = {name: of for of, names in _SHARING.items() for name in names}
"""Model type -> the type whose file it shares."""
