"""Tiny models of every family: two layers, sizes that divide by nothing in sight (vocab 101, MLP 50, 6 heads, 3 kv heads)."""

from __future__ import annotations

import os
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

__all__ = ["FAMILIES", "batches", "device", "tiny"]

FAMILIES = (
    "llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3_text", "phi3", "smollm3", "olmo2", "granite", "gpt_neox",
)  # fmt: skip
"""Dense families that go through every mode; tests/test_parity.py takes one step of every other type."""

_SIZES: dict[str, Any] = dict(
    vocab_size=101, hidden_size=48, intermediate_size=50, num_hidden_layers=2, num_attention_heads=6, num_key_value_heads=3,
    head_dim=8, max_position_embeddings=64, pad_token_id=0, bos_token_id=1, eos_token_id=2,
)  # fmt: skip
_OWN: dict[str, dict[str, Any]] = {
    "llama": dict(tie_word_embeddings=True, attention_bias=True, mlp_bias=True),
    "mistral": dict(tie_word_embeddings=False, sliding_window=5),
    "gemma2": dict(query_pre_attn_scalar=8, sliding_window=5, final_logit_softcapping=3.0, attn_logit_softcapping=5.0),
    "gemma3_text": dict(query_pre_attn_scalar=8, sliding_window=5, layer_types=["sliding_attention", "full_attention"]),
    "smollm3": dict(no_rope_layers=[1, 0]),
    "granite": dict(
        embedding_multiplier=3.0,
        logits_scaling=2.0,
        residual_multiplier=0.5,
        attention_multiplier=0.3,
        attention_bias=True,
    ),
    "gpt_neox": dict(num_key_value_heads=None, head_dim=None, hidden_dropout=0.0, attention_dropout=0.0),
}


def device() -> torch.device:
    """Where a rank's models and batches live."""
    on_gpu = os.environ.get("DS_SEQPAR_TEST_DEVICE") == "cuda"
    return torch.device("cuda", torch.cuda.current_device()) if on_gpu else torch.device("cpu")


def tiny(family: str, *, seed: int = 0, dtype: torch.dtype = torch.float32, **own: Any) -> PreTrainedModel:
    """A randomly initialised model; the same `seed` gives the same weights, biases and norm weights included."""
    if family not in FAMILIES:
        from model_types import tiny_of

        return tiny_of(family, **{"dtype": dtype, **own})
    sizes = {**_SIZES, **_OWN.get(family, {}), **own}
    config = AutoConfig.for_model(family, **{k: v for k, v in sizes.items() if v is not None})
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:  # biases start at 0 and norms at 1: give a wrong sum something to show
                parameter.add_(torch.randn_like(parameter) * 0.1)
            else:
                parameter.add_(torch.randn_like(parameter) * 0.05)
    return model.to(device(), dtype)


def batches(count: int, rows: int, seq: int = 7, *, vocab: int = 101, seed: int = 1) -> list[dict[str, torch.Tensor]]:
    """`count` padded batches of [rows, seq]: the last row padded on the right, some labels ignored."""
    generator = torch.Generator().manual_seed(seed)
    result = []
    for _ in range(count):
        ids = torch.randint(3, vocab, (rows, seq), generator=generator)
        mask = torch.ones_like(ids)
        if rows > 1:
            mask[-1, seq - 2 :] = 0
        labels = ids.masked_fill(mask == 0, -100)
        labels[0, :2] = -100
        batch = {"input_ids": ids, "attention_mask": mask, "labels": labels}
        result.append({name: x.to(device()) for name, x in batch.items()})
    return result
