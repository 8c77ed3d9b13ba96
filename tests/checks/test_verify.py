"""`"verify": true` passes what is exact, measures the kind of every parameter, and refuses what is not, naming where it begins."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from exactness import engine_for, fresh_groups
from models import batches, tiny
from ranks import RankError, run_ranks
from sharding import proven
from torch import Tensor

import ds_seqpar
import ds_seqpar.verify as command
from ds_seqpar import PlanError, VerificationError
from ds_seqpar.checks import reference
from ds_seqpar.checks.comparison import checksum
from ds_seqpar.checks.reference import Skeleton
from ds_seqpar.engine import verified
from ds_seqpar.layers.partial import PartialGradients
from ds_seqpar.plan.cuts import Kind

ONE_KV = dict(num_key_value_heads=1, num_attention_heads=6)  # copied to both ranks


def _kinds(family: str, key: dict[str, Any], own: dict[str, Any]) -> dict[str, str]:
    found = proven(family, key, **own)
    assert found.passed, str(found)
    return {check.module: check.measured for check in found.checks if check.what == "gradient"}


def test_the_kind_of_every_parameter_is_measured() -> None:
    for kinds in run_ranks(2, _kinds, "qwen3", {"plan": {"model.layers.1.mlp": "whole"}}, ONE_KV):
        layer = "model.layers.0"
        assert kinds[f"{layer}.self_attn.q_proj.weight"] == kinds[f"{layer}.mlp.down_proj.weight"] == Kind.CUT
        assert kinds[f"{layer}.self_attn.k_proj.weight"] == kinds[f"{layer}.self_attn.v_proj.weight"] == Kind.COPIED_KV
        assert kinds[f"{layer}.self_attn.q_norm.weight"] == kinds["model.norm.weight"] == Kind.PARTIAL
        assert kinds["model.layers.1.mlp.down_proj.weight"] == Kind.FULL


CASES: list[tuple[str, dict[str, Any], torch.dtype]] = [
    ("llama", {}, torch.bfloat16),  # tied, with biases
    ("llama", {"sequence_parallel": False}, torch.float32),
    ("gemma2", {"recompute": "full"}, torch.float32),  # scaled embeddings, capped logits, four norms a layer
    ("gpt_neox", {"recompute": "selective"}, torch.bfloat16),
    ("olmo2", {}, torch.float32),  # cut norms
    ("phi3", {}, torch.float64),
    ("opt", {}, torch.bfloat16),  # ReLU
    ("mixtral", {}, torch.bfloat16),  # the auxiliary loss reaches into the layers; experts are chosen in float32
]


def _cases(cases: list[tuple[str, dict[str, Any], torch.dtype]]) -> list[str]:
    return [str(found) for case in cases if not (found := proven(*case)).passed]


def test_exact_models_pass_in_every_mode_and_dtype() -> None:
    for failed in run_ranks(2, _cases, CASES):
        assert not failed, "\n".join(failed)


OTHERS = ("mistral", "qwen2", "qwen3", "gemma3_text", "smollm3", "granite", "deepseek_v3", "gpt_oss", "gemma4_text",
    "gpt2", "bloom", "falcon", "opt", "qwen3_moe")  # fmt: skip


def _types(types: list[str], dtype: torch.dtype) -> list[str]:
    """One line a type: "passed", why it is refused at this size, or the table."""
    said = []
    for name in types:
        try:
            found = proven(name, {}, dtype)
            said.append("passed" if found.passed else f"{name}: {found}")
        except PlanError as problem:
            said.append(f"refused: {problem}")
    return said


@pytest.mark.slow
@pytest.mark.parametrize("tp", [1, 2, 3, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_kind_of_model_passes(tp: int, dtype: torch.dtype) -> None:
    types = [*dict.fromkeys(case[0] for case in CASES), *OTHERS]
    for said in run_ranks(tp, _types, types, dtype, timeout=900):
        assert not [line for line in said if line != "passed" and not line.startswith("refused: ")], said
        assert said.count("passed") >= len(types) - 2 * (tp > 2)  # a few have too few heads


def _leaps() -> tuple[torch.dtype, list[str], bool]:
    """(dtype in which a mixture in bf16 was compared, remarks, whether its weights are what they were)."""
    fresh_groups()
    model = tiny("mixtral", dtype=torch.bfloat16)
    skeleton = Skeleton(model)
    ds_seqpar.shard(model, {"tp_size": 2})
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    found = verified(model, skeleton, 9)
    back = all(p.dtype is torch.bfloat16 and torch.equal(p, before[name]) for name, p in model.named_parameters())
    return found.rounding.dtype, found.remarks, back and found.passed


def test_what_leaps_in_half_precision_is_compared_in_float32_and_comes_back() -> None:
    for dtype, remarks, back in run_ranks(2, _leaps):
        assert dtype is torch.float32 and back
        assert any("compared in float32: in bfloat16 a choice of experts" in remark for remark in remarks)


def _adapters() -> dict[str, str]:
    from peft import LoraConfig, get_peft_model

    fresh_groups()
    torch.manual_seed(0)
    targets = ["q_proj", "v_proj", "o_proj", "down_proj"]
    model = get_peft_model(tiny("llama"), LoraConfig(r=4, target_modules=targets, init_lora_weights=False))
    skeleton = Skeleton(model)
    ds_seqpar.shard(model, {"tp_size": 2})
    found = verified(model, skeleton, 9)
    assert found.passed, str(found)
    return {check.module: check.measured for check in found.checks if check.what == "gradient"}


def test_adapters_are_verified_and_frozen_weights_have_no_gradient() -> None:
    for kinds in run_ranks(2, _adapters):
        layer = "base_model.model.model.layers.0"
        assert len(kinds) == 2 * 4 * 2, kinds
        assert kinds[f"{layer}.self_attn.q_proj.lora_A.default.weight"] == Kind.PARTIAL
        assert kinds[f"{layer}.self_attn.q_proj.lora_B.default.weight"] == Kind.CUT
        assert kinds[f"{layer}.mlp.down_proj.lora_A.default.weight"] == Kind.CUT
        assert kinds[f"{layer}.mlp.down_proj.lora_B.default.weight"] == Kind.PARTIAL


def _most_held() -> tuple[int, int, int]:
    """(elements that the skeleton held at most, of everything outside the layers, of one layer)."""
    most, plain = 0, reference.Reference._gradients

    def watched(self: Any, *args: Any) -> None:
        nonlocal most
        most = max(most, sum(p.numel() for p in self.skeleton.model.parameters()))
        plain(self, *args)

    whole = tiny("qwen3", num_hidden_layers=4)
    layer = sum(p.numel() for p in whole.model.layers[0].parameters())
    with mock.patch.object(reference.Reference, "_gradients", watched):
        assert proven("qwen3", {}, num_hidden_layers=4).passed
    return most, sum(p.numel() for p in whole.parameters()) - 4 * layer, layer


def test_one_layers_whole_weights_exist_at_a_time() -> None:
    for most, outside, layer in run_ranks(2, _most_held):
        assert most == outside + layer


def _trained(key: dict[str, Any]) -> list[Tensor]:
    torch.manual_seed(3)
    model = tiny("llama").train()
    engine = engine_for(model, torch.optim.SGD(model.parameters(), lr=0.5), {"tp_size": 2, **key}, 1, 1, 1)
    losses = []
    for batch in batches(2, 1):
        loss = engine(**batch).loss
        engine.backward(loss)
        engine.step()
        losses.append(loss.detach())
    return [*losses, torch.rand(()), *(p.detach().clone() for p in engine.module.parameters())]


def _same_training() -> bool:
    return all(map(torch.equal, _trained({}), _trained({"verify": True})))


def test_a_verified_run_trains_bit_for_bit_as_one_that_was_not() -> None:
    assert all(run_ranks(2, _same_training))


def _unsummed(self: Any, parameter: Any, *slots: int) -> None:
    pass


def _refused() -> str:
    with mock.patch.object(PartialGradients, "add", _unsummed):
        try:
            _trained({"verify": True})
        except VerificationError as problem:
            return str(problem)
    return "nothing was raised"


def test_a_wrong_gradient_stops_every_rank_before_training_and_is_named() -> None:
    for message in run_ranks(2, _refused, timeout=120):
        assert "first model.norm.weight: gradient is off by" in message or "first model.layers.1." in message
        assert "do not" not in message.splitlines()[0][:20] and "FAILED" in message
        assert "model.layers.0.input_layernorm.weight: gradient" in message


def _wrong_claim() -> list[tuple[str, str]]:
    """The Report says full of a norm whose gradient is summed, rightly."""
    fresh_groups()
    model = tiny("llama")
    skeleton = Skeleton(model)
    ds_seqpar.shard(model, {"tp_size": 2})
    norm = model.model.norm.weight
    entry = model.seqpar.entries[id(norm)]
    model.seqpar.entries[id(norm)] = type(entry)(Kind.FULL, entry.shape, entry.local_shape)
    return [(c.module, c.measured) for c in verified(model, skeleton, 9).checks if not c.passed]


def test_a_claim_that_is_not_measured_fails() -> None:
    assert run_ranks(2, _wrong_claim) == [[("model.norm.weight", Kind.PARTIAL)]] * 2


def _command(arguments: list[str]) -> int:
    fresh_groups()
    return command.main(arguments)


def test_the_command_prints_a_table_and_its_exit_status_says_what_was_found(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    tiny("llama").save_pretrained(tmp_path / "model")
    config = tmp_path / "ds.json"
    config.write_text(json.dumps({"bf16": {"enabled": True}, "ds_seqpar": {"tp_size": 2, "recompute": "full"}}))
    model = ["--model", str(tmp_path / "model"), "--seq", "9"]
    assert run_ranks(2, _command, model) == [0, 0]
    printed = capfd.readouterr().out
    assert "sharded against unsharded" in printed and "float32" in printed and " checks passed" in printed
    assert run_ranks(2, _command, [*model, "--parts", "--config", str(config)]) == [0, 0]
    assert "bfloat16" in capfd.readouterr().out
    with mock.patch.object(PartialGradients, "add", _unsummed):
        assert run_ranks(2, _command, model) == [1, 1]
    assert "FAILED" in capfd.readouterr().out
    config.write_text("{}")
    assert run_ranks(2, _command, [*model, "--config", str(config)]) == [2, 2]
    assert 'has no "ds_seqpar" key' in capfd.readouterr().err


def test_the_command_verifies_a_model_of_the_class_that_was_saved(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    heads = {"bert": "sequence-classification", "t5": "seq2seq-lm"}
    for model_type, head in heads.items():
        tiny(model_type, head=head).save_pretrained(tmp_path / model_type)
        assert run_ranks(2, _command, ["--model", str(tmp_path / model_type), "--seq", "9"]) == [0, 0]
        printed = capfd.readouterr().out
        assert f"verify: {model_type}, " in printed and ("classifier.weight" in printed) == (model_type == "bert")


@pytest.mark.slow
@pytest.mark.parametrize(
    "launcher", [["-m"], ["-m", "torch.distributed.run", "--nproc-per-node=2", "--standalone", "-m"]]
)
def test_the_command_starts_by_itself_and_under_a_launcher(tmp_path: Path, launcher: list[str]) -> None:
    tiny("llama").save_pretrained(tmp_path / "model")
    root = Path(__file__).resolve().parents[2]
    environment = {**os.environ, "PYTHONPATH": f"{root}:{root / 'integrations'}"}
    command = [sys.executable, *launcher, "ds_seqpar.verify", "--model", str(tmp_path / "model")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, env=environment, cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    ranks = 1 if launcher == ["-m"] else 2
    assert f"tp_size={ranks}, " in done.stdout and done.stdout.count("sharded against unsharded") == 1


def test_checksums_of_parts_add_up_and_show_one_bit_and_an_exchange() -> None:
    for dtype in (torch.float32, torch.bfloat16, torch.int64, torch.bool):
        x = torch.randn(1000).mul(100).to(dtype)
        parts = checksum(x[:333]) + checksum(x[333:], 333)
        assert parts == checksum(x)
    x = torch.randn(1000)
    changed = x.clone()
    changed.view(torch.int32)[777] ^= 1
    assert checksum(changed) != checksum(x)
    swapped = x.clone()
    swapped[[3, 900]] = x[[900, 3]]
    assert checksum(swapped) != checksum(x)


def test_a_rank_error_is_not_hidden() -> None:
    with pytest.raises(RankError, match="no loss to speak of"):
        run_ranks(2, _broken_model)


def _broken_model() -> None:
    with mock.patch("ds_seqpar.checks.sharded_run.loss_of", side_effect=ValueError("no loss to speak of")):
        proven("llama", {})
