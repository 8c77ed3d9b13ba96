"""torch DTensor tensor + sequence parallelism: torchtitan's plan for Llama, on the transformers model, with loss_parallel."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from harness.case import Case
from harness.measure import device_of_rank
from harness.weights import hf_model
from harness.workload import MasterAdamW, Workload
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    PrepareModuleInput,
    RowwiseParallel,
    SequenceParallel,
    loss_parallel,
    parallelize_module,
)
from torch.nn.functional import cross_entropy, pad
from torch.utils.checkpoint import checkpoint

__all__ = ["build"]


def build(case: Case, compiled: bool) -> Workload:
    device = device_of_rank()
    model = hf_model(case, device)
    _parallelise(model, init_device_mesh(device.type, (dist.get_world_size(),)))
    if compiled:
        for layer in model.model.layers:
            layer.compile()
    optimizer = MasterAdamW(model.parameters())

    def forward(tokens: Tensor) -> Tensor:
        targets = pad(tokens[:, 1:], (0, 1), value=-100)
        logits = _logits(model, tokens, case.full_recompute, compiled)
        with loss_parallel():
            return cross_entropy(logits.flatten(0, 1).float(), targets.flatten(), ignore_index=-100)

    def backward(loss: Tensor) -> None:
        with loss_parallel():
            loss.backward()

    def step() -> None:
        for parameter in model.parameters():
            grad: Any = parameter.grad
            if grad.placements != parameter.placements:  # norms: partial sums over the ranks
                parameter.grad = grad.redistribute(placements=parameter.placements)
        optimizer.step()

    return Workload(model, forward, backward, step, lambda loss: float(getattr(loss, "full_tensor", lambda: loss)()))


def _parallelise(model: Any, mesh: Any) -> None:
    parallelize_module(
        model,
        mesh,
        {
            "model.embed_tokens": RowwiseParallel(input_layouts=Replicate(), output_layouts=Shard(1)),
            "model.norm": SequenceParallel(),
            "lm_head": ColwiseParallel(input_layouts=Shard(1), output_layouts=Shard(-1), use_local_output=False),
        },
    )
    for layer in model.model.layers:
        parallelize_module(
            layer,
            mesh,
            {
                "input_layernorm": SequenceParallel(),
                "self_attn": PrepareModuleInput(
                    input_kwarg_layouts={"hidden_states": Shard(1)},
                    desired_input_kwarg_layouts={"hidden_states": Replicate()},
                ),
                "self_attn.q_proj": ColwiseParallel(),
                "self_attn.k_proj": ColwiseParallel(),
                "self_attn.v_proj": ColwiseParallel(),
                "self_attn.o_proj": RowwiseParallel(output_layouts=Shard(1)),
                "post_attention_layernorm": SequenceParallel(),
                "mlp": PrepareModuleInput(input_layouts=(Shard(1),), desired_input_layouts=(Replicate(),)),
                "mlp.gate_proj": ColwiseParallel(),
                "mlp.up_proj": ColwiseParallel(),
                "mlp.down_proj": RowwiseParallel(output_layouts=Shard(1)),
            },
        )


def _logits(model: Any, tokens: Tensor, recompute: bool, compiled: bool) -> Tensor:
    """LlamaForCausalLM.forward without its masks and positions, which it would read off the shard's length."""
    hidden: Tensor = model.model.embed_tokens(tokens)
    if compiled:
        hidden = (
            hidden.clone()
        )  # a compiled layer that is handed a collective still in flight loses its gradient's layout
    positions = torch.arange(tokens.shape[1], device=tokens.device)[None]
    rotation = model.model.rotary_emb(hidden, position_ids=positions)
    for layer in model.model.layers:
        run = partial(layer, attention_mask=None, position_embeddings=rotation, position_ids=positions)
        hidden = checkpoint(run, hidden, use_reentrant=False) if recompute else run(hidden)
    logits: Tensor = model.lm_head(model.model.norm(hidden))
    return logits
