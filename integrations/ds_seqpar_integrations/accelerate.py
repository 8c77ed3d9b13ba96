"""accelerate: the key is translated when the DeepSpeed config is read, so that everything built from it knows tp_size.

DeepSpeed's `tensor_parallel.autotp_size` already makes accelerate give the ranks of a tensor-parallel group the same batches
of a map-style data set. What it leaves wrong is put right here: batch sizes counted over all ranks, iterable data sets, random
numbers of collators and workers, metrics gathered with copies, schedulers stepped once a rank, state dicts.

Private names it relies on, each held by a contract test:
`Accelerator._prepare_deepspeed`, `AcceleratorState.ds_device_mesh`, `DeepSpeedPlugin.deepspeed_config`, `trainer_utils.seed_worker`.
"""

from __future__ import annotations

import contextvars
import inspect
import math
from collections.abc import Callable, Mapping
from typing import Any

import torch.distributed as dist
from accelerate import Accelerator
from accelerate.scheduler import AcceleratedScheduler
from accelerate.state import AcceleratorState, is_initialized
from accelerate.utils import DistributedType, DummyScheduler, DynamoBackend, recursively_apply
from accelerate.utils.deepspeed import HfDeepSpeedConfig

import ds_seqpar
from ds_seqpar.checkpoint.export import saved_state_dict
from ds_seqpar.config import KEY, SeqParConfig
from ds_seqpar.errors import ConfigError
from ds_seqpar.inject import report_of

from . import data_parallel
from .wrapping import wrap

__all__ = ["ONLY_WHAT_IS_SAVED", "WHEN_ON", "install", "is_on", "tp_size_now", "tp_size_of", "translate"]

WHEN_ON: list[Callable[[], None]] = []
"""Called whenever a config with the key was read, and when an Accelerator with one was made: hosts that were imported late."""


def install() -> None:
    """Adapts accelerate. Idempotent."""
    wrap(HfDeepSpeedConfig, "__init__", _read_config)
    wrap(Accelerator, "__init__", _make_accelerator)
    wrap(Accelerator, "_prepare_deepspeed", _prepare_deepspeed)
    wrap(Accelerator, "prepare_data_loader", _prepare_data_loader)
    wrap(Accelerator, "gather", _gather)
    wrap(Accelerator, "reduce", _reduce)
    wrap(Accelerator, "gather_for_metrics", _gather_for_metrics)
    wrap(Accelerator, "get_state_dict", _get_state_dict)
    wrap(AcceleratedScheduler, "step", _step_scheduler)
    if is_initialized() and _untranslated(getattr(AcceleratorState(), "deepspeed_plugin", None)):
        raise ConfigError(f'a DeepSpeed config with "{KEY}" was read before ds_seqpar was imported; {_IMPORT_FIRST}')


_IMPORT_FIRST = (
    "import ds_seqpar before TrainingArguments, Accelerator or DeepSpeedPlugin is made, or start the script with "
    "--module ds_seqpar.run"
)


def is_on(config: Mapping[str, Any] | None) -> bool:
    """True if a DeepSpeed config holds the key, and enabled."""
    return config is not None and KEY in config and SeqParConfig.from_json(config[KEY]).enabled


def tp_size_of(config: Mapping[str, Any] | None) -> int:
    """`tp_size` of a DeepSpeed config; 1 if the key is not on."""
    return SeqParConfig.from_json(config[KEY]).tp_size if config is not None and is_on(config) else 1


def tp_size_now() -> int:
    """`tp_size` of the DeepSpeed config that accelerate runs with; 1 if there is none, or the key is not on."""
    if not is_initialized():
        return 1
    return tp_size_of(getattr(getattr(AcceleratorState(), "deepspeed_plugin", None), "deepspeed_config", None))


