"""What is replaced by a fused path is what was measured to be that thing, and nothing outside a sharded block changes."""

from __future__ import annotations

import types

import pytest
import torch
from models import device as device_of_tests
from ranks import run_ranks
from torch import nn
from torch.backends import cuda
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers.models.gemma2.modeling_gemma2 import Gemma2RMSNorm
from transformers.models.gptj import modeling_gptj
from transformers.models.llama import modeling_llama
from transformers.models.llama.modeling_llama import LlamaRMSNorm

import ds_seqpar
from ds_seqpar.kernels.addition import PassedGradient
from ds_seqpar.layers import attention, products, rotary
from ds_seqpar.layers.early import EarlyGatherings, RowsMark
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


WITHOUT_BIAS = dict(attention_bias=False, mlp_bias=False)  # a bias is added before the sum


def _handed_on(family: str) -> tuple[int, int, int]:
    """Sums that handed a gradient on and nodes that took one, over a step; layers."""
    from sharding import full_gradients, twins

    taken, handed = [], []
    take, put = PassedGradient.take, PassedGradient.put

    def counting_take(self):
        found = take(self)
        taken.append(found is not None)
        return found

    PassedGradient.take = counting_take  # in this process, which is forked for the case
    PassedGradient.put = lambda self, gradient: (handed.append(1), put(self, gradient))
    model, _ = twins(family, dtype=torch.float32, **WITHOUT_BIAS if family == "llama" else {})
    ids = torch.arange(8, device=device_of_tests()).view(1, 8)
    model(input_ids=ids, labels=ids).loss.backward()
    assert full_gradients(model)
    return sum(handed), sum(taken), model.config.num_hidden_layers


@pytest.mark.parametrize(("family", "a_layer"), [
    ("llama", 2), ("qwen3", 2),
    ("olmo2", 0),  # its norms stand behind the blocks
    ("gemma2", 0),  # another norm stands between a block and the sum
    ("gpt2", 0),  # layer norms
])  # fmt: skip
def test_gradients_past_a_block_are_added_in_its_own_pass(family, a_layer):
    for handed, taken, layers in run_ranks(2, _handed_on, family):
        assert handed == taken == a_layer * layers


def _odd_backwards() -> list[str]:
    """What goes wrong where a graph is used otherwise than once from end to end."""
    from sharding import full_gradients, relative_error, twins

    wrong = []
    model, reference = twins("llama", dtype=torch.float64, **WITHOUT_BIAS)
    ids = torch.arange(8, device=device_of_tests()).view(1, 8)

    def loss_of(m):
        return m(input_ids=ids, labels=ids).loss

    def compare(what):
        mine = full_gradients(model)
        trained = [(name, p.grad) for name, p in reference.named_parameters() if p.grad is not None]
        assert len(trained) > 5
        wrong.extend(f"{what}: {name}" for name, grad in trained if not relative_error(mine[name], grad) < 1e-6)
        model.zero_grad()
        reference.zero_grad()

    for m in (model, reference):  # twice through one graph, and first for the last layer's weights alone
        loss = loss_of(m)
        torch.autograd.grad(loss, [m.model.layers[-1].mlp.down_proj.weight], retain_graph=True)
        loss.backward(retain_graph=True)
        loss.backward()
    compare("twice")
    for m in (model, reference):  # nothing comes back through the blocks of the first layer
        for block in (m.model.layers[0].mlp, m.model.layers[0].self_attn.o_proj):
            block.requires_grad_(False)
        loss_of(m).backward()
    compare("frozen")
    plain = modeling_llama.LlamaMLP.forward
    modeling_llama.LlamaMLP.forward = lambda self, x: plain(self, x).detach()
    model, reference = twins("llama", dtype=torch.float64, **WITHOUT_BIAS)
    for m in (model, reference):
        loss_of(m).backward()
    compare("detached")
    return wrong


def test_a_gradient_past_a_block_is_never_lost():
    for wrong in run_ranks(2, _odd_backwards):
        assert wrong == []


def _gathered_early(family: str, own: dict[str, bool], adapted: list[str] | None = None) -> tuple[int, int, int]:
    """Gathers that the node which made the gradient started, and those of them that a linear took, over a step; layers.

    With LoRA on the linears `adapted`, if given.
    """
    from models import tiny
    from sharding import fresh_groups

    started, taken = [], []
    start, take = EarlyGatherings.start, EarlyGatherings.take

    def counting_take(self, mark, dy):
        found = take(self, mark, dy)
        taken.append(found is not None)
        return found

    EarlyGatherings.start = lambda self, *args: (started.append(1), start(self, *args))[1]
    EarlyGatherings.take = counting_take
    fresh_groups()
    model = tiny(family, **own)
    if adapted is not None:
        from peft import LoraConfig, inject_adapter_in_model

        inject_adapter_in_model(LoraConfig(r=2, target_modules=adapted), model)
    ds_seqpar.shard(model, {"tp_size": 2})
    ids = torch.arange(8, device=device_of_tests()).view(1, 8)
    model.train()(input_ids=ids, labels=ids).loss.backward()
    return len(started), sum(taken), model.config.num_hidden_layers


