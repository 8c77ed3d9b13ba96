"""Megatron-core's GPTModel with tensor + sequence parallelism: its local layers, torch's RMSNorm, SDPA as core attention.

The local spec's own norm refuses sequence parallelism and its own attention keeps whole score matrices, so both are given
here. Everything else that Megatron-core fuses without Transformer Engine or Apex is switched on.
"""

from __future__ import annotations

import types
from typing import Any

import torch
import torch.distributed as dist
from harness.case import Case
from harness.measure import device_of_rank
from harness.weights import parameter_shapes, whole_parameter
from harness.workload import MasterAdamW, Workload
from torch import Tensor, nn
from torch.nn.functional import pad, scaled_dot_product_attention, silu

__all__ = ["build"]


def build(case: Case) -> Workload:
    device = device_of_rank()
    if device.type == "cpu":
        _answer_for_cuda()
    from megatron.core import parallel_state
    from megatron.core.distributed.finalize_model_grads import _allreduce_non_tensor_model_parallel_grads
    from megatron.core.models.gpt.gpt_model import GPTModel
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

    if not parallel_state.model_parallel_is_initialized():
        parallel_state.initialize_model_parallel(
            tensor_model_parallel_size=dist.get_world_size(), create_gloo_process_groups=False
        )
        if device.type == "cuda":
            model_parallel_cuda_manual_seed(case.seed)
    config = _config(case)
    model: Any = GPTModel(
        config=config,
        transformer_layer_spec=_layers(case),
        vocab_size=case.shape.vocab,
        max_sequence_length=case.tokens,
        position_embedding_type="rope",
        rotary_base=500000,
        share_embeddings_and_output_weights=False,
        parallel_output=True,
    ).to(device)
    _load(model, case, device)
    model.train()
    model.ddp_config = types.SimpleNamespace(use_megatron_fsdp=False)  # what the gradient sums below read
    optimizer = MasterAdamW(model.parameters())

    def forward(tokens: Tensor) -> Tensor:
        positions = torch.arange(case.tokens, device=tokens.device)[None]
        losses = model(tokens, positions, None, labels=pad(tokens[:, 1:], (0, 1)))
        mean: Tensor = losses[:, :-1].float().mean()  # the last token has no label
        return mean

    def backward(loss: Tensor) -> None:
        loss.backward()
        _allreduce_non_tensor_model_parallel_grads([model], config)

    return Workload(model, forward, backward, optimizer.step)


def _config(case: Case) -> Any:
    from megatron.core.transformer import TransformerConfig

    shape = case.shape
    recompute: dict[str, Any] = {}
    if case.full_recompute:
        recompute = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
    return TransformerConfig(
        num_layers=case.layers,
        hidden_size=shape.hidden,
        ffn_hidden_size=shape.intermediate,
        num_attention_heads=shape.heads,
        num_query_groups=shape.kv_heads,
        kv_channels=shape.head_dim,
        normalization="RMSNorm",
        layernorm_epsilon=1e-5,
        gated_linear_unit=True,
        activation_func=silu,
        add_bias_linear=False,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        tensor_model_parallel_size=dist.get_world_size(),
        sequence_parallel=dist.get_world_size() > 1,
        bf16=case.dtype == "bfloat16",
        params_dtype=case.torch_dtype,
        perform_initialization=False,
        bias_activation_fusion=True,
        bias_dropout_fusion=True,
        cross_entropy_loss_fusion=True,
        cross_entropy_fusion_impl="native",
        **recompute,
    )


def _layers(case: Case) -> Any:
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.transformer.transformer_block import TransformerBlockSubmodules

    spec = get_gpt_layer_local_spec(normalization="RMSNorm")
    spec.submodules.input_layernorm = spec.submodules.pre_mlp_layernorm = _rms_norm
    spec.submodules.self_attention.submodules.core_attention = _CoreAttention
    return TransformerBlockSubmodules(layer_specs=[spec] * case.layers, layer_norm=_rms_norm)


def _rms_norm(config: Any, hidden_size: int, eps: float, **_: Any) -> nn.Module:
    norm = nn.RMSNorm(hidden_size, eps=eps, dtype=config.params_dtype)
    norm.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]
    return norm


class _CoreAttention(nn.Module):
    """query [s, b, n, d], key and value [s, b, g, d] -> [s, b, n*d], causal."""

    def __init__(self, **_: Any) -> None:
        super().__init__()

    def forward(self, query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> Tensor:
        q, k, v = (x.permute(1, 2, 0, 3) for x in (query, key, value))
        out = scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=q.shape[1] != k.shape[1])
        return out.permute(2, 0, 1, 3).flatten(2)


def _load(model: Any, case: Case, device: torch.device) -> None:
    """Copies this rank's part of every parameter into Megatron's fused layouts."""
    world, rank = dist.get_world_size(), dist.get_rank()
    shape, shapes = case.shape, dict(parameter_shapes(case))

    def mine(name: str, dim: int = 0) -> Tensor:
        return whole_parameter(name, shapes.pop(name), case, device).chunk(world, dim)[rank]

    def whole(name: str) -> Tensor:
        return whole_parameter(name, shapes.pop(name), case, device)

    with torch.no_grad():
        model.embedding.word_embeddings.weight.copy_(mine("model.embed_tokens.weight"))
        for i, layer in enumerate(model.decoder.layers):
            at = f"model.layers.{i}"
            layer.input_layernorm.weight.copy_(whole(f"{at}.input_layernorm.weight"))
            layer.pre_mlp_layernorm.weight.copy_(whole(f"{at}.post_attention_layernorm.weight"))
            groups = shape.kv_heads // world
            rows = [mine(f"{at}.self_attn.{n}_proj.weight").view(groups, -1, shape.hidden) for n in "qkv"]
            layer.self_attention.linear_qkv.weight.copy_(torch.cat(rows, dim=1).flatten(0, 1))
            layer.self_attention.linear_proj.weight.copy_(mine(f"{at}.self_attn.o_proj.weight", 1))
            layer.mlp.linear_fc1.weight.copy_(torch.cat([mine(f"{at}.mlp.{n}_proj.weight") for n in ("gate", "up")]))
            layer.mlp.linear_fc2.weight.copy_(mine(f"{at}.mlp.down_proj.weight", 1))
        model.decoder.final_layernorm.weight.copy_(whole("model.norm.weight"))
        model.output_layer.weight.copy_(mine("lm_head.weight"))
    if shapes:
        raise RuntimeError(f"no place for {sorted(shapes)}")


def _answer_for_cuda() -> None:
    """Megatron-core asks CUDA by name for the device and its random states; without a GPU the CPU answers."""
    from contextlib import nullcontext

    torch.cuda.current_device = lambda: "cpu"  # type: ignore[assignment, return-value]
    from megatron.core.tensor_parallel import random

    random.CudaRNGStatesTracker.fork = lambda self, name="": nullcontext()  # type: ignore[method-assign]
    random._get_cuda_rng_state = lambda *args, **kwargs: torch.zeros(0)
    random._set_cuda_rng_state = lambda *args, **kwargs: None
