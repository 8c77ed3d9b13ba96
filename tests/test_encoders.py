"""Encoders, encoder-decoders and heads: every gradient, what is not gathered, ZeRO stages, generation, dropout, checkpoints."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from exactness import compare_sgd, engine_for, fresh_groups, replicas_equal
from model_types import HEADS, batches_for, heads_of, tiny_of
from parity import parities, parity
from ranks import run_ranks
from sharding import proven
from torch import Tensor

import ds_seqpar
from ds_seqpar.layers.region import ShardingState

KINDS = (
    "bart",
    "bert",
    "llama",
    "modernbert",
    "t5",
)  # of each way to stand a head on a model; the rest is in test_parity.py


@pytest.mark.parametrize("model_type", KINDS)
def test_every_heads_gradients_equal_the_unsharded_models_and_nothing_wide_is_gathered(model_type: str) -> None:
    for results in run_ranks(2, parities, model_type, heads_of(model_type)):
        assert set(results) == set(heads_of(model_type))
        for head, result in results.items():
            assert not result["bad"], f"{head}: {result['bad']}"
            assert not result["materialised"], f"{head}: {result['materialised']}"


def _in_mode(model_type: str, head: str, key: dict[str, Any]) -> dict[str, Any]:
    return parity(model_type, head=head, key=key)


@pytest.mark.parametrize(("model_type", "head"), [("bert", "masked-lm"), ("t5", "seq2seq-lm")])
def test_heads_under_plain_tensor_parallelism(model_type: str, head: str) -> None:
    for result in run_ranks(2, _in_mode, model_type, head, {"sequence_parallel": False}):
        assert not result["bad"]


@pytest.mark.parametrize("model_type", ["t5", "bart"])
def test_the_first_step_is_recomputed_as_it_was_run(model_type: str) -> None:
    """Only by running it is it known that the keys of a cross-attention are not made of the block's input."""
    for result in run_ranks(2, _in_mode, model_type, "seq2seq-lm", {"recompute": "full"}):
        assert not result["bad"]


def test_a_weight_that_other_code_uses_on_whole_tokens_has_its_gradient_once() -> None:
    """NeoMME multiplies hidden states with the weight of a linear that is tied to the embedding's, and calls neither there."""
    for result in run_ranks(2, _in_mode, "neomme", "masked-lm", {}):
        assert not result["bad"]


def test_a_last_norm_without_a_weight_acts_on_the_shard() -> None:
    for result in run_ranks(2, _in_mode, "olmo", "", {}):
        assert not result["bad"] and not result["materialised"]


def _verdicts(cases: list[tuple[str, str]]) -> list[str]:
    found = {case: proven(case[0], {}, head=case[1]) for case in cases}
    return [f"{case}\n{verdict}" for case, verdict in found.items() if not verdict.passed]


def test_verify_passes_whatever_the_head() -> None:
    cases = [
        ("bert", "sequence-classification"), ("modernbert", "token-classification"), ("t5", "seq2seq-lm"),
        ("bart", "sequence-classification"), ("neomme", "masked-lm"),
    ]  # fmt: skip
    assert run_ranks(2, _verdicts, cases, timeout=300) == [[], []]


