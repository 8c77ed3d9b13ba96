"""The seam to DeepSpeed: reads the key, shards the model, hands over to DeepSpeed's own tensor-parallel switch.

The only file that imports deepspeed. Beside its documented names it takes load_ds_config and GRADIENT_CLIPPING_DEFAULT from
their modules, and counts on `initialize` building a DeepSpeedEngine with keyword arguments.

Saves and loads go through its checkpoint_engine.save, its recovery script, its affine maps, and what waits for other ranks in them:
tests/checkpoint/test_private_names.py.

Private names it relies on, each held by a contract test:
`groups._init_tp_mesh_device`, `groups._TENSOR_MODEL_PARALLEL_GROUP`, `model.ds_autotp_parsed`, `parameter.tensor_model_parallel`,
`parameter.ds_is_replaced_module` with `gather_params` and `_tp_partition`, `engine.first_dataloader_check`,
`engine._config.train_batch_size`, `engine.tput_timer.batch_size`, `parameter._hp_mapping`, `parameter.ds_tensor`.
"""

from __future__ import annotations

import atexit
import copy
import functools
import inspect
import logging
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from deepspeed import comm
from deepspeed.accelerator import get_accelerator
from deepspeed.checkpoint.affine import AFFINE_MAP_FORMAT_VERSION
from deepspeed.checkpoint.constants import (
    AFFINE_MAP,
    AFFINE_MAP_PARAMS,
    AFFINE_MAP_VERSION,
    DS_AUTOTP_UC_META,
    UNIVERSAL_CHECKPOINT_VERSION_KEY,
    UNIVERSAL_CHECKPOINT_VERSION_VALUE,
)
from deepspeed.runtime.constants import GRADIENT_CLIPPING_DEFAULT
from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler
from deepspeed.runtime.tensor_parallel.init_utils import load_ds_config
from deepspeed.runtime.zero.config import ZeroStageEnum
from deepspeed.utils import groups as ds_groups
from deepspeed.utils import safe_get_local_fp32_param, safe_get_local_optimizer_state, set_z3_leaf_module
from deepspeed.utils.tensor_fragment import fragment_address
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from .adapters import merge_gathered, refuse_on_wrapper, refuse_partitioned
from .checkpoint.gathering import gather_parameter, part_of
from .checkpoint.resume import load_checkpoint, save_checkpoint
from .checkpoint.universal import affine_map, affine_maps
from .checkpoint.whole_model import export as write_whole
from .checks.failures import explained
from .checks.reference import Skeleton
from .checks.replicas import Piece, ReplicaCheck
from .checks.verification import Verification, batch_for, verify
from .config import KEY, Recompute, SeqParConfig
from .errors import ConfigError, PlanError
from .groups import ParallelGroups, limit_waiting
from .hf import causal_lm_loss, describe, enable_full_recompute, leave_hub_kernels, require_model, uses_sdpa
from .inject import PartlyLoaded, inject, report_of, see_through
from .layers.attention import LEAST_TOKENS_FOR_CUDNN, prefers_cudnn
from .layers.boundaries import ShardedBlock
from .layers.linear import ColumnParallelLinear
from .layers.loss import CausalLMLoss
from .layers.region import ShardingState
from .own_gradients import leave_gradients, left_in_place
from .plan.report import ParameterEntry, Report
from .planner.startup import CudaMeter, MemoryCheck, Meter, question_of
from .translation import section, translated, waits_to_time

__all__ = [
    "data_parallel_group", "export", "groups_of", "initialize", "patch", "shard", "whole_parameter",
]  # fmt: skip

_plain_initialize = deepspeed.initialize
ADOPTED_FORWARDS: dict[tuple[str, str], Callable[[Any, Callable[..., Any]], Callable[..., Any]]] = {}
"""(module, function) of a forward that a host puts on a model object -> what takes its place on a sharded one."""