def translate(config: dict[str, Any]) -> None:
    """Makes a DeepSpeed config tell accelerate and transformers about tensor parallelism, in place.

    Raises:
        ConfigError: the key is wrong, or contradicts `tensor_parallel.autotp_size` or the number of ranks.
    """
    tp_size = tp_size_of(config)
    if tp_size == 1:
        return
    ranks = dist.get_world_size() if dist.is_initialized() else 0
    if ranks % tp_size:
        raise ConfigError(
            f'"{KEY}.tp_size": {tp_size} does not divide the {ranks} ranks of this run; use a divisor of {ranks}'
        )
    section = config.setdefault("tensor_parallel", {})
    if section.get("autotp_size", 0) not in (0, 1, tp_size):
        raise ConfigError(
            f'"tensor_parallel.autotp_size": {section["autotp_size"]} and "{KEY}.tp_size": {tp_size} contradict each other; '
            "remove autotp_size"
        )
    section["autotp_size"] = tp_size
    if (
        config.get("train_batch_size") == "auto"
    ):  # it would be filled in with all ranks instead of the data-parallel ones
        del config["train_batch_size"]


def _untranslated(plugin: Any) -> bool:
    config = getattr(plugin, "deepspeed_config", None) or {}
    return tp_size_of(config) > 1 and config.get("tensor_parallel", {}).get("autotp_size") != tp_size_of(config)


def _read_config(plain: Callable[..., None], self: Any, *args: Any, **kwargs: Any) -> None:
    plain(self, *args, **kwargs)
    translate(self.config)
    _tell(self.config)


def _tell(config: Mapping[str, Any] | None) -> None:
    if tp_size_of(config) > 1:
        for adapt in WHEN_ON:
            adapt()


def _make_accelerator(plain: Callable[..., None], self: Any, *args: Any, **kwargs: Any) -> None:
    """accelerate silently leaves DeepSpeed out where it was told to stay on the CPU."""
    plain(self, *args, **kwargs)
    plugin = inspect.signature(plain).bind(self, *args, **kwargs).arguments.get("deepspeed_plugin")
    plugins = plugin.values() if isinstance(plugin, dict) else [plugin]
    if self.distributed_type is not DistributedType.DEEPSPEED and any(
        is_on(getattr(p, "deepspeed_config", None)) for p in plugins
    ):
        raise ConfigError(
            f'the DeepSpeed config holds "{KEY}", but accelerate runs without DeepSpeed ({self.distributed_type}); start the script '
            "with a launcher (deepspeed, torchrun, accelerate launch), and unset ACCELERATE_USE_CPU or Accelerator(cpu=True)"
        )
    _tell(getattr(getattr(self.state, "deepspeed_plugin", None), "deepspeed_config", None))


def _tp_size(accelerator: Accelerator) -> int:
    plugin = getattr(accelerator.state, "deepspeed_plugin", None)
    return tp_size_of(getattr(plugin, "deepspeed_config", None))


def _prepare_deepspeed(plain: Callable[..., Any], self: Accelerator, *args: Any) -> Any:
    if _untranslated(self.state.deepspeed_plugin):
        raise ConfigError(f'the DeepSpeed config got "{KEY}" after it was read; {_IMPORT_FIRST}')
    tp_size = _tp_size(self)
    if self.num_processes % tp_size:
        raise ConfigError(
            f'"{KEY}.tp_size": {tp_size} does not divide the {self.num_processes} processes that accelerate knows of; start more with '
            "a launcher (deepspeed, torchrun, accelerate launch), and without a GPU make PartialState(cpu=True) first"
        )
    if is_on(self.deepspeed_plugin.deepspeed_config) and self.state.dynamo_plugin.backend != DynamoBackend.NO:
        raise ConfigError(
            f'torch_compile ({self.state.dynamo_plugin.backend}) cannot follow the sharded layers of "{KEY}"; set torch_compile=False, '
            "or dynamo_backend: NO in the accelerate config"
        )
    dummies = [x for x in args if isinstance(x, DummyScheduler) and x.total_num_steps is not None]
    for dummy in dummies:  # accelerate divides them by all ranks, but only the data-parallel ones share the steps
        dummy.total_num_steps *= tp_size
    try:
        return plain(self, *args)
    finally:
        for dummy in dummies:
            dummy.total_num_steps //= tp_size


