"""A Hugging Face model becomes a sharded one, ready for an engine."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from typing import Any

import deepspeed
import torch.distributed as dist
from deepspeed import comm
from deepspeed.accelerator import get_accelerator
from torch import nn

from ..adapters import merge_gathered, refuse_on_wrapper
from ..checks.optimizers import watch_steps
from ..checks.reference import Skeleton
from ..checks.verification import Verification, batch_for, verify
from ..config import KEY, Recompute, SeqParConfig
from ..errors import ConfigError, PlanError, VerificationError
from ..groups import limit_waiting
from ..hf import causal_lm_loss, describe, enable_full_recompute, leave_hub_kernels, require_model, uses_sdpa
from ..inject import inject, report_of, see_through
from ..layers.attention import LEAST_TOKENS_FOR_CUDNN, prefers_cudnn
from ..layers.loss import CausalLMLoss
from ..plan.report import Report
from ..planning import PartlyLoaded
from .process_groups import data_parallel_group, tensor_parallel_groups
from .tags import tag

__all__ = ["ADOPTED_FORWARDS", "shard", "sharded_before", "verified"]

ADOPTED_FORWARDS: dict[tuple[str, str], Callable[[Any, Callable[..., Any]], Callable[..., Any]]] = {}
"""(module, function) of a forward that a host puts on a model object -> what takes its place on a sharded one."""


VERIFY_SEQ = 17
"""Tokens in a row of the batch that `"verify": true` uses."""


def shard(model: nn.Module, config: SeqParConfig | Mapping[str, Any]) -> Report:
    """Shards a Hugging Face model in place over groups of `config.tp_size` consecutive ranks, ready for DeepSpeed.

    `config` may be the key's object, `{"tp_size": 2}`. What `initialize` does first; needs torch.distributed initialised.
    """
    if not isinstance(config, SeqParConfig):
        config = SeqParConfig.from_json(config)
    hf_model = require_model(model)
    loaded: PartlyLoaded | None = vars(hf_model).get("seqpar_loaded")
    if loaded is not None and loaded.tp_size != config.tp_size:
        raise ConfigError(
            f'the model was loaded for tp_size {loaded.tp_size}, but "{KEY}.tp_size" is {config.tp_size}; load it with this config'
        )
    facts = describe(hf_model)
    if loaded is not None:
        loaded.require_modules(facts.modules)
        facts = loaded.facts
    loss = causal_lm_loss(hf_model)
    own_forward = _own_forward(hf_model)  # before anything is touched; inject takes it off
    groups = tensor_parallel_groups(config.tp_size)
    kernelized = leave_hub_kernels(hf_model)
    limit_waiting(
        config.timeout_s, (groups.tp_group, groups.tp_cpu_group, groups.world_cpu_group, None, data_parallel_group())
    )
    skeleton = Skeleton(model, share=(groups.tp_rank, groups.tp_size), whole=loaded is None) if config.verifies else None
    report = inject(hf_model, facts, config, groups, loaded=loaded)
    if kernelized:
        report.remarks.append(
            f"use_kernels is turned off for {kernelized} modules: ds_seqpar brings kernels of its own"
        )
    for mark in ("seqpar_loaded", "save_pretrained", "resize_token_embeddings") if loaded is not None else ():
        delattr(hf_model, mark)
    if loss is not None and facts.head is not None:
        hf_model.loss_function = CausalLMLoss(loss)
    if config.recompute is Recompute.FULL:
        enable_full_recompute(hf_model)
    if (
        uses_sdpa(hf_model)
        and get_accelerator().device_name() == "cuda"
        and prefers_cudnn(get_accelerator().current_device())
    ):
        report.remarks.append(f"attention: SDPA takes cuDNN's kernel first, from {LEAST_TOKENS_FOR_CUDNN} tokens on")
    if own_forward is not None:
        hf_model.forward = own_forward
    hf_model.seqpar_config = config
    watch_steps()
    tag(model, groups)
    if model is not hf_model:
        see_through(model)
        merge_gathered(model, deepspeed.zero.GatheredParameters)
        refuse_on_wrapper(model)
    if comm.get_rank() == 0:
        _logger().info("%s", report)
    if skeleton is not None:
        verification = _verified_or_refused(model, skeleton, config)
        if comm.get_rank() == 0:
            _logger().info("%s", verification)
    return report


def verified(model: nn.Module, skeleton: Skeleton, seq: int = VERIFY_SEQ) -> Verification:
    """Compares a sharded model, not yet in an engine, with what it was, on rows of `seq` tokens; see checks.verification."""
    inner = require_model(model)
    if dist.get_backend(inner.seqpar.groups.tp_group) != "gloo":
        model.to(get_accelerator().current_device_name())
    return verify(model, inner, skeleton, batch_for(inner, inner.seqpar.groups.tp_size, seq))


def _verified_or_refused(model: nn.Module, skeleton: Skeleton, config: SeqParConfig) -> Verification:
    """A verification that passed. Raises VerificationError, which tells of the user's own plan if there is one."""
    if not config.plan:
        verification = verified(model, skeleton)
        verification.require()
        return verification
    try:
        verification = verified(model, skeleton)
        verification.require()
    except Exception as problem:  # whatever the model's code says of shapes that it did not expect
        own = "" if isinstance(problem, VerificationError) else f"{type(problem).__name__}: "
        raise VerificationError(
            f'with the "plan" {dict(config.plan)} of the {KEY} key the sharded model is not the unsharded one, or cannot be compared '
            f"with it. {own}{problem}\nA packed weight needs the roles of its sections after a colon, such as "
            f'"packed_colwise:q,kv,kv"; a block can be planned as "whole"; "verify": false in the key trains without this comparison'
        ) from problem
    return verification


def _own_forward(model: nn.Module) -> Callable[..., Any] | None:
    """What replaces a forward that was put on the model object: it would go past the sharded model's own."""
    forward = vars(model).get("forward")
    if forward is None:
        return None
    function = getattr(forward, "__func__", forward)
    name = (function.__globals__["__name__"], function.__code__.co_name)
    if name not in ADOPTED_FORWARDS:
        raise PlanError(
            f"the forward of this {type(model).__name__} object was replaced by {'.'.join(name)}, and what that does is not known; "
            "replace it after deepspeed.initialize, or subclass the model"
        )
    return ADOPTED_FORWARDS[name](model, forward)


def sharded_before(model: nn.Module, config: SeqParConfig) -> Report | None:
    """The Report of a model that an earlier call sharded for the same key: hosts make one engine to evaluate, and another to train.

    Raises PlanError if the earlier engine partitioned it.
    """
    if vars(require_model(model)).get("seqpar_config") != config:
        return None
    if any(hasattr(p, "ds_id") for p in model.parameters()):
        raise PlanError(
            "this model already has an engine at ZeRO 3, whose hooks stay on its modules (DPO's precompute_ref_log_probs makes one); "
            'use "zero_optimization": {"stage": 2} or lower, or build a second model for the other engine'
        )
    return report_of(model)


def _logger() -> logging.Logger:
    """The `ds_seqpar` logger, with a handler of its own if nobody gave it one: DeepSpeed's shows warnings only."""
    logger = logging.getLogger("ds_seqpar")
    if not logger.hasHandlers():
        logger.addHandler(logging.StreamHandler())
    if logger.level == logging.NOTSET:
        logger.setLevel(logging.INFO)
    return logger
