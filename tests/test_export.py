"""What is saved is an ordinary checkpoint: plain from_pretrained gives back every tensor, in any ZeRO stage."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from exactness import engine_for
from models import batches, tiny
from ranks import RankError, run_ranks
from transformers import AutoModelForCausalLM

import ds_seqpar


def _train_and_save(
    family: str, tp: int, stage: int, folder: str, dtype: torch.dtype
) -> dict[str, torch.Tensor] | None:
    """One step, saved twice into the same folder; returns the whole state dict (rank 0)."""
    model = tiny(family, dtype=dtype).train()
    ds = {"bf16": {"enabled": True}} if dtype == torch.bfloat16 else {}
    engine = engine_for(model, torch.optim.SGD(model.parameters(), lr=1.0), {"tp_size": tp}, stage, 1, 1, **ds)
    ds_seqpar.save_pretrained(engine, folder)
    loss = engine(**batches(1, 1)[0]).loss
    engine.backward(loss)
    engine.step()
    ds_seqpar.save_pretrained(engine, folder)
    state = ds_seqpar.full_state_dict(engine)
    engine.module.eval()
    return state if dist.get_rank() == 0 else None


@pytest.mark.parametrize(
    ("family", "tp", "world", "stage", "dtype"),
    [
        ("llama", 2, 2, 1, torch.float32),  # tied
        ("phi3", 3, 3, 0, torch.float32),  # packed, uneven
        ("qwen3", 4, 4, 3, torch.float32),  # copied kv heads
        ("gpt_neox", 2, 4, 3, torch.float32),
        ("mistral", 2, 2, 2, torch.bfloat16),
    ],
)
def test_saved_checkpoint_loads_without_us(
    tmp_path: Path, family: str, tp: int, world: int, stage: int, dtype: torch.dtype
) -> None:
    folder = tmp_path / "checkpoint"
    state = run_ranks(world, _train_and_save, family, tp, stage, str(folder), dtype)[0]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["checkpoint"], "something was left aside"
    model, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True, dtype="auto")
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    original = tiny(family, dtype=dtype)
    assert model.config.architectures == [type(original).__name__]
    assert model.config.num_attention_heads == original.config.num_attention_heads
    loaded = model.state_dict()
    assert loaded.keys() == original.state_dict().keys() == state.keys()
    for name, tensor in loaded.items():
        assert tensor.dtype == original.state_dict()[name].dtype, name
        assert torch.equal(tensor, state[name]), name
    assert any(not torch.equal(tensor, original.state_dict()[name].cpu()) for name, tensor in loaded.items()), (
        "the step is not in it"
    )
    assert json.loads((folder / "config.json").read_text())["model_type"] == family


def _unchanged_model(family: str, tp: int) -> bool:
    model, original = tiny(family), tiny(family)
    engine = engine_for(model, torch.optim.SGD(model.parameters(), lr=1.0), {"tp_size": tp}, 1, 1, 1)
    state = ds_seqpar.full_state_dict(engine)
    return dist.get_rank() > 0 or all(torch.equal(state[name], x) for name, x in original.state_dict().items())


@pytest.mark.parametrize(("family", "tp"), [("llama", 3), ("phi3", 2), ("olmo2", 4), ("gpt_neox", 4)])
def test_cutting_and_gathering_is_the_identity(family: str, tp: int) -> None:
    assert all(run_ranks(tp, _unchanged_model, family, tp))


def _consolidated(stage: int) -> bool:
    """DeepSpeed's own consolidation, through the hooks that our parameters carry."""
    model = tiny("llama")
    zero = {"zero_optimization": {"stage": stage, "stage3_gather_16bit_weights_on_model_save": True}}
    engine = engine_for(model, torch.optim.SGD(model.parameters(), lr=1.0), {"tp_size": 2}, stage, 1, 1, **zero)
    theirs, ours = engine._consolidated_16bit_state_dict(), ds_seqpar.full_state_dict(engine)
    shapes = {name: p.shape for name, p in engine.module.named_parameters()}
    loss = engine(**batches(1, 1)[0]).loss  # the shards are back in place
    assert torch.isfinite(loss)
    assert shapes == {name: p.shape for name, p in engine.module.named_parameters()}
    return dist.get_rank() > 0 or all(torch.equal(theirs[name].cpu(), x) for name, x in ours.items())


@pytest.mark.parametrize("stage", [1, 3])
def test_deepspeeds_own_consolidation_gives_whole_tensors(stage: int) -> None:
    assert all(run_ranks(2, _consolidated, stage))


def _careless_saves(folder: str) -> list[str]:
    model = tiny("llama")
    engine = engine_for(model, torch.optim.SGD(model.parameters(), lr=1.0), {"tp_size": 2}, 1, 1, 1)
    messages = []
    with pytest.raises(ds_seqpar.CheckpointError, match=r"ds_seqpar\.save_pretrained") as caught:
        engine.module.save_pretrained(folder)
    messages.append(str(caught.value))
    return messages


def test_saves_that_would_write_shards_are_refused(tmp_path: Path) -> None:
    assert all(len(messages) == 1 for messages in run_ranks(2, _careless_saves, str(tmp_path / "x")))
    assert not (tmp_path / "x").exists()


def _save_into(folder: str) -> None:
    model = tiny("llama")
    engine = engine_for(model, torch.optim.SGD(model.parameters(), lr=1.0), {"tp_size": 2}, 1, 1, 1)
    ds_seqpar.save_pretrained(engine, folder)


def test_a_folder_that_cannot_be_written_is_an_error_on_every_rank(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(RankError) as caught:
        run_ranks(2, _save_into, str(tmp_path / "file" / "checkpoint"))
    assert all("CheckpointError" in str(error) and "file" in str(error) for error in caught.value.errors)
    assert (tmp_path / "file").read_text() == "in the way"


def test_what_was_saved_before_survives_a_save_that_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "checkpoint"
    run_ranks(2, _save_into, str(folder))
    before = {p.name: p.read_bytes() for p in folder.iterdir()}

    def full(*args: Any, **kwargs: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("ds_seqpar.checkpoint.writing.write_config", full)
    with pytest.raises(RankError, match="No space left on device"):
        run_ranks(2, _save_into, str(folder))
    assert {p.name: p.read_bytes() for p in folder.iterdir()} == before


def test_other_files_in_the_folder_stay_and_old_weights_go(tmp_path: Path) -> None:
    folder = tmp_path / "checkpoint"
    (folder / "global_step10").mkdir(parents=True)
    (folder / "global_step10" / "state.pt").write_text("kept")
    (folder / "model-00001-of-00002.safetensors").write_text("of an older checkpoint")
    run_ranks(2, _save_into, str(folder))
    assert (folder / "global_step10" / "state.pt").read_text() == "kept"
    assert not (folder / "model-00001-of-00002.safetensors").exists()
    AutoModelForCausalLM.from_pretrained(folder)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["checkpoint"]


def test_a_replacement_that_was_cut_off_is_ended_by_the_next(tmp_path: Path) -> None:
    before = tmp_path / ".checkpoint.before"
    before.mkdir()
    (before / "notes.txt").write_text("kept")
    run_ranks(2, _save_into, str(tmp_path / "checkpoint"))
    assert (tmp_path / "checkpoint" / "notes.txt").read_text() == "kept"
    assert not before.exists()
