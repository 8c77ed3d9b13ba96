"""Attention implementations and kernels that others put into a model: what they are given, and what is turned off or refused."""

from __future__ import annotations

import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch
from exactness import fresh_groups
from models import batches, device, tiny
from ranks import run_ranks
from sharding import same_loss_and_gradients, twins
from transformers import AttentionInterface, TrainingArguments, modeling_flash_attention_utils

import ds_seqpar
from ds_seqpar.layers import tokenwise

sys.path.insert(0, str(Path(__file__).parent))

from same_run import deepspeed_json

HEADS = 6
Shapes = list[tuple[int, ...]]


def _attend(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float) -> torch.Tensor:
    """Causal attention [b, s, heads, d] in plain torch; fewer key and value heads than query heads."""
    key, value = (x.repeat_interleave(query.shape[2] // x.shape[2], 2) for x in (key, value))
    query, key, value = (x.transpose(1, 2) for x in (query, key, value))
    causal = torch.ones(query.shape[2], query.shape[2], dtype=torch.bool, device=query.device).tril()
    weights = (query @ key.transpose(-1, -2) * scale).masked_fill(~causal, -1e30).softmax(-1)
    return (weights @ value).transpose(1, 2).contiguous()


def _of_a_user(seen: Shapes) -> Any:
    def attend(module: Any, query: Any, key: Any, value: Any, attention_mask: Any, scaling: float, **_: Any) -> Any:
        seen.append(tuple(query.shape))
        return _attend(*(x.transpose(1, 2) for x in (query, key, value)), scaling), None

    return attend


def _flash_attention(seen: Shapes) -> tuple[Any, Any]:
    """What the package flash_attn offers, in plain torch: rows of one length, and sequences one after the other."""

    def flash(q: Any, k: Any, v: Any, dropout_p: float = 0.0, softmax_scale: Any = None, causal: bool = False) -> Any:
        assert causal and not dropout_p
        seen.append(tuple(q.shape))
        return _attend(q, k, v, softmax_scale)

    def varlen(
        q: Any, k: Any, v: Any, cu_seqlens_q: Any, cu_seqlens_k: Any, max_seqlen_q: int, max_seqlen_k: int,
        dropout_p: float = 0.0, softmax_scale: Any = None, causal: bool = False,
    ) -> Any:  # fmt: skip
        assert causal and not dropout_p and torch.equal(cu_seqlens_q, cu_seqlens_k)
        seen.append(tuple(q.shape))
        sizes = cu_seqlens_q.diff().tolist()
        parts = zip(*(x.split(sizes) for x in (q, k, v)), strict=True)
        return torch.cat([_attend(*(x.unsqueeze(0) for x in part), softmax_scale)[0] for part in parts])

    return flash, varlen


def _flash_batches() -> dict[str, dict[str, Any]]:
    """Every way in which tokens reach flash attention: rows, padded rows, packed rows by position or by length."""
    padded, whole = batches(1, 2)[0], batches(1, 1, 9)[0]
    del whole["attention_mask"]
    lengths = torch.tensor([0, 4, 9], dtype=torch.int32, device=device())
    positions = {"position_ids": torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3, 4]], device=device())}
    named = {"cu_seq_lens_q": lengths, "cu_seq_lens_k": lengths, "max_length_q": 5, "max_length_k": 5}
    return {
        "padded": padded,
        "rows": whole,
        "packed": {**whole, **positions},
        "lengths": {**whole, **positions, **named},
    }


def _implementations() -> dict[str, Shapes]:
    """Any `attn_implementation` gets whole sequences of this rank's heads; losses and gradients are the unsharded model's."""
    calls: dict[str, Shapes] = {"of_a_user": []}
    AttentionInterface.register("of_a_user", _of_a_user(calls["of_a_user"]))
    ours, theirs = twins()
    for of in (ours, theirs):
        of.set_attn_implementation("of_a_user")
    batch = {name: x for name, x in batches(1, 2)[0].items() if name != "attention_mask"}
    same_loss_and_gradients(ours, theirs, lambda of: of(**batch).loss)
    seen: Shapes = []
    pads = modeling_flash_attention_utils._pad_input, modeling_flash_attention_utils._unpad_input
    modeling_flash_attention_utils._lazy_imports = lambda *_, **__: (*_flash_attention(seen), None, *pads)
    for name, batch in _flash_batches().items():
        ours, theirs = twins(key={"recompute": "full"} if name == "lengths" else {})
        for of in (ours, theirs):  # set_attn_implementation asks for the package, and a GPU
            of.config._attn_implementation = "flash_attention_2"
        seen.clear()
        same_loss_and_gradients(ours, theirs, lambda of, batch=batch: of(**batch).loss, what=name)
        calls[name] = list(seen)
    return calls


def test_an_attention_implementation_sees_whole_sequences_of_its_heads() -> None:
    for calls in run_ranks(2, _implementations, timeout=90):
        for name, seen in calls.items():
            tokens = {"of_a_user": 7, "padded": 2 * 7 - 2}.get(name, 9)
            heads = {shape[1 if name in ("of_a_user", "padded", "packed", "lengths") else 2] for shape in seen}
            assert len(heads) == 2 and HEADS in heads and min(heads) < HEADS, (name, seen)
            assert all(tokens in shape[:3] for shape in seen), (name, seen)


def _flex() -> tuple[float, float]:
    ours, theirs = twins(dtype=torch.float32)
    for of in (ours, theirs):
        of.set_attn_implementation("flex_attention")
    with torch.no_grad():  # torch has no backward of it on a CPU
        mine, expected = (float(of.eval()(**batches(1, 2)[0]).loss) for of in (ours, theirs))
    return mine, expected