VERIFY_SEQ = 17
"""Tokens in a row of the batch that `"verify": true` uses."""

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
    given = _bound(args, kwargs)
    ds_config = _ds_config(given)
    if ds_config is None or KEY not in ds_config:
        return _plain_initialize(*args, **kwargs)  # type: ignore[no-any-return]
    config = SeqParConfig.from_json(ds_config[KEY])
    if not config.enabled:
        return _plain_initialize(*args, **kwargs)  # type: ignore[no-any-return]
    if given.get("mpu") is not None:
        raise ConfigError(f'mpu= cannot be combined with "{KEY}", which makes its own groups; leave mpu out')
    if not comm.is_initialized():
        comm.init_distributed(dist_backend=get_accelerator().communication_backend_name())
    trains = given.get("optimizer") is not None or "optimizer" in ds_config
    translated = _translated(ds_config, config, trains)
    require_model(given.get("model"))
    stage = section(ds_config, "zero_optimization").get("stage", 0)
    refuse_partitioned(given["model"], stage)
    report = _sharded_before(given["model"], config) or shard(given["model"], config)
    if stage == 3:
        _fetch_experts_as_one(given["model"])
    given.update(config=translated, config_params=None, args=_without_config(given.get("args")))
    results = _plain_initialize(**given)
    _finish(results[0], report, config, ds_config)
    return results  # type: ignore[no-any-return]


def _sharded_before(model: nn.Module, config: SeqParConfig) -> Report | None:
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
    facts = loaded.facts if loaded is not None else describe(hf_model)
    loss = causal_lm_loss(hf_model)
    own_forward = _own_forward(hf_model)  # before anything is touched; inject takes it off
    groups = _tensor_parallel_groups(config.tp_size)
    kernelized = leave_hub_kernels(hf_model)
    limit_waiting(
        config.timeout_s, (groups.tp_group, groups.tp_cpu_group, groups.world_cpu_group, None, data_parallel_group())
    )
    skeleton = Skeleton(model, share=(groups.tp_rank, groups.tp_size), whole=loaded is None) if config.verify else None
    report = inject(hf_model, facts, config, groups, already_cut=loaded is not None)
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
    _tag(model, groups)
    if model is not hf_model:
        see_through(model)
        merge_gathered(model, deepspeed.zero.GatheredParameters)
        refuse_on_wrapper(model)
    if comm.get_rank() == 0:
        _logger().info("%s", report)
    if skeleton is not None:
        verification = verified(model, skeleton)
        verification.require()
        if comm.get_rank() == 0:
            _logger().info("%s", verification)
    return report


def _fetch_experts_as_one(model: nn.Module) -> None:
    """Keeps ZeRO-3 out of what stands inside a module of stacked experts, [E, out, in].

    It gathers in the order in which modules were called before. Experts that run one by one call their activation once for each that
    was chosen, which differs between data-parallel ranks, and their gathers would no longer meet.
    """
    for module in model.modules():
        stacked = any(parameter.dim() == 3 for parameter in module.parameters(recurse=False))
        if stacked and next(module.children(), None) is not None:
            set_z3_leaf_module(module, True)


def verified(model: nn.Module, skeleton: Skeleton, seq: int = VERIFY_SEQ) -> Verification:
    """Compares a sharded model, not yet in an engine, with what it was, on rows of `seq` tokens; see checks.verification."""
    inner = require_model(model)
    if dist.get_backend(inner.seqpar.groups.tp_group) != "gloo":
        model.to(get_accelerator().current_device_name())
    return verify(model, inner, skeleton, batch_for(inner, inner.seqpar.groups.tp_size, seq))


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


def patch() -> None:
    """Makes `deepspeed.initialize` look for the key. Idempotent; without the key it changes nothing."""
    if getattr(deepspeed.initialize, "_knows_ds_seqpar", False):
        return
    wrapped = functools.wraps(_plain_initialize)(initialize)
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


def _logger() -> logging.Logger:
    """The `ds_seqpar` logger, with a handler of its own if nobody gave it one: DeepSpeed's shows warnings only."""
    logger = logging.getLogger("ds_seqpar")
    if not logger.hasHandlers():
        logger.addHandler(logging.StreamHandler())
    if logger.level == logging.NOTSET:
        logger.setLevel(logging.INFO)
    return logger


