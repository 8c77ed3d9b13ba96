"""One way to compare a sharded run under DeepSpeed with the unsharded model in plain PyTorch, used by every exactness test."""

from __future__ import annotations

import functools
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.utils import groups as ds_groups
from model_types import batches_for, tiny_of
from models import batches, tiny
from multimodal import PARTS, with_images
from torch import Tensor

import ds_seqpar

__all__ = ["change_errors", "compare_adamw", "compare_sgd", "engine_for", "fresh_groups", "replicas_equal"]


def fresh_groups() -> None:
    """Forgets the tensor-parallel groups of an earlier case in this process; each case stands for a process of its own."""
    for name in ("_TENSOR_MODEL_PARALLEL_GROUP", "_DATA_PARALLEL_GROUP", "_MODEL_PARALLEL_GROUP"):
        setattr(ds_groups, name, None)
    ds_groups.mpu = None


def engine_for(
    model: Any, optimizer: Any, key: dict[str, Any], stage: int, micro: int, accumulation: int, **ds: Any
) -> Any:
    """A DeepSpeed engine over `model`, sharded by `key`."""
    fresh_groups()
    config = {
        "train_micro_batch_size_per_gpu": micro,
        "gradient_accumulation_steps": accumulation,
        "gradient_clipping": 0.0,
        "zero_optimization": {"stage": stage, **({"stage3_param_persistence_threshold": 0} if stage == 3 else {})},
        "zero_allow_untested_optimizer": True,
        "ds_seqpar": key,
        **ds,
    }
    return deepspeed.initialize(model=model, optimizer=optimizer, config=config)[0]


def _part(batch: dict[str, Tensor], part: int, parts: int) -> dict[str, Tensor]:
    """The `part`-th of so many equal parts of the rows; an image may have many rows of its own."""
    return {name: x.chunk(parts)[part] for name, x in batch.items()}


def _reference_loss(model: Any, batch: dict[str, Tensor], dp: int) -> tuple[Tensor, list[float]]:
    """Mean over the data-parallel ranks of each rank's mean loss: what data parallelism computes."""
    losses = [model(**_part(batch, i, dp)).loss for i in range(dp)]
    return torch.stack(losses).mean(), [float(loss.detach()) for loss in losses]