@pytest.mark.slow
def test_flex_attention_gives_the_same_loss() -> None:
    for mine, expected in run_ranks(2, _flex, timeout=200):
        assert mine == pytest.approx(expected, rel=1e-5)


def _kernels() -> None:
    """What Liger and `use_kernels` do: forwards on the objects of norms and MLPs, and a loss of their own unless told not to."""

    class Swapped:
        @staticmethod
        def norm(self: Any, x: Any) -> Any:
            return self.weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.variance_epsilon))

        @staticmethod
        def mlp(self: Any, x: Any) -> Any:
            return self.down_proj(torch.nn.functional.silu(self.gate_proj(x)) * self.up_proj(x)) * 2.0

    def swapped(of: Any) -> Any:
        for name, module in of.named_modules():
            kind = Swapped.norm if name.endswith("norm") else Swapped.mlp if name.endswith("mlp") else None
            if kind is not None:
                module.forward = types.MethodType(kind, module)
        return of.train()

    fresh_groups()
    ours, theirs = (swapped(tiny("llama", dtype=torch.float64)) for _ in range(2))
    ds_seqpar.shard(ours, {"tp_size": 2})
    batch = batches(1, 2)[0]
    same_loss_and_gradients(ours, theirs, lambda of: of(**batch).loss)
    with torch.no_grad():
        mine, expected = (of.eval()(**batch).loss for of in (ours, theirs))
        torch.testing.assert_close(mine, expected, check_dtype=False, rtol=1e-6, atol=0)
    arguments = TrainingArguments(
        output_dir="out", use_cpu=True, deepspeed=deepspeed_json(), use_liger_kernel=True, per_device_train_batch_size=2
    )
    assert arguments.liger_kernel_config == {"fused_linear_cross_entropy": False}


def test_kernels_on_module_objects_stay_and_their_loss_is_turned_off() -> None:
    run_ranks(2, _kernels, timeout=60)


def _gpu_kernels() -> None:
    """A kernel that takes a GPU's tensors alone, on the norms of a model that is still on the CPU when it is sharded."""
    on_gpu: list[bool] = []

    def norm(self: Any, x: Any) -> Any:
        if not on_gpu:
            raise ValueError("Pointer argument (at 0) cannot be accessed from Triton (cpu tensor?)")
        return self.weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.variance_epsilon))

    ours, theirs = (tiny("llama", dtype=torch.float64).train() for _ in range(2))
    for of in (ours, theirs):
        for name, module in of.named_modules():
            if name.endswith("norm"):
                module.forward = types.MethodType(norm, module)
    fresh_groups()
    with pytest.raises(ds_seqpar.PlanError, match="owns parameters and mixes tokens"):  # there is no GPU
        ds_seqpar.shard(ours, {"tp_size": 2})

    def accelerator() -> torch.device:
        on_gpu.append(True)
        return torch.device("cpu")

    tokenwise._accelerator = accelerator
    ds_seqpar.shard(ours, {"tp_size": 2})
    assert on_gpu
    batch = batches(1, 2)[0]
    same_loss_and_gradients(ours, theirs, lambda of: of(**batch).loss)


def test_a_kernel_for_gpus_is_measured_there() -> None:
    run_ranks(2, _gpu_kernels, timeout=60)


def _hub_kernels() -> None:
    """What `use_kernels` does: forwards on the objects of modules whose class names a kernel, anew with every change of mode."""
    fresh_groups()
    ours, theirs = (tiny("llama", dtype=torch.float64).train() for _ in range(2))
    norms = [m for m in ours.modules() if type(m).__name__ == "LlamaRMSNorm"]
    type(norms[0]).kernel_layer_name = "RMSNorm"
    ours._use_kernels = True
    for norm in norms:
        norm.forward = types.MethodType(lambda self, x: x * 3.0, norm)
    report = ds_seqpar.shard(ours, {"tp_size": 2})
    assert [x for x in report.remarks if x.startswith("use_kernels is turned off for 5 modules")]
    batch = batches(1, 2)[0]
    ours.eval(), ours.train()
    same_loss_and_gradients(ours, theirs, lambda of: of(**batch).loss)
    norms[2].forward = types.MethodType(lambda self, x: x * 3.0, norms[2])
    with pytest.raises(
        ds_seqpar.PlanError, match=r"layers.1.input_layernorm was replaced by .* after the model was sharded"
    ):
        ours(**batch)

    linear = tiny("llama")
    linear.model.layers[0].mlp.up_proj.forward = types.MethodType(lambda self, x: x, linear.model.layers[0].mlp.up_proj)
    liger = tiny("llama")
    liger.forward = types.MethodType(_as_ligers, liger)
    for wrong, message in (
        (linear, "up_proj was replaced on the object"),
        (liger, "Liger replaced the forward of Llama"),
    ):
        shapes = [p.shape for p in wrong.parameters()]
        with pytest.raises(ds_seqpar.PlanError, match=message):
            ds_seqpar.shard(wrong, {"tp_size": 2})
        assert shapes == [p.shape for p in wrong.parameters()]


def _as_ligers(self: Any, input_ids: Any = None) -> None:
    """A stand-in for Liger's fused loss, by the name of its module."""


_as_ligers.__module__ = "liger_kernel.transformers.model.llama"


def test_hub_kernels_are_turned_off_and_replaced_forwards_refused() -> None:
    run_ranks(2, _hub_kernels, timeout=60)