def _there_and_back(model_type: str, head: str, stage: int, folder: str) -> list[str]:
    """What plain transformers, and a load in parts, do not find as it was saved after a step."""
    wrong = []
    model = tiny_of(model_type, head=head, dtype=torch.float32).train()
    engine = engine_for(model, torch.optim.SGD(model.parameters(), lr=1.0), {"tp_size": 2}, stage, 2, 1)
    loss = engine(**batches_for(1, 2, 7, head=head)[0]).loss
    engine.backward(loss)
    engine.step()
    ds_seqpar.save_pretrained(engine, folder)
    expected = ds_seqpar.full_state_dict(engine)
    whole, info = HEADS[head].from_pretrained(folder, output_loading_info=True)
    wrong += [str(value) for name, value in info.items() if value]
    wrong += [name for name, x in whole.state_dict().items() if expected and not torch.equal(x, expected[name])]
    original = tiny_of(model_type, head=head, dtype=torch.float32).state_dict()
    if all(torch.equal(x, original[name]) for name, x in whole.state_dict().items()):
        wrong.append("the step is not in it")
    fresh_groups()
    config = {
        "train_micro_batch_size_per_gpu": 2, "zero_optimization": {"stage": stage}, "ds_seqpar": {"tp_size": 2},
        "optimizer": {"type": "AdamW", "params": {"torch_adam": True}},
    }  # fmt: skip
    with ds_seqpar.loading(config):
        partly = HEADS[head].from_pretrained(folder)
    size = sum(p.numel() for p in partly.parameters())
    if size >= sum(p.numel() for p in whole.parameters()):
        wrong.append("it was loaded whole")
    again = ds_seqpar.full_state_dict(ds_seqpar.initialize(model=partly, config=config)[0])
    return wrong + [f"{name} in parts" for name, x in again.items() if not torch.equal(x, expected[name])]


@pytest.mark.parametrize(
    ("model_type", "head", "stage"),
    [("bert", "masked-lm", 1), ("electra", "token-classification", 1), ("t5", "seq2seq-lm", 3), ("bart", "seq2seq-lm", 1)],
)  # fmt: skip
def test_what_is_saved_is_found_by_transformers_and_loaded_in_parts(
    tmp_path: Path, model_type: str, head: str, stage: int
) -> None:
    assert run_ranks(2, _there_and_back, model_type, head, stage, str(tmp_path / "saved")) == [[], []]


def _generates(model_type: str, stage: int) -> dict[str, bool]:
    """Greedy, sampled and beam search against the unsharded model, from padded sources."""
    own: dict[str, Any] = {"head": "seq2seq-lm", "dtype": torch.float32}
    model, reference = tiny_of(model_type, **own), tiny_of(model_type, **own).eval()
    engine = engine_for(model, torch.optim.SGD(model.parameters(), lr=1.0), {"tp_size": 2}, stage, 1, 1)
    engine.module.eval()
    batch = batches_for(1, 2, 7, head="seq2seq-lm")[0]
    labels = batch.pop("labels")
    result = {}
    for name, how in {"greedy": {}, "sampled": {"do_sample": True, "top_k": 40}, "beams": {"num_beams": 3}}.items():
        sequences = []
        for m in (reference, engine.module):
            torch.manual_seed(3)
            sequences.append(m.generate(**batch, max_new_tokens=6, min_new_tokens=6, **how))
        result[name] = torch.equal(*sequences)
    with torch.no_grad():
        ours, expected = engine(**batch, labels=labels), reference(**batch, labels=labels)
        result["loss"] = torch.allclose(ours.loss, expected.loss, rtol=1e-5)
        result["logits"] = torch.allclose(ours.logits + 0.0, expected.logits, rtol=1e-4, atol=1e-5)
        result["source"] = torch.allclose(
            ours.encoder_last_hidden_state + 0.0, expected.encoder_last_hidden_state, rtol=1e-4, atol=1e-5
        )
    return result


@pytest.mark.parametrize(("model_type", "stage"), [("t5", 1), ("bart", 3)])
def test_encoder_decoders_generate_what_the_unsharded_model_does(model_type: str, stage: int) -> None:
    for result in run_ranks(2, _generates, model_type, stage):
        assert all(result.values()), result


def _compare(model_type: str, head: str, tp: int, stage: int) -> dict[str, float]:
    own = {"dtype": torch.float32}
    return compare_sgd(model_type, tp, stage, micro=2, accumulation=2, head=head, own=own)


def _check_engine(world: int, model_type: str, head: str, tp: int, stage: int) -> None:
    for errors in run_ranks(world, _compare, model_type, head, tp, stage, timeout=600):
        bad = {name: error for name, error in errors.items() if not error <= 1e-5}
        assert errors and not bad, f"relative errors above 1e-5: {bad}"


