"""The names of DeepSpeed, transformers and torch that the checkpoints rely on and that nobody promises: each is named if it goes."""

from __future__ import annotations

import inspect
import os
from pathlib import Path

import deepspeed
import pytest
import torch
from deepspeed.checkpoint import constants, universal_checkpoint
from deepspeed.checkpoint.affine import AFFINE_MAP_FORMAT_VERSION
from deepspeed.comm import comm
from deepspeed.ops.adam import DeepSpeedCPUAdam
from deepspeed.runtime.fp16.fused_optimizer import FP16_Optimizer
from deepspeed.runtime.fp16.unfused_optimizer import FP16_UnfusedOptimizer
from ranks import run_ranks
from training import engine_at
from transformers import PreTrainedModel, core_model_loading
from transformers.integrations import deepspeed as hf_deepspeed

from ds_seqpar.checkpoint.resume import safe_reading


def test_deepspeed_saves_through_one_writer_and_copies_one_script() -> None:
    save = inspect.getsource(deepspeed.DeepSpeedEngine._save_zero_checkpoint)
    assert "self.checkpoint_engine.save(" in save and "self._copy_recovery_script(" in save
    assert "self.checkpoint_engine.save(" in inspect.getsource(deepspeed.DeepSpeedEngine._save_checkpoint)
    assert "UNIVERSAL_CHECKPOINT_INFO" in inspect.getsource(deepspeed.DeepSpeedEngine._save_checkpoint)


def test_deepspeed_waits_in_a_save_or_load_by_the_names_that_are_replaced() -> None:
    save = inspect.getsource(deepspeed.DeepSpeedEngine.save_checkpoint)
    assert "dist.barrier()" in save and vars(inspect.getmodule(deepspeed.DeepSpeedEngine))["dist"] is deepspeed.comm
    assert "self._checkpoint_tag_validation(tag)" in save and "self.optimizer.checkpoint_event_epilogue()" in save
    assert list(inspect.signature(deepspeed.DeepSpeedEngine._checkpoint_tag_validation).parameters) == ["self", "tag"]
    load = inspect.getsource(deepspeed.DeepSpeedEngine.load_checkpoint)
    assert "self.optimizer.checkpoint_event_epilogue()" in load and "self.optimizer.update_lp_params()" in load
    assert "self.load_module_state_dict(" in inspect.getsource(deepspeed.DeepSpeedEngine._load_checkpoint)


def test_deepspeed_loads_weights_alone_by_the_names_that_are_replaced() -> None:
    load = inspect.getsource(deepspeed.DeepSpeedEngine.load_checkpoint)
    assert "success = self._load_zero_checkpoint(" in load and "self.optimizer._restore_from_bit16_weights()" in load
    source = inspect.getsource(deepspeed.DeepSpeedEngine._load_checkpoint)
    assert "zero_optimization_partition_weights() and not load_optimizer_states and not self.has_moe_layers:" in source
    assert "FROZEN_PARAM_FRAGMENTS" in inspect.getsource(deepspeed.DeepSpeedEngine.load_module_state_dict)
    assert constants.FROZEN_PARAM_FRAGMENTS == "frozen_param_fragments" and constants.PARAM_SHAPES == "param_shapes"


def test_deepspeed_says_which_parameters_lie_in_its_buffers_and_in_which_order() -> None:
    source = inspect.getsource(deepspeed.DeepSpeedEngine._get_zero_param_shapes)
    assert "round_robin_bit16_groups" in source and "param_group_shapes.append(param_shapes)" in source


def _collectives_of_a_save_and_a_load(folder: str, stage: int) -> list[str]:
    """What DeepSpeed asks of its own groups in both, on two tensor-parallel groups."""
    engine, backend, asked = engine_at("llama", 2, stage, zero_optimization={"stage": stage}), comm.cdb, []
    for name in (
        "barrier",
        "all_reduce",
        "all_gather",
        "all_gather_into_tensor",
        "all_to_all_single",
        "broadcast",
        "recv",
    ):
        plain = getattr(backend, name)
        setattr(backend, name, lambda *a, name=name, plain=plain, **k: (asked.append(name), plain(*a, **k))[1])
    engine.save_checkpoint(folder)
    engine.load_checkpoint(folder)
    plain_barrier = deepspeed.comm.barrier
    plain_barrier()
    assert asked.pop() == "barrier", "what was replaced is not back"
    return sorted(set(asked))


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_deepspeed_waits_in_no_other_collective_in_a_save_or_load(tmp_path: Path, stage: int) -> None:
    """But for ZeRO-3's gathers, before which all ranks meet."""
    for asked in run_ranks(4, _collectives_of_a_save_and_a_load, str(tmp_path), stage):
        assert asked == (["all_gather_into_tensor"] if stage == 3 else []), "DeepSpeed waits where nothing bounds it"


