"""The same weights and tokens for every arm: each parameter is drawn from a seed of its own, by its Hugging Face name.

No arm needs a checkpoint, and none needs more than one whole parameter at a time.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from .case import Case

__all__ = ["hf_config", "hf_model", "parameter_shapes", "tokens_of", "whole_parameter"]


def parameter_shapes(case: Case) -> Iterator[tuple[str, tuple[int, ...]]]:
    """(name, shape) of every parameter of LlamaForCausalLM without tied embeddings, in its order."""
    shape = case.shape
    q, kv = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    h, i = shape.hidden, shape.intermediate
    yield "model.embed_tokens.weight", (shape.vocab, h)
    for layer in range(case.layers):
        attention, mlp = f"model.layers.{layer}.self_attn", f"model.layers.{layer}.mlp"
        for name, size in (("q_proj", (q, h)), ("k_proj", (kv, h)), ("v_proj", (kv, h)), ("o_proj", (h, q))):
            yield f"{attention}.{name}.weight", size
        for name, size in (("gate_proj", (i, h)), ("up_proj", (i, h)), ("down_proj", (h, i))):
            yield f"{mlp}.{name}.weight", size
        for name in ("input_layernorm", "post_attention_layernorm"):
            yield f"model.layers.{layer}.{name}.weight", (h,)
    yield "model.norm.weight", (h,)
    yield "lm_head.weight", (shape.vocab, h)


def whole_parameter(name: str, shape: tuple[int, ...], case: Case, device: torch.device) -> Tensor:
    """The whole parameter `name` in the case's dtype; the same on every rank whose device is of the same kind."""
    generator = torch.Generator(device).manual_seed(zlib.crc32(name.encode()) + case.seed)
    values = torch.randn(shape, generator=generator, device=device, dtype=torch.float32)
    if len(shape) == 1:
        return values.mul_(0.1).add_(1.0).to(case.torch_dtype)
    return values.mul_(1.28 / case.shape.hidden**0.5).to(case.torch_dtype)  # 0.02 at a hidden size of 4096


def tokens_of(case: Case, device: torch.device) -> Tensor:
    """Token ids [1, T], the same on every rank."""
    generator = torch.Generator().manual_seed(1000 + case.seed)
    return torch.randint(case.shape.vocab, (1, case.tokens), generator=generator).to(device)


def hf_config(case: Case) -> Any:
    """The LlamaConfig of the case, attention through SDPA."""
    from transformers import LlamaConfig

    shape = case.shape
    return LlamaConfig(
        vocab_size=shape.vocab,
        hidden_size=shape.hidden,
        intermediate_size=shape.intermediate,
        num_hidden_layers=case.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        head_dim=shape.head_dim,
        max_position_embeddings=131072,
        rope_parameters={"rope_type": "default", "rope_theta": 500000.0},
        rms_norm_eps=1e-5,
        tie_word_embeddings=False,
        attn_implementation="sdpa",
        use_cache=False,
    )


def hf_model(case: Case, device: torch.device) -> nn.Module:
    """A whole LlamaForCausalLM with the case's weights on `device`, in training mode."""
    from transformers import LlamaForCausalLM
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    config = hf_config(case)
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    model.to(case.torch_dtype).to_empty(device=device)
    with device:
        model.model.rotary_emb = LlamaRotaryEmbedding(config)  # buffers, not weights: they stay fp32
    shapes = dict(parameter_shapes(case))
    for name, parameter in model.named_parameters():
        parameter.data.copy_(whole_parameter(name, shapes.pop(name), case, device))
    if shapes:
        raise RuntimeError(f"LlamaForCausalLM has no parameters {sorted(shapes)}")
    return model.train()
