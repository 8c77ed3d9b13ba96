"""What is replaced by a fused path is what was measured to be that thing, and nothing outside a sharded block changes."""

from __future__ import annotations

import pytest
import torch
from ranks import run_ranks
from torch import nn
from torch.backends import cuda
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers.models.gemma2.modeling_gemma2 import Gemma2RMSNorm
from transformers.models.gptj import modeling_gptj
from transformers.models.llama import modeling_llama
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from ds_seqpar.layers import attention, rotary
from ds_seqpar.layers.norm import rms_norm_epsilon


class _ForgetsItsWeightRMSNorm(LlamaRMSNorm):
    def forward(self, hidden_states):
        return super().forward(hidden_states) / self.weight


class _OtherEpsilonRMSNorm(LlamaRMSNorm):
    def forward(self, hidden_states):
        variance = hidden_states.pow(2).mean(-1, keepdim=True)
        return self.weight * hidden_states * torch.rsqrt(variance + 10 * self.variance_epsilon)


def test_only_what_is_an_rms_norm_is_taken_for_one():
    assert rms_norm_epsilon(LlamaRMSNorm(8, eps=3e-5)) == 3e-5
    assert rms_norm_epsilon(nn.RMSNorm(8, eps=1e-3)) == 1e-3
    for other in (
        Gemma2RMSNorm(8),
        nn.LayerNorm(8),
        _ForgetsItsWeightRMSNorm(8),
        _OtherEpsilonRMSNorm(8),
        nn.Identity(),
    ):
        assert rms_norm_epsilon(other) is None, type(other).__name__


def test_rotary_embedding_is_fused_within_sharded_blocks_only(monkeypatch):
    seen = []
    monkeypatch.setattr(rotary, "rotate", lambda cos, sin, *xs: seen.extend(xs) or xs)
    monkeypatch.setattr(rotary, "_is_half_split", lambda function: True)
    monkeypatch.setattr(modeling_llama, "apply_rotary_pos_emb", lambda q, k, cos, sin, unsqueeze_dim=1: ("plain", q))
    assert rotary.fuse_rotary(modeling_llama.__name__)
    assert rotary.fuse_rotary(modeling_llama.__name__)  # once is enough
    q = k = torch.zeros(1, 2, 3, 4)
    cos = sin = torch.zeros(1, 3, 4)
    assert modeling_llama.apply_rotary_pos_emb(q, k, cos, sin)[0] == "plain"
    with rotary.within_sharded_block():
        assert modeling_llama.apply_rotary_pos_emb(q, k, cos, sin) == (q, k) and len(seen) == 2
        for odd in (
            {"unsqueeze_dim": 2},
            {"cos": cos[..., :2]},
            {"cos": cos.double()},
            {"sin": sin.clone().requires_grad_()},
        ):
            arguments = {"cos": cos, "sin": sin, **odd}
            assert modeling_llama.apply_rotary_pos_emb(q, k, **arguments)[0] == "plain", odd
    assert modeling_llama.apply_rotary_pos_emb(q, k, cos, sin)[0] == "plain" and len(seen) == 2


def test_another_rotation_is_left_alone():
    before = modeling_gptj.apply_rotary_pos_emb
    assert not rotary.fuse_rotary(modeling_gptj.__name__)
    assert modeling_gptj.apply_rotary_pos_emb is before
    assert not rotary.fuse_rotary("torch")


def test_attention_prefers_cudnn_among_what_the_user_allows(monkeypatch):
    gpu = torch.device("cuda", 0)
    monkeypatch.setattr(attention, "prefers_cudnn", lambda index: True)
    order = lambda: list(torch._C._get_sdp_priority_order())  # noqa: E731
    before = order()
    with attention.fastest_attention(gpu, 4096):
        assert order()[0] == int(SDPBackend.CUDNN_ATTENTION) and cuda.math_sdp_enabled()
    assert order() == before
    with sdpa_kernel([SDPBackend.MATH]), attention.fastest_attention(gpu, 4096):
        assert cuda.math_sdp_enabled() and not (cuda.cudnn_sdp_enabled() or cuda.flash_sdp_enabled())
    assert order() == before
    for device, tokens in ((torch.device("cpu"), 4096), (gpu, 64)):
        with attention.fastest_attention(device, tokens):
            assert order() == before
    monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: True)
    with attention.fastest_attention(gpu, 4096):
        assert order() == before


def _remarks() -> list[str]:
    from sharding import twins

    model, _ = twins("gemma2", dtype=torch.float32)
    model(input_ids=torch.arange(8).view(1, 8))
    return model.seqpar_report.remarks


@pytest.mark.parametrize("rank", [0, 1])
def test_the_report_says_what_is_fused_and_what_is_not(rank):
    remarks = run_ranks(2, _remarks)[rank]
    assert any(r.startswith("fused: ") and "rotary embeddings" in r and "gelu_tanh" in r for r in remarks), remarks
    assert any("run their own code" in r and "Gemma2RMSNorm" in r for r in remarks), remarks
    assert any("token rows travel by" in r for r in remarks), remarks
