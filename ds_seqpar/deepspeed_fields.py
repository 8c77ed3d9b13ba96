"""Every field of DeepSpeed's config, and whether a run with the key may use it: data, no deepspeed.

A field is right beside the key, for the reason given here, or it is refused when it is on. tests/test_deepspeed_fields.py holds the table
against the installed DeepSpeed, and steps under what could matter against the unsharded run.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

__all__ = ["REFUSED", "RIGHT", "ZERO_REFUSED", "ZERO_RIGHT", "Refusal", "refusal", "unknown_fields"]

ZERO = "zero_optimization"


def _enabled(value: Any) -> bool:
    """A section that is switched by its "enabled"; some fields were a plain flag once."""
    return bool(value.get("enabled", False)) if isinstance(value, Mapping) else bool(value)


def _asks(name: str, *of: str) -> Callable[[Any], bool]:
    """Whether a section sets `name` to something that is on, or, given `of`, to one of these."""
    return lambda value: isinstance(value, Mapping) and (value.get(name) in of if of else bool(value.get(name)))


@dataclass(frozen=True)
class Refusal:
    """A field that cannot be beside the key when `on(value)`; `why` it cannot, and the `way_out`."""

    why: str
    way_out: str
    on: Callable[[Any], bool] = bool


_TESTED = "compared with the unsharded run"
_LOGS = "reports only"
_BATCHES = "translated to the data-parallel size"
_STEP = "acts on each rank's own part, or over the data-parallel ranks alone"
_FILES = "how files are written"
_DTYPE = "rounding only"
_FETCH = "when and in what pieces ZeRO 3 fetches a parameter from the data-parallel ranks"
_OWN_RANKS = "makes groups or parts of its own, over ranks that hold different parts of the weights"
_REMOVED = "is not supported together with the key, and DeepSpeed has removed it"
_UNCHECKED = "has not been checked to train the same model when weights are in parts"
_REMOVE = "remove it"

RIGHT: dict[str, str] = {
    "train_batch_size": _BATCHES,
    "train_micro_batch_size_per_gpu": _BATCHES,
    "gradient_accumulation_steps": _BATCHES,
    "managed_gradient_accumulation": _TESTED,
    "optimizer": _STEP,
    "scheduler": "learning rates alone",
    "fp16": _TESTED,
    "bf16": _TESTED,
    "bfloat16": _TESTED,
    "torch_autocast": _TESTED,
    "data_types": _DTYPE,
    "communication_data_type": _DTYPE,
    "seq_parallel_communication_data_type": "of Ulysses alone",
    "gradient_clipping": _TESTED,
    "prescale_gradients": _TESTED,
    "gradient_predivide_factor": _TESTED,
    "disable_allgather": "read, and used nowhere in training",
    "zero_optimization": "field by field below",
    "zero_allow_untested_optimizer": "lifts a check",
    "zero_force_ds_cpu_optimizer": "lifts a check",
    "tensor_parallel": "written by us",
    "sequence_parallel_size": "refused where it is translated",
    "timers": _LOGS,
    "steps_per_print": _LOGS,
    "dump_state": _LOGS,
    "wall_clock_breakdown": _LOGS,
    "memory_breakdown": _LOGS,
    "log_level": _LOGS,
    "comms_logger": _LOGS,
    "flops_profiler": _LOGS,
    "tensorboard": _LOGS,
    "wandb": _LOGS,
    "csv_monitor": _LOGS,
    "comet": _LOGS,
    "vocabulary_size": _LOGS,
    "disable_python_gc": "when Python collects garbage",
    "checkpoint": _FILES,
    "aio": _FILES,
    "dataloader_drop_last": "the last batch of an epoch",
}

REFUSED: dict[str, Refusal] = {
    "gradient_allreduce_op": Refusal(_UNCHECKED, 'use "mean", the default', lambda value: value not in (None, "mean")),
    "pipeline": Refusal("is of a model cut into stages", _REMOVE),
    "expert_parallel": Refusal(_OWN_RANKS, _REMOVE, _enabled),
    "use_data_before_expert_parallelism": Refusal(_OWN_RANKS, _REMOVE),
    "activation_checkpointing": Refusal(
        'with "partition_activations" cuts activations that are cut already',
        'remove "partition_activations"; "recompute" of the key saves memory',
        _asks("partition_activations"),
    ),
    "autotuning": Refusal("tries configs of its own without the key's meaning", _REMOVE, _enabled),
    "hybrid_engine": Refusal("puts layers of its own over the sharded ones", _REMOVE, _enabled),
    "data_efficiency": Refusal(
        "drops tokens or draws batches by ranks that hold one batch together", _REMOVE, _enabled
    ),
    "compile": Refusal(
        'with "deepcompile" compiles the model, and the sharded layers cannot be followed',
        'set "deepcompile": false',
        _asks("deepcompile"),
    ),
    "weight_quantization": Refusal("changes what weights hold", _REMOVE),
    "datastates_ckpt": Refusal(_UNCHECKED, _REMOVE),
    "nebula": Refusal(_REMOVED, _REMOVE, _enabled),
    "amp": Refusal(_REMOVED, 'use "bf16"', _enabled),
    "compression_training": Refusal(_REMOVED, _REMOVE),
    "quantize_training": Refusal(_REMOVED, _REMOVE, _enabled),
    "sparse_gradients": Refusal("sends rows of a vocabulary that is cut", _REMOVE),
    "sparse_attention": Refusal(_REMOVED, _REMOVE),
    "eigenvalue": Refusal(_REMOVED, _REMOVE, _enabled),
    "elasticity": Refusal(_REMOVED, _REMOVE, _enabled),
    "graph_harvesting": Refusal(_REMOVED, _REMOVE),
    "curriculum_learning": Refusal(_REMOVED, "shorten the batches in your data loader", _enabled),
    "progressive_layer_drop": Refusal(_REMOVED, _REMOVE, _enabled),
}

ZERO_RIGHT: dict[str, str] = {
    "stage": _TESTED,
    "contiguous_gradients": _TESTED,
    "reduce_scatter": _TESTED,
    "reduce_bucket_size": _TESTED,
    "use_multi_rank_bucket_allreduce": _STEP,
    "allgather_partitions": _TESTED,
    "allgather_bucket_size": _TESTED,
    "overlap_comm": _TESTED,
    "compute_grad_norm": _TESTED,
    "load_from_fp32_weights": _FILES,
    "offload_param": _STEP,
    "cpu_offload_param": "an old name of offload_param",
    "cpu_offload_use_pin_memory": "an old name of a field of offload_param",
    "cpu_offload": "an old name of offload_optimizer",
    "sub_group_size": _TESTED,
    "stage3_prefetch_bucket_size": _FETCH,
    "stage3_param_persistence_threshold": _FETCH,
    "stage3_model_persistence_threshold": _FETCH,
    "stage3_max_live_parameters": _FETCH,
    "stage3_max_reuse_distance": _FETCH,
    "stage3_module_granularity_threshold": _FETCH,
    "stage3_use_all_reduce_for_fetch_params": _TESTED,
    "stage3_allgather_sequential": _TESTED,
    "stage3_gather_16bit_weights_on_model_save": _FILES,
    "stage3_gather_fp16_weights_on_model_save": _FILES,
    "ignore_unused_parameters": "lifts a check",
    "round_robin_gradients": _TESTED,
    "parameter_alignment": _TESTED,
    "memory_efficient_linear": "of linear layers that are not sharded",
    "override_module_apply": "how weights are initialised before the engine",
    "log_trace_cache_warnings": _LOGS,
    "enable_sanity_checks": "adds checks",
    "save_muon_momentum_buffer_in_memory": _STEP,
    "leaf_module": _FETCH,
}

_QUANTIZED = Refusal("sends rounded values through groups of its own, and the step is no longer exact", _REMOVE)

ZERO_REFUSED: dict[str, Refusal] = {
    "zero_hpz_partition_size": Refusal(
        "keeps second copies over consecutive ranks, which here hold different parts of the weights",
        "set it to 1",
        lambda value: value not in (None, 0, 1),
    ),
    "zero_quantized_weights": _QUANTIZED,
    "zero_quantized_nontrainable_weights": _QUANTIZED,
    "zero_quantized_gradients": _QUANTIZED,
    "zeropp_loco_param": _QUANTIZED,
    "mics_shard_size": Refusal(_OWN_RANKS, _REMOVE, lambda value: isinstance(value, int) and value > 0),
    "mics_hierarchical_params_gather": Refusal(_OWN_RANKS, _REMOVE),
    "zenflow": Refusal(_UNCHECKED, _REMOVE, lambda value: value is not None),
    "offload_optimizer": Refusal(
        'with "super_offload" takes an optimizer of its own', 'set "super_offload": false', _asks("super_offload")
    ),
    "elastic_checkpoint": Refusal(_UNCHECKED, _REMOVE),
    "legacy_stage1": Refusal(_UNCHECKED, _REMOVE),
    "pipeline_loading_checkpoint": Refusal("is of a model cut into stages", _REMOVE),
}


def refusal(ds_config: Mapping[str, Any], key: str) -> str | None:
    """What of the config cannot be beside `key`: the field, its value and the way out; None if all can."""
    zero = ds_config.get(ZERO)
    for prefix, section, refused in (
        ("", ds_config, REFUSED),
        (f"{ZERO}.", zero if isinstance(zero, Mapping) else {}, ZERO_REFUSED),
    ):
        for name, rule in refused.items():
            if name in section and rule.on(section[name]):
                return f'"{prefix}{name}": {section[name]!r} cannot be combined with "{key}": it {rule.why}; {rule.way_out}'
    return None


def unknown_fields(ds_config: Mapping[str, Any], key: str) -> list[str]:
    """The fields that the table does not know: of a DeepSpeed newer than it, or misspelt."""
    zero = ds_config.get(ZERO)
    zero_known = ZERO_RIGHT.keys() | ZERO_REFUSED.keys()
    unknown = [name for name in ds_config if name != key and name not in RIGHT and name not in REFUSED]
    names = zero if isinstance(zero, Mapping) else {}
    return unknown + [f"{ZERO}.{n}" for n in names if n not in zero_known and f"stage3_{n}" not in zero_known]
