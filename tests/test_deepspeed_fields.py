"""Every field of the installed DeepSpeed's config is right beside the key, or refused by name."""

from __future__ import annotations

from collections.abc import KeysView
from typing import Any

import deepspeed
import exactness
import pytest
import torch
from deepspeed.runtime import config as deepspeed_config
from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
from models import tiny
from ranks import run_ranks

from ds_seqpar import ConfigError, SeqParConfig
from ds_seqpar.deepspeed_fields import REFUSED, RIGHT, ZERO_REFUSED, ZERO_RIGHT, unknown_fields
from ds_seqpar.translation import translated


class _Asked(dict[str, Any]):
    """A config that notes which fields DeepSpeed asks it for."""

    def __init__(self, **fields: Any) -> None:
        super().__init__(**fields)
        self.names: set[str] = set()

    def get(self, name: str, default: Any = None) -> Any:
        self.names.add(name)
        return super().get(name, default)

    def __contains__(self, name: object) -> bool:
        self.names.add(str(name))
        return super().__contains__(name)

    def keys(self) -> KeysView[str]:
        return KeysView(self)

    def __copy__(self) -> _Asked:
        return self


def test_every_field_of_deepspeed_is_in_the_table() -> None:
    asked = _Asked(train_micro_batch_size_per_gpu=1)
    deepspeed_config.DeepSpeedConfig(asked)
    missing = unknown_fields(dict.fromkeys(sorted(asked.names)), "ds_seqpar")
    zero = {field.alias or name: None for name, field in DeepSpeedZeroConfig.model_fields.items()}
    missing += unknown_fields({"zero_optimization": zero}, "ds_seqpar")
    assert not missing, f"DeepSpeed {deepspeed.__version__} has config fields that ds_seqpar/deepspeed_fields.py lacks: {missing}"
    assert {"optimizer", "flops_profiler", "zero_optimization", "autotuning", "compile"} <= asked.names
    assert not RIGHT.keys() & REFUSED.keys() and not ZERO_RIGHT.keys() & ZERO_REFUSED.keys()


ON: dict[str, Any] = {
    "gradient_allreduce_op": "sum",
    "pipeline": {"stages": 2},
    "use_data_before_expert_parallelism": True,
    "activation_checkpointing": {"partition_activations": True},
    "compile": {"deepcompile": True},
    "weight_quantization": {"quantized_initialization": {"num_bits": 8}},
    "datastates_ckpt": {"host_cache_size": 16},
    "sparse_gradients": True,
    "zero_hpz_partition_size": 2,
    "mics_shard_size": 2,
    "zenflow": {"topk_ratio": 0.1},
    "offload_optimizer": {"device": "cpu", "super_offload": True},
}
OFF: dict[str, Any] = {
    "gradient_allreduce_op": "mean",
    "activation_checkpointing": {"partition_activations": False},
    "compile": {"deepcompile": False},
    "zero_hpz_partition_size": 1,
    "mics_shard_size": -1,
    "zenflow": None,
    "offload_optimizer": {"device": "cpu"},
}
BOOLS = ("graph_harvesting", "mics_hierarchical_params_gather", "zeropp_loco_param", "elastic_checkpoint", "legacy_stage1")


def _config(name: str, value: Any, zero: bool) -> dict[str, Any]:
    field = {name: value}
    return {"train_micro_batch_size_per_gpu": 1, **({"zero_optimization": {"stage": 3, **field}} if zero else field)}


@pytest.mark.parametrize(("name", "zero"), [*((n, False) for n in REFUSED), *((n, True) for n in ZERO_REFUSED)])
def test_what_is_refused_is_refused_only_when_it_is_on(name: str, zero: bool) -> None:
    on = ON.get(name, True if name in BOOLS or name.startswith(("zero_", "pipeline_")) else {"enabled": True})
    field = f"zero_optimization.{name}" if zero else name
    with pytest.raises(ConfigError, match=f'"{field}": .*; (remove|set|use|shorten) ') as error:
        translated(_config(name, on, zero), SeqParConfig(tp_size=2), 2, 0.0)
    assert repr(on) in str(error.value)
    whole = name in ("compression_training", "sparse_attention")  # no "enabled" of its own
    off = OFF.get(name, {"enabled": False} if on == {"enabled": True} and not whole else {})
    translated(_config(name, off, zero), SeqParConfig(tp_size=2), 2, 0.0)