@pytest.mark.parametrize(("family", "own", "fused"), [
    ("llama", WITHOUT_BIAS, True),
    ("qwen3", {}, True),
    ("llama", dict(attention_bias=True, mlp_bias=False), False),  # autograd adds the gradient past the attention
    ("olmo2", {}, False),
    ("gpt2", {}, False),
])  # fmt: skip
def test_gradients_of_rows_are_gathered_where_they_are_made(family, own, fused):
    for started, taken, layers in run_ranks(2, _gathered_early, family, own):
        # All but the last, which the model's last norm takes.
        assert started == taken == (2 * layers - 1 if fused else 0)


@pytest.mark.parametrize(("adapted", "expected"), [
    (["q_proj", "v_proj"], 2),
    (["o_proj"], 0),  # autograd adds what goes past an adapter's block
    (["q_proj", "o_proj", "gate_proj", "down_proj"], 0),
])  # fmt: skip
def test_with_adapters_nothing_is_gathered_in_vain(adapted, expected):
    for started, taken, _ in run_ranks(2, _gathered_early, "llama", WITHOUT_BIAS, adapted):
        assert started == taken == expected


class _Transport:
    """Notes what is gathered and let go."""

    def __init__(self):
        self.log = []

    def gather_made(self, like, make, tokens):
        memory = torch.zeros_like(like)
        make(memory)
        self.log.append(memory)
        return types.SimpleNamespace(release=lambda: self.log.append("released"), whole=lambda: memory, memory=memory)


def test_only_the_gradient_that_was_made_is_taken_for_gathered():
    gatherings, transport = EarlyGatherings(), _Transport()

    def started(mark):
        def make(memory):
            memory.fill_(3.0)
            return torch.full((1, 4, 2), 3.0)

        transport.log.clear()
        return gatherings.start(mark, transport, torch.zeros(4, 2), 8, make)

    mark = RowsMark()
    dy = started(mark)
    assert gatherings.take(None, dy) is gatherings.take(RowsMark(), dy) is None
    assert bool((gatherings.take(mark, dy.view(4, 2)).memory == 3.0).all()) and gatherings.take(mark, dy) is None
    assert "released" not in transport.log
    for changed in (lambda dy: dy.clone(), lambda dy: dy.mul_(2.0), lambda dy: dy[:, :2]):
        dy = started(mark)
        assert gatherings.take(mark, changed(dy)) is None and transport.log[-1] == "released"
    started(mark)
    gatherings.let_go()
    gatherings.let_go()
    assert transport.log.count("released") == 1
    started(mark)
    log = list(transport.log)
    started(RowsMark())  # of a pass that ended before it was asked for
    assert transport.log[0] == "released" and log[-1] != "released"


def _hooked(doubling: bool) -> tuple[int, float]:
    """Gathers started early where a hook doubles every layer's gradient, or one rank's only looks; how far gradients are off."""
    from sharding import full_gradients, relative_error, twins

    started = []
    start = EarlyGatherings.start
    EarlyGatherings.start = lambda self, *args: (started.append(1), start(self, *args))[1]
    model, reference = twins("llama", dtype=torch.float64, **WITHOUT_BIAS)
    ids = torch.arange(8, device=device_of_tests()).view(1, 8)
    for m in (model, reference):
        if doubling:
            for layer in m.model.layers:
                layer.register_forward_hook(lambda module, args, out: out.register_hook(lambda g: 2 * g) and None)
        elif torch.distributed.get_rank() == 0:
            m.model.layers[1].mlp.register_forward_hook(lambda module, args, out: None)
        m(input_ids=ids, labels=ids).loss.backward()
    mine = full_gradients(model)
    off = max(relative_error(mine[name], p.grad) for name, p in reference.named_parameters())
    return len(started), float(off)


@pytest.mark.parametrize("doubling", [True, False])
def test_where_a_rank_has_hooks_all_gather_late(doubling):
    for started, off in run_ranks(2, _hooked, doubling):
        assert off < 1e-6
        assert started == 0


def _room() -> int:
    """How often a backward pass joins gradients by a copy."""
    from sharding import twins

    model, _ = twins("llama", dtype=torch.float32, **WITHOUT_BIAS)
    ids = torch.arange(8, device=device_of_tests()).view(1, 8)
    loss = model(input_ids=ids, labels=ids).loss
    joins: list[int] = []
    cat = products.torch.cat
    products.torch = types.SimpleNamespace(**{**vars(torch), "cat": lambda *a, **k: (joins.append(1), cat(*a, **k))[1]})
    loss.backward()
    products.torch = torch
    assert model.model.layers[0].self_attn.v_proj.weight.grad.abs().sum() > 0
    return len(joins)


def test_gradients_of_queries_keys_and_values_lie_side_by_side():
    for joins in run_ranks(2, _room):
        assert joins == 0


def _remarks() -> list[str]:
    from sharding import twins

    model, _ = twins("gemma2", dtype=torch.float32)
    model(input_ids=torch.arange(8, device=device_of_tests()).view(1, 8))
    return model.seqpar_report.remarks


@pytest.mark.parametrize("rank", [0, 1])
def test_the_report_says_what_is_fused_and_what_is_not(rank):
    remarks = run_ranks(2, _remarks)[rank]
    assert any(r.startswith("fused: ") and "rotary embeddings" in r and "gelu_tanh" in r for r in remarks), remarks
    assert any("run their own code" in r and "Gemma2RMSNorm" in r for r in remarks), remarks
    assert any("token rows travel by" in r for r in remarks), remarks
