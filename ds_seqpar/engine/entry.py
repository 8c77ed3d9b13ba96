"""`initialize`: the key is read, the model sharded, DeepSpeed's engine built and fitted to it."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

import deepspeed
from deepspeed import comm
from deepspeed.accelerator import get_accelerator
from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler
from deepspeed.runtime.zero.config import ZeroStageEnum
from deepspeed.utils.tensor_fragment import fragment_address
from torch import nn

from ..adapters import refuse_partitioned
from ..checkpoint.resume import load_checkpoint, save_checkpoint
from ..checks.failures import explained
from ..checks.optimizers import check_named, check_optimizer
from ..config import KEY, SeqParConfig
from ..deepspeed_fields import unknown_fields
from ..errors import ConfigError
from ..hf import require_model
from ..inject import report_of
from ..own_gradients import leave_gradients, left_in_place
from ..plan.report import Report
from ..translation import section, waits_to_time
from .arguments import bound, ds_config_of, plain_initialize, translate, without_config
from .sharding import shard, sharded_before
from .sub_groups import even_sub_groups
from .tags import fetch_experts_as_one
from .watches import memory_check, replica_check
from .weights import save_16bit_model, write_local

__all__ = ["SAFE_CLASSES", "initialize", "patch"]

SAFE_CLASSES = (fragment_address, LossScaler, DynamicLossScaler, ZeroStageEnum)
"""What DeepSpeed's checkpoint files hold beside tensors and plain values."""


def initialize(*args: Any, **kwargs: Any) -> tuple[Any, ...]:
    """`deepspeed.initialize`, same arguments and results, that shards `model` first if the config holds the key.

    `config` (or `config_params`, or `args.deepspeed_config`) is a dict or a path, as DeepSpeed allows. The engine's Report
    is `engine.seqpar_report`. Without the key, or with `"enabled": false`, the call goes to DeepSpeed untouched. A model that
    is already sharded for the same key gets another engine, as DeepSpeed allows.

    Raises:
        ConfigError: the key, or something beside it, cannot be done; on every rank, before any work.
        PlanError: the model cannot be sharded exactly; nothing of it was touched.
    """
    given = bound(args, kwargs)
    ds_config = ds_config_of(given)
    if ds_config is None or KEY not in ds_config:
        return plain_initialize(*args, **kwargs)  # type: ignore[no-any-return]
    config = SeqParConfig.from_json(ds_config[KEY])
    if not config.enabled:
        return plain_initialize(*args, **kwargs)  # type: ignore[no-any-return]
    if given.get("mpu") is not None:
        raise ConfigError(f'mpu= cannot be combined with "{KEY}", which makes its own groups; leave mpu out')
    if not comm.is_initialized():
        comm.init_distributed(dist_backend=get_accelerator().communication_backend_name())
    trains = given.get("optimizer") is not None or "optimizer" in ds_config
    translated = translate(ds_config, config, trains)
    require_model(given.get("model"))
    remark = _check_optimizer(given.get("optimizer"), ds_config, config.tp_size) if config.tp_size > 1 else ""
    stage = section(ds_config, "zero_optimization").get("stage", 0)
    refuse_partitioned(given["model"], stage)
    report = sharded_before(given["model"], config) or shard(given["model"], config)
    if remark:
        report.remark_later(remark)
    if stage == 3:
        fetch_experts_as_one(given["model"])
        even_sub_groups(given, translated, report)
    given.update(config=translated, config_params=None, args=without_config(given.get("args")))
    results = plain_initialize(**given)
    _finish(results[0], report, config, ds_config)
    return results  # type: ignore[no-any-return]


def _check_optimizer(optimizer: Any, ds_config: Mapping[str, Any], tp_size: int) -> str:
    """Raises ConfigError for an optimizer that looks at more than an element; what should be remarked where that is not known."""
    if optimizer is None:
        check_named(section(ds_config, "optimizer").get("type"), tp_size)
        return ""
    return check_optimizer(optimizer, tp_size)


