"""A plan of the user's that is wrong is noticed before training: by what it leaves unsaid, otherwise by one small batch."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from exactness import fresh_groups
from models import batches, device
from ranks import RankError, run_ranks
from sharding import relative_error
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

import ds_seqpar
from ds_seqpar import PlanError, VerificationError


class _PackedConfig(LlamaConfig):
    model_type = "packed_by_hand"
    base_model_tp_plan = None


class _Packed(nn.Module):
    """Attention with one linear for [q; k; v], whose code takes the number of heads from the width it finds."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.head_dim = config.head_dim
        self.qkv = nn.Linear(config.hidden_size, 3 * config.hidden_size)
        self.out = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(self, hidden_states: torch.Tensor, **_: Any) -> tuple[torch.Tensor, None]:
        """[b, s, h] -> [b, s, h]."""
        heads = (x.unflatten(-1, (-1, self.head_dim)).transpose(1, 2) for x in self.qkv(hidden_states).chunk(3, dim=-1))
        mixed = nn.functional.scaled_dot_product_attention(*heads, is_causal=True)
        return self.out(mixed.transpose(1, 2).flatten(2)), None


class _PackedModel(LlamaForCausalLM):
    config_class = _PackedConfig


def _model() -> Any:
    torch.manual_seed(0)
    sizes = dict(vocab_size=101, hidden_size=48, intermediate_size=50, num_hidden_layers=2, num_attention_heads=6, head_dim=8)
    config = _PackedConfig(**sizes, num_key_value_heads=6, pad_token_id=0, tie_word_embeddings=False)
    model = _PackedModel(config)
    for layer in model.model.layers:
        layer.self_attn = _Packed(config)
    return model.train()


def _plan(qkv: str) -> dict[str, str]:
    layer = "model.layers.*"
    return {
        f"{layer}.self_attn.qkv": qkv, f"{layer}.self_attn.out": "rowwise:q", f"{layer}.mlp.gate_proj": "colwise",
        f"{layer}.mlp.up_proj": "colwise", f"{layer}.mlp.down_proj": "rowwise",
    }  # fmt: skip


def _planned(qkv: str, key: dict[str, Any]) -> float:
    """How far the loss of the sharded model is off."""
    fresh_groups()
    model, reference, batch = _model().to(device()), _model().to(device()), batches(1, 2)[0]
    batch.pop("attention_mask", None)
    ds_seqpar.shard(model, {"tp_size": 2, "plan": _plan(qkv), **key})
    return relative_error(model(**batch).loss.detach(), reference(**batch).loss.detach())


def test_a_right_plan_of_a_packed_linear_is_exact() -> None:
    assert all(error < 1e-6 for error in run_ranks(2, _planned, "packed_colwise:q,kv,kv", {}))


@pytest.mark.parametrize(
    ("qkv", "error", "message"),
    [
        ("packed_colwise", PlanError, r"self_attn\.qkv: 'packed_colwise' .*must say how .*'packed_colwise:q,kv,kv'"),
        ("colwise", VerificationError, r'with the "plan" .*is not the unsharded one.*self_attn.*"verify": false'),
        ("packed_colwise:even,even", VerificationError, r'is not the unsharded one.*"verify": false'),
    ],
)  # fmt: skip
def test_a_wrong_plan_of_a_packed_linear_is_refused(qkv: str, error: type[Exception], message: str) -> None:
    with pytest.raises(RankError) as caught:
        run_ranks(2, _planned, qkv, {})
    for text in caught.value.errors:
        assert re.search(rf"(?s){error.__name__}: .*{message}", text or ""), text


def test_only_who_says_so_trains_a_plan_that_nobody_compared() -> None:
    assert all(error > 1e-3 for error in run_ranks(2, _planned, "colwise", {"verify": False}))