def test_deepspeed_reads_affine_maps() -> None:
    assert AFFINE_MAP_FORMAT_VERSION == 1, "a new format of affine maps: compare checkpoint/affine.py with affine_map()"
    assert constants.UNIVERSAL_CHECKPOINT_INFO == "universal_checkpoint_info"
    source = inspect.getsource(universal_checkpoint._resolve_autotp_partition)
    assert "meta.get('conversion', {}).get('affine_map')" in source
    assert "DS_AUTOTP_UC_META" in inspect.getsource(universal_checkpoint._get_param_uc_restore_meta)


def test_deepspeed_reads_a_universal_checkpoint_at_stage_0_but_for_its_optimizer() -> None:
    assert "self.optimizer.update_lp_params()" in inspect.getsource(deepspeed.DeepSpeedEngine.load_checkpoint)
    source = inspect.getsource(deepspeed.DeepSpeedEngine._load_checkpoint)
    assert "if not self.load_universal_checkpoint():\n            self.load_module_state_dict(" in source
    assert "self.fp32_groups_flat" in inspect.getsource(FP16_Optimizer)
    unfused = inspect.getsource(FP16_UnfusedOptimizer)
    assert "self.fp16_groups" in unfused and "self.fp32_groups" in unfused


def test_deepspeeds_optimizer_on_the_host_counts_outside_its_state() -> None:
    source = inspect.getsource(DeepSpeedCPUAdam)
    assert "self.ds_opt_adam.adam_update(self.opt_id, state['step'], group['lr'], beta1, beta2, group['eps']," in source
    assert "group['weight_decay'], group['bias_correction'], p.data, p.grad.data," in source


def test_transformers_merges_experts_as_we_do() -> None:
    """Whose merging is read part by part: the stacks in the order of the files' names, then side by side."""
    merge, beside = core_model_loading.MergeModulelist(dim=0), core_model_loading.Concatenate(dim=1)
    experts = {"a": [torch.zeros(2, 3), torch.ones(2, 3)], "b": [torch.full((1, 3), 2.0), torch.full((1, 3), 3.0)]}
    stacked = merge.convert(dict(experts), source_patterns=["a", "b"], target_patterns=["c"])
    whole = beside.convert(stacked, source_patterns=["a", "b"], target_patterns=["c"])["c"]
    assert torch.equal(whole[..., 0], torch.tensor([[0.0, 0.0, 2.0], [1.0, 1.0, 3.0]]))
    assert sorted(["x.10.w", "x.9.w"], key=core_model_loading.dot_natural_key) == ["x.9.w", "x.10.w"]


def test_transformers_loads_through_two_functions() -> None:
    names = list(inspect.signature(PreTrainedModel._load_pretrained_model).parameters)
    assert names == ["model", "state_dict", "checkpoint_files", "load_config", "expected_keys"]
    names = list(inspect.signature(core_model_loading.set_param_for_module).parameters)
    assert names[:3] == ["model", "target_name", "param_value"]
    assert "set_param_for_module(" in inspect.getsource(core_model_loading.convert_and_load_state_dict_in_model)
    assert "HF_DEACTIVATE_ASYNC_LOAD" in inspect.getsource(core_model_loading.convert_and_load_state_dict_in_model)
    assert hasattr(hf_deepspeed, "_hf_deepspeed_config_weak_ref")


def test_torch_can_be_made_to_read_data_only(tmp_path: Path) -> None:
    torch.save(Path("x"), tmp_path / "x.pt")
    before = os.environ.get("TORCH_FORCE_WEIGHTS_ONLY_LOAD")
    with pytest.raises(Exception, match="more than data"), safe_reading(()):
        torch.load(tmp_path / "x.pt", weights_only=False)
    assert os.environ.get("TORCH_FORCE_WEIGHTS_ONLY_LOAD") == before
    assert torch.load(tmp_path / "x.pt", weights_only=False) == Path("x")
