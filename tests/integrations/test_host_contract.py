"""One test for each private name of a host that the adapters rely on; each fails, naming it, if it changed."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable
from typing import Any

import accelerate
import pytest
import transformers
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from transformers import Trainer, TrainingArguments, modeling_utils, trainer_utils
from transformers.integrations import deepspeed as hf_deepspeed
from transformers.integrations import neftune

from ds_seqpar_integrations import accelerate as accelerate_adapter
from ds_seqpar_integrations import hf_trainer


def _must(true: object, name: str, expected: str) -> None:
    versions = f"transformers {transformers.__version__}, accelerate {accelerate.__version__}"
    assert true, f"{versions} changed `{name}`: expected that {expected}"


def _plain(function: Any) -> Any:
    return inspect.unwrap(function)


def _source(function: Any) -> str:
    return inspect.getsource(_plain(function))


def _prepare_deepspeed() -> None:
    name = "Accelerator._prepare_deepspeed"
    _must(
        "_prepare_deepspeed(*args)" in _source(Accelerator.prepare), name, "prepare() calls it with what it was given"
    )
    source = _source(Accelerator._prepare_deepspeed)
    _must("deepspeed.initialize" in source, name, "it calls deepspeed.initialize by that name")
    _must("total_num_steps / self.num_processes" in source, name, "it divides a DummyScheduler's steps by all ranks")


def _ds_device_mesh() -> None:
    name = "AcceleratorState.ds_device_mesh"
    _must(
        "self.state.ds_device_mesh" in _source(Accelerator._prepare_device_mesh), name, "data loaders are shared by it"
    )
    source = _source(accelerate.data_loader.prepare_data_loader)
    _must("process_index // submesh_tp_size" in source, name, "the ranks of a group are one data-parallel rank")
    _must(isinstance(AcceleratorState._shared_state, dict), name, "the state takes attributes")


def _deepspeed_config() -> None:
    name = "DeepSpeedPlugin.deepspeed_config"
    plugin = accelerate.DeepSpeedPlugin(hf_ds_config={"zero_optimization": {"stage": 1}, "ds_seqpar": {"tp_size": 2}})
    _must(plugin.deepspeed_config is plugin.hf_ds_config.config, name, "it is the config that was read")
    _must(
        plugin.deepspeed_config.get("tensor_parallel") == {"autotp_size": 2}, name, "it was translated when it was read"
    )


def _seed_worker() -> None:
    name = "trainer_utils.seed_worker"
    parameters = list(inspect.signature(trainer_utils.seed_worker).parameters)
    _must(parameters == ["worker_id", "num_workers", "rank"], name, f"it takes these, not {parameters}")
    _must(
        "partial(\n                    seed_worker, num_workers=self.args.dataloader_num_workers, rank=self.args.process_index"
        in _source(Trainer._get_dataloader),
        name,
        "a loader's worker_init_fn is a partial of it with the rank of the process",
    )


def _zero3_enabled() -> None:
    name = "modeling_utils.is_deepspeed_zero3_enabled"
    for function in (modeling_utils.PreTrainedModel._from_config, modeling_utils.PreTrainedModel.get_init_context):
        code = _plain(getattr(function, "__func__", function)).__code__
        _must("is_deepspeed_zero3_enabled" in code.co_names, name, f"{code.co_name} asks it before zero.Init")
    config = hf_deepspeed.HfDeepSpeedConfig({"zero_optimization": {"stage": 3}})
    _must(modeling_utils.is_deepspeed_zero3_enabled(), name, "it is true at stage 3 without the key")
    config = hf_deepspeed.HfDeepSpeedConfig({"zero_optimization": {"stage": 3}, "ds_seqpar": {"tp_size": 2}})
    _must(not modeling_utils.is_deepspeed_zero3_enabled(), name, "with the key models are built whole")
    _must(hf_deepspeed.is_deepspeed_zero3_enabled() and config.is_zero3(), name, "everything else still sees stage 3")
    hf_deepspeed.unset_hf_deepspeed_config()


def _process_config() -> None:
    name = "HfTrainerDeepSpeedConfig.trainer_config_process"
    parameters = list(inspect.signature(hf_deepspeed.HfTrainerDeepSpeedConfig.trainer_config_process).parameters)
    _must(parameters == ["self", "args", "auto_find_batch_size"], name, f"it takes these, not {parameters}")
    source = _source(hf_deepspeed.HfTrainerDeepSpeedConfig.trainer_config_process)
    _must("args.world_size * args.per_device_train_batch_size" in source, name, "it counts the batch over all ranks")


def _track_tokens() -> None:
    name = "Trainer._track_num_input_tokens"
    source = _source(Trainer._track_num_input_tokens)
    added = "self.state.num_input_tokens_seen += self.accelerator.gather(input_tokens).sum()"
    _must(added in source, name, "it adds what Accelerator.gather brings, each data-parallel rank once")
    _must(
        "distributed_broadcast_scalars([self.current_flos]" in _source(Trainer.store_flos),
        "Trainer.store_flos",
        "so do FLOPs",
    )


def _num_items() -> None:
    name = "Trainer._get_num_items_in_batch"
    source = _source(Trainer._get_num_items_in_batch)
    summed = "if self.args.average_tokens_across_devices:\n                if self.args.world_size > 1:"
    _must(
        summed in source and "self.accelerator.gather(num_items_in_batch" in source,
        name,
        "it sums what Accelerator.gather brings",
    )
    loss = _source(Trainer.compute_loss)
    _must(
        ("self.get_tp_size()" in source) == ("self.accelerator.num_processes // self.get_tp_size()" in loss),
        name,
        "the loss is multiplied by all ranks, or by all over tp_size where the count was divided by it",
    )
    _must("loss *= loss_scale if self.args.n_gpu <= 1 else self.args.n_gpu" in loss, name, "the loss is multiplied")


def _hf_config() -> None:
    name = "TrainingArguments.hf_deepspeed_config"
    _must(
        'getattr(self.args, "hf_deepspeed_config", None)' in _source(Trainer.get_tp_size),
        name,
        "get_tp_size() reads it",
    )
    _must("self.hf_deepspeed_config = " in _source(TrainingArguments.__post_init__), name, "deepspeed= sets it")


def _speed_metrics() -> None:
    name = "trainer.speed_metrics"
    for function in (Trainer.evaluate, Trainer.predict):
        source = _source(function)
        _must("total_batch_size = self.args.eval_batch_size * self.args.world_size" in source, name, "all ranks count")
        _must(
            "speed_metrics(\n" in source and "num_steps=math.ceil(output.num_samples / total_batch_size)" in source,
            name,
            "so",
        )


def _neftune() -> None:
    name = "neftune.neftune_post_forward_hook"
    _must("register_forward_hook(neftune_post_forward_hook)" in _source(neftune.activate_neftune), name, "it is a hook")
    source = _source(neftune.neftune_post_forward_hook)
    _must("output.size(1) * output.size(2)" in source, name, "the noise is scaled by the shape of the output")
    _must("output + torch.zeros_like(output)" in source, name, "it is added to the output")


CONTRACT: dict[str, Callable[[], None]] = {
    "Accelerator._prepare_deepspeed": _prepare_deepspeed,
    "AcceleratorState.ds_device_mesh": _ds_device_mesh,
    "DeepSpeedPlugin.deepspeed_config": _deepspeed_config,
    "trainer_utils.seed_worker": _seed_worker,
    "modeling_utils.is_deepspeed_zero3_enabled": _zero3_enabled,
    "HfTrainerDeepSpeedConfig.trainer_config_process": _process_config,
    "Trainer._track_num_input_tokens": _track_tokens,
    "Trainer._get_num_items_in_batch": _num_items,
    "trainer.speed_metrics": _speed_metrics,
    "TrainingArguments.hf_deepspeed_config": _hf_config,
    "neftune.neftune_post_forward_hook": _neftune,
}


@pytest.mark.parametrize("name", CONTRACT)
def test_a_host_still_keeps(name: str) -> None:
    CONTRACT[name]()


def test_every_private_name_of_the_adapters_has_a_test() -> None:
    listed = [
        name
        for adapter in (accelerate_adapter, hf_trainer)
        for name in re.findall(r"`([^`]+)`", (adapter.__doc__ or "").partition("Private names")[2])
    ]
    assert sorted(listed) == sorted(CONTRACT)
