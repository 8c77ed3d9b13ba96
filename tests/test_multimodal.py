"""Vision-language models with images in the batch: the language model is sharded, what stands beside it is whole on every rank."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from exactness import compare_sgd, engine_for
from model_types import MULTIMODAL, batches_for, tiny_of
from ranks import run_ranks
from sharding import full_gradients, twins
from transformers import AutoModelForImageTextToText

import ds_seqpar

TOWER = {
    "gemma3": "model.vision_tower",
    "llava": "model.vision_tower",
    "qwen2_vl": "model.visual",
    "qwen3_vl": "model.visual",
}


def _engine_step(model_type: str, stage: int, key: dict[str, Any]) -> dict[str, float]:
    return compare_sgd(model_type, 2, stage, accumulation=2, seq=9, key=key)


def _exact_under_deepspeed(world: int, model_type: str, stage: int, key: dict[str, Any] | None = None) -> None:
    for errors in run_ranks(world, _engine_step, model_type, stage, key or {}, timeout=600):
        # A key's bias moves all scores of a query alike: its gradient is zero, and what is left of it is rounding.
        bad = {name: error for name, error in errors.items() if not error <= 1e-5 and not name.endswith("k_proj.bias")}
        assert not bad, f"relative errors above 1e-5: {bad}"


@pytest.mark.parametrize(("world", "model_type", "stage"), [(2, "qwen3_vl", 3), (4, "gemma3", 1)])
def test_every_change_of_a_weight_equals_the_unsharded_models_under_deepspeed(
    world: int, model_type: str, stage: int
) -> None:
    _exact_under_deepspeed(world, model_type, stage)


@pytest.mark.slow
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@pytest.mark.parametrize("model_type", sorted(TOWER))
def test_every_type_and_stage_with_data_parallel_ranks(model_type: str, stage: int) -> None:
    _exact_under_deepspeed(4, model_type, stage)


@pytest.mark.slow
@pytest.mark.parametrize("key", [{"sequence_parallel": False}, {"recompute": "selective"}, {"recompute": "full"}])
@pytest.mark.parametrize("model_type", sorted(TOWER))
def test_every_mode(model_type: str, key: dict[str, Any]) -> None:
    _exact_under_deepspeed(2, model_type, 1, key)


def _report(model_type: str) -> dict[str, Any]:
    model, _ = twins(model_type)
    kinds = {name: entry.kind for name, entry in model.seqpar_report.parameters().items()}
    model(**batches_for(1, 3, 9, model_type=model_type)[0]).loss.backward()
    return {
        "kinds": kinds,
        "remarks": model.seqpar_report.remarks,
        "materialised": dict(model.seqpar_report.materialised),
    }


@pytest.mark.parametrize("model_type", ["llava", "qwen2_vl"])
def test_the_report_says_that_the_tower_is_whole_and_that_nothing_was_gathered(model_type: str) -> None:
    tower = TOWER[model_type]
    for result in run_ranks(2, _report, model_type):
        assert any(r.startswith(f"{tower} (") and "was left alone" in r for r in result["remarks"]), result["remarks"]
        assert {kind for name, kind in result["kinds"].items() if name.startswith(f"{tower}.")} == {"full"}
        assert "cut" in {kind for name, kind in result["kinds"].items() if ".language_model." in name}
        assert not result["materialised"]


def _tower_with_dropout() -> dict[str, torch.Tensor | None]:
    model, _ = twins("llava")
    for module in model.model.vision_tower.modules():
        if hasattr(module, "dropout") and isinstance(module.dropout, float):
            module.dropout = 0.5
    torch.manual_seed(100 + dist.get_rank())
    model(**batches_for(1, 3, 9, model_type="llava")[0]).loss.backward()
    return full_gradients(model)


def test_a_towers_dropout_is_the_same_on_ranks_that_were_seeded_differently() -> None:
    first, second = run_ranks(2, _tower_with_dropout)
    for name, gradient in first.items():
        other = second[name]
        assert (gradient is None) == (other is None)
        assert gradient is None or other is None or torch.allclose(gradient, other, rtol=1e-9), name


def _save_and_generate(model_type: str, folder: str) -> dict[str, Any]:
    model, reference = tiny_of(model_type, dtype=torch.float32), tiny_of(model_type, dtype=torch.float32).eval()
    engine = engine_for(model, torch.optim.SGD(model.parameters(), lr=1.0), {"tp_size": 2}, 1, 1, 1)
    ds_seqpar.save_pretrained(engine, folder)
    batch = _float32_batch(model_type)
    del batch["labels"]
    options: dict[str, Any] = dict(max_new_tokens=5, min_new_tokens=5, do_sample=False)
    ours = engine.module.eval().generate(**batch, **options)
    return {"ours": ours, "expected": reference.generate(**batch, **options)}


@pytest.mark.parametrize("model_type", ["gemma3", "qwen2_vl"])
def test_generates_from_images_and_saves_what_loads_without_us(tmp_path: Path, model_type: str) -> None:
    for result in run_ranks(2, _save_and_generate, model_type, str(tmp_path)):
        assert torch.equal(result["ours"], result["expected"])
    loaded, info = AutoModelForImageTextToText.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    original = tiny_of(model_type, dtype=torch.float32).state_dict()
    assert all(torch.equal(tensor, original[name]) for name, tensor in loaded.state_dict().items())


def _load_in_parts(model_type: str, folder: str) -> float:
    key = {"tp_size": 2}
    config = {"train_micro_batch_size_per_gpu": 1, "ds_seqpar": key}
    model = ds_seqpar.from_pretrained(folder, config, model_class=AutoModelForImageTextToText, dtype=torch.float32)
    engine = engine_for(model, torch.optim.SGD(model.parameters(), lr=1.0), key, 1, 1, 1)
    kinds = engine.seqpar_report.parameters()
    assert all(kinds[name].local_shape == tuple(p.shape) for name, p in engine.module.named_parameters())
    with torch.no_grad():
        return float(engine(**_float32_batch(model_type)).loss)


def _float32_batch(model_type: str) -> dict[str, torch.Tensor]:
    batch = batches_for(1, 2, 9, model_type=model_type)[0]
    return {name: x.float() if x.is_floating_point() else x for name, x in batch.items()}


def test_is_loaded_in_parts_with_its_tower_whole(tmp_path: Path) -> None:
    whole = tiny_of("qwen2_vl", dtype=torch.float32)
    whole.save_pretrained(tmp_path)
    with torch.no_grad():
        expected = float(whole.train()(**_float32_batch("qwen2_vl")).loss)
    for loss in run_ranks(2, _load_in_parts, "qwen2_vl", str(tmp_path)):
        assert abs(loss - expected) <= 1e-5 * expected


def test_every_type_of_several_parts_has_images_in_its_batches() -> None:
    assert set(TOWER) <= set(MULTIMODAL)
    for model_type in MULTIMODAL:
        assert "pixel_values" in batches_for(1, 1, 9, model_type=model_type)[0]