def patch() -> None:
    """Makes `deepspeed.initialize` look for the key. Idempotent; without the key it changes nothing."""
    if getattr(deepspeed.initialize, "_knows_ds_seqpar", False):
        return
    wrapped = functools.wraps(plain_initialize)(initialize)
    wrapped._knows_ds_seqpar = True  # type: ignore[attr-defined]
    deepspeed.initialize = wrapped
    plain_init = deepspeed.DeepSpeedEngine.__init__

    @functools.wraps(plain_init)
    def init(self: Any, *args: Any, **kwargs: Any) -> None:
        _refuse_bypass(kwargs.get("model"), kwargs.get("config"))
        plain_init(self, *args, **kwargs)

    deepspeed.DeepSpeedEngine.__init__ = init


def _refuse_bypass(model: Any, config: Any) -> None:
    """A script that took `initialize` out of deepspeed before importing ds_seqpar would silently train unsharded."""
    if not (isinstance(config, Mapping) and KEY in config and isinstance(model, nn.Module)) or report_of(model):
        return
    if SeqParConfig.from_json(config[KEY]).enabled:
        raise ConfigError(
            f'the DeepSpeed config holds "{KEY}" but the model is not sharded: `initialize` was imported from deepspeed before '
            "ds_seqpar was; import ds_seqpar first, or call ds_seqpar.initialize"
        )


def _finish(engine: Any, report: Report, config: SeqParConfig, ds_config: Mapping[str, Any]) -> None:
    engine.seqpar_report = report
    dp_size = comm.get_world_size() // config.tp_size
    accumulation = engine.gradient_accumulation_steps()
    batch = engine.train_micro_batch_size_per_gpu() * accumulation * dp_size
    engine._config.train_batch_size = batch
    engine.tput_timer.batch_size = batch
    check = getattr(engine, "first_dataloader_check", None)
    if check is not None:
        check.remove()  # ours compares every forward, and first
    if engine.optimizer is not None and left_in_place(ds_config, dp_size, accumulation):
        leave_gradients(engine, report.remark_later)
    unknown = unknown_fields(ds_config, KEY)
    if unknown:
        report.remark_later(f'not known to be right beside "{KEY}", and not checked: {", ".join(unknown)}')
    if not waits_to_time(ds_config):
        report.remark_later(
            "DeepSpeed's throughput timer does not wait for the GPU in every step; "
            '"timers": {"throughput": {"synchronized": true}} makes it'
        )
    state, plain_step, interval = require_model(engine.module).seqpar, engine.step, config.replica_check_interval
    replicas = replica_check(engine, state) if interval and config.tp_size > 1 else None
    memory = memory_check(engine, report, config, ds_config, dp_size) if config.memory_check else None

    @functools.wraps(plain_step)
    def step(*args: Any, **kwargs: Any) -> Any:
        before = engine.global_steps
        result = plain_step(*args, **kwargs)
        # Asked afterwards: with "managed_gradient_accumulation": false only a running step is a boundary.
        boundary = engine.global_steps > before
        state.generation += boundary
        if memory is not None and boundary:
            memory.after_step(engine.global_steps)
        if replicas is not None and boundary and engine.global_steps % interval == 0:
            replicas.check(engine.global_steps)
        return result

    engine.step = step
    engine.compile = _refuse_compiling
    engine.save_checkpoint = _around(save_checkpoint, engine, engine.save_checkpoint, comm=comm)
    engine.load_checkpoint = _around(
        load_checkpoint, engine, engine.load_checkpoint, safe_classes=SAFE_CLASSES, write=write_local, comm=comm
    )
    engine.save_16bit_model = engine.save_fp16_model = _around(save_16bit_model, engine, engine.save_16bit_model)
    for call in ("forward", "backward", "step", "save_checkpoint", "load_checkpoint"):
        setattr(engine, call, explained(getattr(engine, call), call, lambda: engine.global_steps + 1, config.timeout_s))


def _refuse_compiling(*_: Any, **__: Any) -> None:
    raise ConfigError(
        f'engine.compile() cannot follow the sharded layers of "{KEY}", which have kernels of their own; leave the call out'
    )


def _around(ours: Callable[..., Any], engine: Any, plain: Callable[..., Any], **options: Any) -> Callable[..., Any]:
    """A method of `engine` in place of `plain`, whose signature it shows: the HF Trainer reads it."""
    return functools.wraps(plain)(functools.partial(ours, engine, plain, **options))
