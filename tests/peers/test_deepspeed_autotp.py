"""What DeepSpeed's tests of AutoTP promise, asked with our key in place of theirs: training, uneven sizes, saved weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from exactness import compare_adamw, compare_sgd, engine_for
from models import batches, tiny
from ranks import run_ranks

import ds_seqpar


def _training(stage: int, own: dict[str, Any]) -> dict[str, float]:
    return compare_sgd("llama", 2, stage, own=own)


@pytest.mark.parametrize("stage", [0, 1, 2])
def test_row_and_column_layers_train_as_one_device_does(stage: int) -> None:
    for errors in run_ranks(2, _training, stage, {}):
        bad = {
            name: error for name, error in errors.items() if not error <= 1e-5
        }  # theirs: 1e-3 of gradients, 1e-2 of outputs
        assert not bad


UNEVEN: dict[str, Any] = dict(
    num_attention_heads=5, num_key_value_heads=5, hidden_size=40, intermediate_size=37, vocab_size=103
)


def test_sizes_that_divide_by_nothing_train_too() -> None:
    for errors in run_ranks(3, _uneven):
        assert not {name: error for name, error in errors.items() if not error <= 1e-5}


def _uneven() -> dict[str, float]:
    return compare_sgd("llama", 3, 1, own=UNEVEN)


def _clipped() -> dict[str, float]:
    return compare_adamw("llama", 2, 1)


@pytest.mark.slow
def test_clipping_uses_the_whole_models_norm() -> None:
    for errors in run_ranks(2, _clipped):
        assert not {name: error for name, error in errors.items() if name.startswith("norm") and not error <= 1e-5}


def _saved(folder: str, stage: int) -> None:
    model = tiny("llama", **UNEVEN)
    engine = engine_for(model, torch.optim.SGD(model.parameters(), lr=0.1), {"tp_size": 2}, stage, 1, 1)
    engine.save_16bit_model(folder, "model.safetensors")
    for batch in batches(1, 1):
        engine.backward(engine(**batch).loss)
        engine.step()
    ds_seqpar.save_pretrained(engine, f"{folder}/trained")


@pytest.mark.parametrize("stage", [1, 3])
def test_saved_weights_are_the_originals(tmp_path: Path, stage: int) -> None:
    from safetensors.torch import load_file
    from transformers import AutoModelForCausalLM

    run_ranks(2, _saved, str(tmp_path), stage)
    saved, original = load_file(tmp_path / "model.safetensors"), tiny("llama", **UNEVEN).state_dict()
    assert set(saved) == set(original) - {"lm_head.weight"}  # tied
    for name, tensor in saved.items():
        assert torch.equal(tensor, original[name]), name  # theirs: 1e-3
    trained = AutoModelForCausalLM.from_pretrained(tmp_path / "trained", dtype=torch.float32)
    assert any(not torch.equal(p, original[name]) for name, p in trained.named_parameters())