def test_an_unknown_field_is_named() -> None:
    config = {"zero_optimisation": {}, "zero_optimization": {"stage": 1, "prefetch_bucket_size": 9, "warp": 1}}
    assert unknown_fields({**config, "ds_seqpar": {}}, "ds_seqpar") == ["zero_optimisation", "zero_optimization.warp"]


def _zero(stage: int, **fields: Any) -> dict[str, Any]:
    return {"zero_optimization": {"stage": stage, **fields}}


def _compile() -> str:
    model = tiny("llama")
    engine = exactness.engine_for(model, torch.optim.SGD(model.parameters(), lr=0.1), {"tp_size": 2}, 1, 1, 1)
    with pytest.raises(ConfigError) as error:
        engine.compile()
    engine.destroy()
    return str(error.value)


def test_compiling_the_engine_is_refused() -> None:
    for message in run_ranks(2, _compile):
        assert "engine.compile()" in message and "leave the call out" in message


SMALL = dict(reduce_bucket_size=700, allgather_bucket_size=500)
FAST: dict[str, dict[str, Any]] = {
    "buckets": _zero(2, contiguous_gradients=True, overlap_comm=True, **SMALL),
    "round robin": _zero(2, round_robin_gradients=True, contiguous_gradients=False, **SMALL),
    "prescaled": {"prescale_gradients": True, "gradient_predivide_factor": 2.0, **_zero(0)},
    "fetching": _zero(
        3, stage3_prefetch_bucket_size=300, stage3_param_persistence_threshold=60, stage3_max_live_parameters=900,
        stage3_max_reuse_distance=100, reduce_bucket_size=9000,
    ),
}  # fmt: skip
SLOW: dict[str, dict[str, Any]] = {
    "no scatter": _zero(2, reduce_scatter=False, allgather_partitions=False),
    "stage 1 buckets": _zero(1, overlap_comm=False, **SMALL),
    "alignment": _zero(1, parameter_alignment=True),
    "no norm": _zero(1, compute_grad_norm=False),
    "all-reduce fetch": _zero(3, stage3_use_all_reduce_for_fetch_params=True),
    "sequential": _zero(3, stage3_allgather_sequential=True, stage3_module_granularity_threshold=900),
    "offload": _zero(2, offload_optimizer={"device": "cpu"}),
    "offload 3": _zero(3, offload_optimizer={"device": "cpu"}, offload_param={"device": "cpu"}),
    "types": {"data_types": {"grad_accum_dtype": "fp32"}, "communication_data_type": "fp32", **_zero(1)},
    "logs": {"wall_clock_breakdown": True, "dump_state": True, "comms_logger": {"enabled": True}, **_zero(1)},
}


def _step(fields: dict[str, Any]) -> dict[str, float]:
    plain = exactness.engine_for
    exactness.engine_for = lambda *args, **more: plain(*args, **{**more, **fields})
    try:
        return exactness.compare_sgd("llama", 2, fields["zero_optimization"]["stage"])
    finally:
        exactness.engine_for = plain


def _steps(cases: dict[str, dict[str, Any]]) -> dict[str, dict[str, float]]:
    return {case: _step(fields) for case, fields in cases.items()}


@pytest.mark.parametrize(
    ("cases", "world"), [(FAST, 2), pytest.param({**FAST, **SLOW}, 4, marks=pytest.mark.slow)], ids=["two", "four"]
)
def test_fields_that_could_matter_leave_the_step_exact(cases: dict[str, dict[str, Any]], world: int) -> None:
    for errors in run_ranks(world, _steps, cases):
        for case, found in errors.items():
            wrong = {name: error for name, error in found.items() if not error < 2e-4}
            assert not wrong, f"{case}: {wrong}"