def _bound(args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    return dict(inspect.signature(_plain_initialize).bind_partial(*args, **kwargs).arguments)


def _ds_config(given: Mapping[str, Any]) -> dict[str, Any] | None:
    """The DeepSpeed config, wherever DeepSpeed would take it from; None where DeepSpeed itself must complain."""
    config = given.get("config")
    if config is None:
        config = given.get("config_params")
    if config is None:
        config = getattr(given.get("args"), "deepspeed_config", None)
    if config is None:
        return None
    return dict(config) if isinstance(config, dict) else load_ds_config(config)


def _without_config(args: Any) -> Any:
    if getattr(args, "deepspeed_config", None) is None:
        return args
    args = copy.copy(args)
    args.deepspeed_config = None
    return args


def _translated(ds_config: dict[str, Any], config: SeqParConfig, trains: bool = True) -> dict[str, Any]:
    return translated(ds_config, config, comm.get_world_size(), GRADIENT_CLIPPING_DEFAULT, trains=trains)


def groups_of(config: Mapping[str, Any] | str | os.PathLike[str]) -> ParallelGroups | None:
    """The groups that a DeepSpeed config asks for, made if need be; None if it does not hold the key, or disables it."""
    ds_config = _ds_config({"config": dict(config) if isinstance(config, Mapping) else os.fspath(config)})
    if ds_config is None or KEY not in ds_config:
        return None
    section = SeqParConfig.from_json(ds_config[KEY])
    if not section.enabled:
        return None
    if not comm.is_initialized():
        comm.init_distributed(dist_backend=get_accelerator().communication_backend_name())
    _translated(ds_config, section)
    return _tensor_parallel_groups(section.tp_size)


def _tensor_parallel_groups(tp_size: int) -> ParallelGroups:
    ds_groups._init_tp_mesh_device(tensor_model_parallel_size=tp_size)
    group = ds_groups.get_tensor_model_parallel_group()
    have = comm.get_world_size(group)
    if have != tp_size:
        raise ConfigError(
            f'"{KEY}.tp_size": {tp_size}, but this process already has tensor-parallel groups of {have} for another model; '
            "DeepSpeed keeps one size a process: use the same tp_size for all models, or another process"
        )
    return ParallelGroups.around(group)


def data_parallel_group() -> ProcessGroup | None:
    """The ranks that hold the same part of the model as this one; None before any model was sharded."""
    made = ds_groups._TENSOR_MODEL_PARALLEL_GROUP is not None
    return ds_groups.get_data_parallel_group() if made else None


def _tag(model: nn.Module, groups: ParallelGroups) -> None:
    """Tells DeepSpeed what it must know of the shards: whose norm counts, how they become whole, what ZeRO-3 fetches at once."""
    model.ds_autotp_parsed = require_model(model).ds_autotp_parsed = True  # type: ignore[assignment]
    by_identity: dict[int, ParameterEntry] = require_model(model).seqpar.entries
    named = dict(model.named_parameters())
    entries = {name: by_identity[id(p)] for name, p in named.items()}
    maps = {name: affine_map(entry.shape, entry.cut, groups.tp_size) for name, entry in entries.items()}
    model.universal_checkpoint_info = {  # type: ignore[assignment]
        UNIVERSAL_CHECKPOINT_VERSION_KEY: UNIVERSAL_CHECKPOINT_VERSION_VALUE,
        AFFINE_MAP: {AFFINE_MAP_VERSION: AFFINE_MAP_FORMAT_VERSION, AFFINE_MAP_PARAMS: affine_maps(maps)},
    }
    for name, parameter in named.items():
        setattr(parameter, DS_AUTOTP_UC_META, {"conversion": {"affine_map": maps[name]}})
        cut = by_identity[id(parameter)].cut
        if cut is None:
            continue
        tagged: Any = parameter
        # A part held by several ranks counts once; parameters without the tag count on the first rank only.
        tagged.tensor_model_parallel = cut.is_first_holder(groups.tp_rank)
        tagged.ds_is_replaced_module = True
        tagged.gather_params = functools.partial(_gather_in_place, entries=by_identity, groups=groups)
        tagged._tp_partition = functools.partial(_cut_in_place, entries=by_identity, groups=groups)
    for module in model.modules():
        if isinstance(module, ShardedBlock):
            # The block's column-parallel linears are computed together, so under ZeRO-3 the block fetches and releases them.
            for linear in module.modules():
                if isinstance(linear, ColumnParallelLinear):
                    for parameter in linear.parameters(recurse=False):
                        deepspeed.zero.register_external_parameter(module, parameter)


def _gather_in_place(
    parameters: Sequence[nn.Parameter | None], *, entries: Mapping[int, ParameterEntry], groups: ParallelGroups
) -> None:
    for parameter in parameters:
        cut = entries[id(parameter)].cut if parameter is not None else None
        if parameter is not None and cut is not None and parameter.shape[cut.dim] != cut.size:
            parameter.data = gather_parameter(parameter.data, cut, groups.tp_group)


def _cut_in_place(
    parameters: Sequence[nn.Parameter | None], *, entries: Mapping[int, ParameterEntry], groups: ParallelGroups
) -> None:
    for parameter in parameters:
        cut = entries[id(parameter)].cut if parameter is not None else None
        if parameter is not None and cut is not None and parameter.shape[cut.dim] == cut.size:
            parameter.data = part_of(parameter.data, cut, groups.tp_rank)


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
    if not waits_to_time(ds_config):
        report.remark_later(
            "DeepSpeed's throughput timer does not wait for the GPU in every step; "
            '"timers": {"throughput": {"synchronized": true}} makes it'
        )
    state, plain_step, interval = require_model(engine.module).seqpar, engine.step, config.replica_check_interval
    replicas = _replica_check(engine, state) if interval and config.tp_size > 1 else None
    memory = _memory_check(engine, report, config, ds_config, dp_size) if config.memory_check else None

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
    engine.save_checkpoint = _around(save_checkpoint, engine, engine.save_checkpoint, comm=comm)
    engine.load_checkpoint = _around(
        load_checkpoint, engine, engine.load_checkpoint, safe_classes=SAFE_CLASSES, write=_write_local, comm=comm
    )
    engine.save_16bit_model = engine.save_fp16_model = _around(_save_16bit_model, engine, engine.save_16bit_model)
    for call in ("forward", "backward", "step", "save_checkpoint", "load_checkpoint"):
        setattr(engine, call, explained(getattr(engine, call), call, lambda: engine.global_steps + 1, config.timeout_s))


def memory_meter() -> Meter | None:
    """What counts this rank's memory; None on the CPU, where nothing does."""
    if get_accelerator().device_name() != "cuda":
        return None
    return CudaMeter(torch.device("cuda", get_accelerator().current_device()))


def _memory_check(
    engine: Any, report: Report, config: SeqParConfig, ds_config: Mapping[str, Any], dp_size: int
) -> MemoryCheck | None:
    """On the first rank, if it trains: the others hold the same, or a little less."""
    meter = memory_meter() if comm.get_rank() == 0 and engine.optimizer is not None else None
    if meter is None:
        return None
    model = require_model(engine.module)
    if model is not engine.module:
        report.remark_later("memory is not compared with a plan: the model is inside a wrapper, such as an adapter's")
        return None
    on_gpu = isinstance(meter, CudaMeter)
    as_it_runs = {**ds_config, "gradient_accumulation_steps": engine.gradient_accumulation_steps()}
    check = MemoryCheck(engine, question_of(model, config, as_it_runs, dp_size, on_gpu), meter, report.remark_later)
    atexit.register(check.close)
    return check


def _replica_check(engine: Any, state: ShardingState) -> ReplicaCheck:
    pieces, dp_group = functools.partial(_pieces, engine), data_parallel_group()
    assert dp_group is not None, "the model is sharded"
    check = ReplicaCheck(engine.module.named_parameters(), state.entries, state.groups, dp_group, pieces)
    if not check.compares_random_streams:
        engine.seqpar_report.remark_later("ranks of one group were seeded apart: their random streams are not compared")
    if engine.zero_optimization_stage() == 0 and engine.optimizer is not engine.basic_optimizer:
        engine.seqpar_report.remark_later(
            "ZeRO stage 0 in half precision: optimizer state is not among the replicas compared"
        )
    return check


def _pieces(engine: Any, parameter: nn.Parameter) -> Iterator[Piece]:
    """What this rank holds of a parameter, of its fp32 copy and of its optimizer state, alike in number on every rank."""
    stage, basic = engine.zero_optimization_stage(), engine.basic_optimizer
    names = _state_names(basic) if parameter.requires_grad and basic is not None else []
    if stage == 3:
        yield from _pieces_in_zero3(parameter, names)
        return
    yield Piece("", parameter)
    if stage:
        yield from _pieces_in_partitions(parameter, names)
    elif engine.optimizer is basic:
        for name in names:
            yield Piece(name, basic.state.get(parameter, {}).get(name, parameter.new_empty(0)))


def _pieces_in_zero3(parameter: Any, names: Sequence[str]) -> Iterator[Piece]:
    """Each data-parallel rank holds a part of everything; the last one's runs past the end."""
    start = dist.get_rank(data_parallel_group()) * parameter.ds_tensor.numel()
    here = max(0, min(parameter.ds_tensor.numel(), parameter.ds_numel - start))
    yield Piece("", parameter.ds_tensor[:here], start)
    if names:
        yield Piece("fp32 copy", safe_get_local_fp32_param(parameter)[:here], start)
    for name in names:
        yield Piece(name, safe_get_local_optimizer_state(parameter, name)[:here], start)


def _pieces_in_partitions(parameter: Any, names: Sequence[str]) -> Iterator[Piece]:
    """ZeRO 1 and 2: a data-parallel rank holds the fragment that falls into its partition, or none."""
    nothing, fragment = parameter.new_empty(0), getattr(parameter, "_hp_mapping", None)
    start = 0 if fragment is None else fragment.lp_fragment_address.start
    if names:
        yield Piece("fp32 copy", nothing if fragment is None else fragment.hp_fragment, start)
    for name in names:
        states = {} if fragment is None else fragment.optim_fragment or {}
        yield Piece(name, states.get(name, nothing), start)


def _state_names(optimizer: Any) -> list[str]:
    """Names of what an optimizer keeps for each element of a parameter."""
    states = optimizer.state.values()
    return sorted({key for state in states for key, x in state.items() if isinstance(x, Tensor) and x.dim() > 0})


def _around(ours: Callable[..., Any], engine: Any, plain: Callable[..., Any], **options: Any) -> Callable[..., Any]:
    """A method of `engine` in place of `plain`, whose signature it shows: the HF Trainer reads it."""
    return functools.wraps(plain)(functools.partial(ours, engine, plain, **options))


def _save_16bit_model(
    engine: Any,
    plain: Callable[..., Any],
    save_dir: str | os.PathLike[str],
    save_filename: str = "pytorch_model.bin",
    exclude_frozen_parameters: bool = False,
) -> bool:
    """DeepSpeed's `save_16bit_model` with whole tensors, at every ZeRO stage: an ordinary Hugging Face checkpoint.

    Weights beyond 50 GB are split as Hugging Face splits them. A name that ends in .safetensors is written as safetensors.
    """
    export(
        engine,
        Path(save_dir),
        "engine.save_16bit_model",
        save_filename,
        "50GB",
        without_frozen=exclude_frozen_parameters,
    )
    return True


def whole_parameter(parameter: nn.Parameter, entry: ParameterEntry, groups: ParallelGroups) -> Tensor:
    """A parameter as the checkpoint has it, on this rank's device; gathers ZeRO-3's parts and the cut. Collective."""
    with deepspeed.zero.GatheredParameters([parameter], enabled=hasattr(parameter, "ds_id")):
        data = parameter.detach()
        whole = data.clone() if entry.cut is None else gather_parameter(data, entry.cut, groups.tp_group)
    return whole


def _write_local(parameter: nn.Parameter, local: Tensor) -> None:
    """This rank's part into a parameter; every rank that shares a ZeRO-3 partition calls with the same. Collective at ZeRO-3."""
    with deepspeed.zero.GatheredParameters([parameter], modifier_rank=0, enabled=hasattr(parameter, "ds_id")):
        parameter.data.copy_(local)


def export(
    engine_or_model: Any, folder: Path, what: str, weights_name: str, max_shard_size: int | str, **options: Any
) -> None:
    """`checkpoint.whole_model.export`, with parameters that ZeRO-3 may hold in parts."""
    write_whole(engine_or_model, folder, what, weights_name, max_shard_size, gather=whole_parameter, **options)
