"""model.eval(), generate (greedy and sampled, with a KV cache) and evaluation losses equal the unsharded model's on every rank."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from exactness import engine_for
from models import batches, tiny
from ranks import run_ranks

CASES = [
    (family, tp)
    for tp, families in ((2, ("llama", "gemma3_text", "phi3", "gpt_neox")), (3, ("qwen3",)), (4, ("llama",)))
    for family in families
]
PLAIN_TP = {"sequence_parallel": False}


def _prompts() -> dict[str, torch.Tensor]:
    batch = batches(1, 2, 5)[0]
    mask = torch.ones_like(batch["input_ids"])
    mask[0, :2] = 0  # generation pads on the left
    return {"input_ids": batch["input_ids"], "attention_mask": mask}


def _generate(family: str, tp: int, key: dict[str, Any], stage: int = 1) -> dict[str, bool]:
    model, reference = tiny(family), tiny(family).eval()
    engine = engine_for(model, torch.optim.SGD(model.parameters(), lr=1.0), {"tp_size": tp, **key}, stage, 1, 1)
    engine.module.eval()
    prompts, options = (
        _prompts(),
        dict(max_new_tokens=8, min_new_tokens=8, return_dict_in_generate=True, output_logits=True),
    )
    result = {}
    for name, sampling in (
        ("greedy", dict(do_sample=False)),
        ("sampled", dict(do_sample=True, temperature=1.3, top_k=40)),
    ):
        torch.manual_seed(3)
        expected = reference.generate(**prompts, **options, **sampling)
        torch.manual_seed(3)
        ours = engine.module.generate(**prompts, **options, **sampling)
        result[name] = torch.equal(ours.sequences, expected.sequences)
        result[f"{name} logits"] = torch.allclose(
            torch.stack(ours.logits), torch.stack(expected.logits), rtol=1e-4, atol=1e-4
        )
    with torch.no_grad():
        batch = batches(1, 2)[0]
        ours, expected = engine(**batch), reference(**batch)
        result["loss"] = torch.allclose(ours.loss, expected.loss, rtol=1e-5)
        result["logits"] = torch.allclose(ours.logits + 0.0, expected.logits, rtol=1e-4, atol=1e-5)
    return result


@pytest.mark.parametrize(("family", "tp"), CASES)
def test_generation_equals_the_unsharded_models(family: str, tp: int) -> None:
    for result in run_ranks(tp, _generate, family, tp, {}):
        assert all(result.values()), result


def test_generation_under_plain_tensor_parallelism() -> None:
    for result in run_ranks(2, _generate, "llama", 2, PLAIN_TP):
        assert all(result.values()), result


def test_generation_under_zero_3() -> None:
    for result in run_ranks(2, _generate, "qwen3", 2, {}, 3):
        assert all(result.values()), result


def _sample_after_different_seeds() -> list[int]:
    model = tiny("llama")
    engine = engine_for(model, torch.optim.SGD(model.parameters(), lr=1.0), {"tp_size": 2}, 1, 1, 1)
    torch.manual_seed(100 + torch.distributed.get_rank())
    return engine.module.eval().generate(**_prompts(), do_sample=True, max_new_tokens=8).flatten().tolist()  # type: ignore[no-any-return]


def test_ranks_seeded_differently_still_sample_alike() -> None:
    first, second = run_ranks(2, _sample_after_different_seeds)
    assert first == second