def _prepare_data_loader(
    plain: Callable[..., Any], self: Accelerator, data_loader: Any, *args: Any, **kwargs: Any
) -> Any:
    tp_size = _tp_size(self)
    if tp_size == 1:
        return plain(self, data_loader, *args, **kwargs)
    if self.dispatch_batches:
        raise ConfigError(
            f'dispatch_batches=True hands every rank the same batch under "{KEY}"; leave it out: each rank then reads the data '
            "set itself and keeps its data-parallel share"
        )
    if not hasattr(self.state, "ds_device_mesh"):
        from torch.distributed.device_mesh import init_device_mesh

        self.state.ds_device_mesh = init_device_mesh(self.device.type, (tp_size,), mesh_dim_names=("tp",))
    data_parallel.draw_alike(data_loader, tp_size)
    self.dataloader_config.dispatch_batches, asked = False, self.dispatch_batches
    try:
        return plain(self, data_loader, *args, **kwargs)
    finally:
        self.dataloader_config.dispatch_batches = asked


def _gather(plain: Callable[..., Any], self: Accelerator, tensor: Any) -> Any:
    tp_size = _tp_size(self)
    return plain(self, tensor) if tp_size == 1 else data_parallel.gather(tensor, tp_size)


def _reduce(
    plain: Callable[..., Any], self: Accelerator, tensor: Any, reduction: str = "sum", scale: float = 1.0
) -> Any:
    """`scale` is for XLA alone."""
    tp_size = _tp_size(self)
    if tp_size == 1 or reduction == "none":
        return plain(self, tensor, reduction, scale)
    return data_parallel.reduce(tensor, tp_size, reduction)


def _gather_for_metrics(
    plain: Callable[..., Any], self: Accelerator, input_data: Any, use_gather_object: bool = False
) -> Any:
    """Tensors go through `gather`; objects are gathered over all ranks, and only one of each group hands its own in."""
    tp_size = _tp_size(self)
    if tp_size > 1 and (use_gather_object or not _holds_tensors_only(input_data)):
        return plain(self, input_data if self.process_index % tp_size == 0 else [], True)
    return plain(self, input_data, use_gather_object)


def _holds_tensors_only(data: Any) -> bool:
    try:
        recursively_apply(lambda x: x, data, error_on_other_type=True)
    except TypeError:
        return False
    return True


ONLY_WHAT_IS_SAVED: contextvars.ContextVar[bool] = contextvars.ContextVar(
    "state dicts are for save_pretrained", default=False
)
"""True while a host asks for a state dict only to save it: then a frozen base under adapters stays where it is."""


def _get_state_dict(plain: Callable[..., Any], self: Accelerator, model: Any, *args: Any, **kwargs: Any) -> Any:
    if report_of(getattr(model, "module", model)) is None:
        return plain(self, model, *args, **kwargs)
    return saved_state_dict(model) if ONLY_WHAT_IS_SAVED.get() else ds_seqpar.full_state_dict(model)


def _step_scheduler(plain: Callable[..., Any], self: Any, *args: Any, **kwargs: Any) -> Any:
    """accelerate steps once for each rank, because that many batches were taken; under the key, for each data-parallel rank."""
    state, tp_size = AcceleratorState(), tp_size_now()
    if tp_size == 1 or self.split_batches or not (self.step_with_optimizer and self.gradient_state.sync_gradients):
        return plain(self, *args, **kwargs)
    self.split_batches = True  # one step a call
    try:
        for _ in range(state.num_processes // tp_size):
            if self.scheduler._step_count <= getattr(self.scheduler, "total_steps", math.inf):
                plain(self, *args, **kwargs)
    finally:
        self.split_batches = False