def compare_sgd(
    family: str,
    tp: int,
    stage: int,
    *,
    micro: int = 1,
    accumulation: int = 3,
    seq: int = 7,
    head: str = "",
    key: dict[str, Any] | None = None,
    own: dict[str, Any] | None = None,
) -> dict[str, float]:
    """SGD, lr 1: name -> relative error of the weight's change after one step, beyond rounding; the caller judges.

    With a `head` of model_types.HEADS, the model has that one, its batches and its loss.
    """
    dp = dist.get_world_size() // tp
    make = functools.partial(tiny_of, head=head) if head else tiny
    data = functools.partial(batches_for, head=head) if head else batches
    model, reference = make(family, **(own or {})), make(family, **(own or {}))
    before = {n: p.detach().cpu().clone() for n, p in reference.named_parameters()}
    model.train(), reference.train()
    engine = engine_for(
        model, torch.optim.SGD(model.parameters(), lr=1.0), {"tp_size": tp, "loss_chunk_tokens": 4, **(key or {})}, stage, micro,
        accumulation,
    )  # fmt: skip
    optimizer = torch.optim.SGD(reference.parameters(), lr=1.0)
    errors: dict[str, float] = {}
    for step, batch in enumerate(data(accumulation, micro * dp, seq)):
        if family in PARTS:
            batch = with_images(batch, family, torch.float32, step)
        loss = engine(**_part(batch, dist.get_rank() // tp, dp)).loss
        engine.backward(loss)
        engine.step()
        loss = loss.detach()
        expected, each = _reference_loss(reference, batch, dp)
        (expected / accumulation).backward()
        errors[f"loss {step}"] = abs(float(loss) - each[dist.get_rank() // tp]) / abs(each[dist.get_rank() // tp])
    optimizer.step()
    after = ds_seqpar.full_state_dict(engine)
    if dist.get_rank() == 0:
        errors |= change_errors(
            before, after, {n: p.detach().cpu() - before[n] for n, p in reference.named_parameters()}
        )
    errors["replicas"] = 0.0 if replicas_equal(engine, ()) else 1.0
    engine.destroy()
    return errors


def change_errors(before: dict[str, Tensor], after: dict[str, Tensor], changes: dict[str, Tensor]) -> dict[str, float]:
    """Relative error of each weight's change against `changes` (CPU), beyond rounding.

    Both runs store weight + change in fp32: the two stored values may differ by one ulp of the weight, which is much of a
    small change. That share is rounding alone; at most 4e-5 is granted for it. A change of less than a millionth of the largest
    is zero but for rounding (the bias of keys, a bias before a softmax over positions): ours must be as small.
    """
    errors = {}
    nothing = 1e-6 * max(float(change.norm()) for change in changes.values())
    for name, change in changes.items():
        if float(change.norm()) <= nothing:
            errors[name] = 0.0 if float((after[name] - before[name]).norm()) <= nothing else float("inf")
            continue
        size = change.norm().clamp_min(1e-12)
        rounding = torch.finfo(torch.float32).eps * float(before[name].norm() / size)
        errors[name] = float(((after[name] - before[name]) - change).norm() / size) - min(rounding, 4e-5)
    return errors


def compare_adamw(
    family: str, tp: int, stage: int, *, micro: int = 1, accumulation: int = 3, key: dict[str, Any] | None = None
) -> dict[str, float]:
    """Five AdamW steps with clipping active: relative errors of losses, gradient norms and weights."""
    dp, clip, steps = dist.get_world_size() // tp, 0.05, 5
    model, reference = tiny(family), tiny(family)
    model.train(), reference.train()
    options: dict[str, Any] = dict(lr=1e-3, betas=(0.9, 0.99), eps=1e-6, weight_decay=0.1)
    engine = engine_for(
        model, torch.optim.AdamW(model.parameters(), **options), {"tp_size": tp, **(key or {})}, stage, micro, accumulation,
        gradient_clipping=clip,
    )  # fmt: skip
    optimizer = torch.optim.AdamW(reference.parameters(), **options)
    errors: dict[str, float] = {}
    data = batches(steps * accumulation, micro * dp)
    for step in range(steps):
        for i, batch in enumerate(data[step * accumulation : (step + 1) * accumulation]):
            loss = engine(**_part(batch, dist.get_rank() // tp, dp)).loss
            engine.backward(loss)
            engine.step()
            loss = loss.detach()
            expected, each = _reference_loss(reference, batch, dp)
            (expected / accumulation).backward()
            mine = each[dist.get_rank() // tp]
            errors[f"loss {step}.{i}"] = abs(float(loss) - mine) / abs(mine)
        norm = float(torch.nn.utils.clip_grad_norm_(reference.parameters(), clip))
        assert norm > clip, "clipping must be active"
        optimizer.step()
        optimizer.zero_grad()
        reported = engine.get_global_grad_norm()
        if reported is not None:
            errors[f"norm {step}"] = abs(float(reported) - norm) / norm
    after = ds_seqpar.full_state_dict(engine)
    if dist.get_rank() == 0:
        for name, parameter in reference.named_parameters():
            expected_weight = parameter.detach().cpu()
            errors[name] = float((after[name] - expected_weight).norm() / expected_weight.norm())
    errors["replicas"] = 0.0 if replicas_equal(engine) else 1.0
    engine.destroy()
    return errors


def replicas_equal(engine: Any, moments: tuple[str, ...] = ("exp_avg", "exp_avg_sq")) -> bool:
    """True if replicated parameters and their optimizer state are equal bit for bit on the ranks of this tp_group."""
    state = engine.module.seqpar
    kinds = engine.seqpar_report.parameters()
    group, equal = state.groups.tp_group, True
    tensors: list[Tensor] = []
    for name, parameter in engine.module.named_parameters():
        if kinds[name].cut is not None:
            continue
        with deepspeed.zero.GatheredParameters([parameter], enabled=hasattr(parameter, "ds_id")):
            tensors.append(parameter.detach().clone())
        for which in moments:
            moment = _optimizer_state(engine, parameter, which)
            if moment is not None:
                tensors.append(moment.detach().clone())
    for tensor in tensors:
        parts = [torch.empty_like(tensor) for _ in range(dist.get_world_size(group))]
        dist.all_gather(parts, tensor.contiguous(), group=group)
        equal &= all(torch.equal(part, parts[0]) for part in parts)
    return equal and bool(tensors)


def _optimizer_state(engine: Any, parameter: Tensor, which: str) -> Tensor | None:
    if engine.zero_optimization_stage() == 0:
        return engine.optimizer.state.get(parameter, {}).get(which) if hasattr(engine.optimizer, "state") else None
    from deepspeed.utils import safe_get_full_optimizer_state

    return safe_get_full_optimizer_state(parameter, which)