@pytest.mark.parametrize(
    ("model_type", "head"), [("bert", "sequence-classification"), ("modernbert", "masked-lm"), ("t5", "seq2seq-lm")]
)
def test_zero_3_whose_hooks_see_what_goes_through_encoders_and_heads(model_type: str, head: str) -> None:
    _check_engine(2, model_type, head, 2, 3)


SAMPLE = [
    ("bert", "masked-lm"), ("bert", "token-classification"), ("modernbert", "masked-lm"), ("distilbert", "question-answering"),
    ("llama", "sequence-classification"), ("t5", "seq2seq-lm"), ("bart", "seq2seq-lm"), ("bart", "sequence-classification"),
]  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@pytest.mark.parametrize(("model_type", "head"), SAMPLE)
def test_every_zero_stage_with_two_data_parallel_ranks(model_type: str, head: str, stage: int) -> None:
    _check_engine(4, model_type, head, 2, stage)


@pytest.mark.slow
@pytest.mark.parametrize("tp", [3, 4])
@pytest.mark.parametrize("model_type", KINDS)
def test_heads_at_more_ranks(model_type: str, tp: int) -> None:
    for results in run_ranks(tp, parities, model_type, heads_of(model_type), timeout=600):
        assert not {head: result["bad"] for head, result in results.items() if result["bad"]}


DROPOUT: dict[str, dict[str, Any]] = {
    "bert": {"hidden_dropout_prob": 0.5, "attention_probs_dropout_prob": 0.5},
    "llama": {"classifier_dropout": 0.5},
    "t5": {"dropout_rate": 0.5},
    "bart": {"dropout": 0.5, "attention_dropout": 0.5},
}


def _masks_of_what_all_ranks_have() -> list[Tensor]:
    """What the dropout behind the embeddings makes of a tensor that is no batch of tokens, while a rank's own stream runs."""
    fresh_groups()
    model = tiny_of("bert", head="masked-lm", hidden_dropout_prob=0.5).train()
    ds_seqpar.shard(model, {"tp_size": 2})
    state: ShardingState = model.seqpar
    masks = []
    for region in (state.region_for(2, 8), None):
        with state.within(region), state.random.fork(3, per_rank=True):
            masks.append(model.bert.embeddings.dropout(torch.ones(1, 8, 48, dtype=torch.float64)))
    return [x.detach() for x in masks]


def test_what_every_rank_has_whole_is_dropped_alike() -> None:
    for ours, theirs in zip(*run_ranks(2, _masks_of_what_all_ranks_have), strict=True):
        assert torch.equal(ours, theirs) and 0 < int((ours == 0).sum()) < ours.numel()


def _drops(model_type: str, head: str) -> dict[str, Any]:
    """One step on ranks that were seeded differently."""
    model = tiny_of(model_type, head=head, dtype=torch.float32, **DROPOUT[model_type]).train()
    engine = engine_for(model, torch.optim.SGD(model.parameters(), lr=1.0), {"tp_size": 2}, 1, 3, 1)
    torch.manual_seed(100 + dist.get_rank())
    batch = batches_for(1, 3, 7, head=head)[0]
    losses = []
    for _ in range(2):
        loss = engine(**batch).loss
        engine.backward(loss)
        losses.append(float(loss.detach()))
    engine.step()
    return {"losses": losses, "replicas": replicas_equal(engine, ())}


@pytest.mark.parametrize(
    ("model_type", "head"),
    [("bert", "sequence-classification"), ("llama", "token-classification"), ("t5", "seq2seq-lm"), ("bart", "seq2seq-lm")],
)  # fmt: skip
def test_dropout_leaves_the_ranks_agreed(model_type: str, head: str) -> None:
    first, second = run_ranks(2, _drops, model_type, head)
    assert first["losses"] == second["losses"]
    assert first["losses"][0] != first["losses"][1], "nothing was dropped"
    assert first["replicas"] and second["replicas"]
