"""Exact in every mode of the key and every way a user's loop may differ."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.distributed as dist
from exactness import change_errors, compare_adamw, compare_sgd, engine_for
from models import batches, device, tiny
from ranks import run_ranks
from transformers.models.llama.modeling_llama import LlamaMLP

import ds_seqpar


def _assert_exact(results: list[dict[str, float]]) -> None:
    bad = {
        f"rank {rank}, {name}": e for rank, errors in enumerate(results) for name, e in errors.items() if not e <= 1e-5
    }
    assert not bad, bad


@pytest.mark.parametrize(
    "key", [{"sequence_parallel": False}, {"recompute": "selective"}, {"overlap": "off"}, {"loss_chunk_tokens": 1}]
)
@pytest.mark.parametrize("family", ["llama", "qwen3", "gpt_neox"])
def test_modes_of_the_key(family: str, key: dict[str, Any]) -> None:
    _assert_exact(run_ranks(2, _sgd, family, 2, key, {}, 7, 1))


@pytest.mark.parametrize(
    ("family", "tp"), [("olmo2", 3), ("olmo2", 4), ("qwen2", 3), ("qwen2", 4), ("phi3", 3), ("gpt_neox", 4)]
)
def test_more_ranks_than_divide(family: str, tp: int) -> None:
    _assert_exact(run_ranks(tp, _sgd, family, tp, {}, {}, 7, 1))


@pytest.mark.parametrize(("tp", "own", "seq", "micro"), [
    (2, {"tie_word_embeddings": False}, 7, 1),
    (4, {}, 3, 1),  # fewer tokens than ranks
    (2, {}, 5, 3),
    (2, {"num_attention_heads": 9, "num_key_value_heads": 3, "hidden_size": 72}, 6, 1),  # SmolLM2's heads
    (2, {"attn_implementation": "eager"}, 7, 2),
    (4, {"attn_implementation": "eager"}, 7, 2),  # repeats its kv head by the count on this rank
    pytest.param(8, {"num_attention_heads": 8, "num_key_value_heads": 4}, 17, 2, marks=pytest.mark.slow),
    pytest.param(8, {"num_attention_heads": 16, "num_key_value_heads": 8}, 5, 1, marks=pytest.mark.slow),
])  # fmt: skip
def test_shapes(tp: int, own: dict[str, Any], seq: int, micro: int) -> None:
    _assert_exact(run_ranks(tp, _sgd, "llama", tp, {}, own, seq, micro))


def _sgd(family: str, tp: int, key: dict[str, Any], own: dict[str, Any], seq: int, micro: int) -> dict[str, float]:
    return compare_sgd(family, tp, 1, key=key, own=own, seq=seq, micro=micro)


def _reentrant(reentrant: bool) -> dict[str, float]:
    model, reference = tiny("llama").train(), tiny("llama").train()
    engine = engine_for(model, torch.optim.SGD(model.parameters(), lr=1.0), {"tp_size": 2}, 1, 2, 1)
    engine.module.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    before = {n: p.detach().cpu().clone() for n, p in reference.named_parameters()}
    batch = batches(1, 2)[0]
    engine.module.enable_input_require_grads()
    loss = engine(**batch).loss
    with torch.no_grad():
        engine(**batches(1, 1, 4, seed=9)[0])  # another forward, of another shape, before backward recomputes
    engine.backward(loss)
    engine.step()
    reference(**batch).loss.backward()
    after = ds_seqpar.full_state_dict(engine)
    if dist.get_rank():
        return {}
    return change_errors(
        before, after, {n: -p.grad.cpu() for n, p in reference.named_parameters() if p.grad is not None}
    )


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_as_hugging_face_spells_it(reentrant: bool) -> None:
    _assert_exact(run_ranks(2, _reentrant, reentrant))


def _losses(tp: int, bf16: bool) -> list[float]:
    sizes = dict(num_attention_heads=8, num_key_value_heads=4, hidden_size=128, head_dim=16, intermediate_size=128)
    model = tiny("llama", **sizes).bfloat16().float().train()
    options = dict(lr=1e-3, betas=(0.9, 0.95), weight_decay=0.1)
    key = {"tp_size": tp} if tp > 1 else {"tp_size": 1, "enabled": False}
    engine = engine_for(
        model,
        torch.optim.AdamW(model.parameters(), **options),
        key,
        1,
        2,
        1,
        bf16={"enabled": bf16},
        gradient_clipping=1.0,
    )
    losses = []
    for batch in batches(1, 2, 16) * 20:
        loss = engine(**batch).loss
        engine.backward(loss)
        engine.step()
        losses.append(float(loss.detach()))
    return losses


@pytest.mark.parametrize("tp", [2, pytest.param(4, marks=pytest.mark.slow), pytest.param(8, marks=pytest.mark.slow)])
def test_bf16_losses_track_the_unsharded_run_within_rounding(tp: int) -> None:
    (expected,), (exact,) = run_ranks(1, _losses, 1, True), run_ranks(1, _losses, 1, False)
    # Rounding differently is all that ours may do: it is no further away than rounding takes the unsharded run.
    rounding = max(abs(b - c) / c for b, c in zip(expected, exact, strict=True))
    assert rounding < 2**-6
    for ours in run_ranks(tp, _losses, tp, True):
        assert expected[-1] < 0.9 * expected[0], "the run must learn something"
        for step, (a, b) in enumerate(zip(ours, expected, strict=True)):
            assert abs(a - b) <= rounding * abs(b), f"step {step}: {a} against {b}"


def test_adamw_with_plain_tensor_parallelism() -> None:
    results = run_ranks(2, _adamw_plain)
    bad = {
        n: e
        for errors in results
        for n, e in errors.items()
        if not e <= (1e-5 if n.startswith(("loss", "norm")) else 1e-4)
    }
    assert not bad, bad


def _adamw_plain() -> dict[str, float]:
    return compare_adamw("qwen3", 2, 2, key={"sequence_parallel": False})


def _odd_code(which: str) -> dict[str, float]:
    """Model code that leaves the fast path: right all the same, and counted."""
    with pytest.MonkeyPatch.context() as patch:
        if which == "clones its input":
            forward = LlamaMLP.forward
            patch.setattr(LlamaMLP, "forward", lambda self, x: forward(self, x.clone()))
        return _odd_step(which)


def _odd_step(which: str) -> dict[str, float]:
    model, reference = tiny("llama").train(), tiny("llama").train()
    engine = engine_for(model, torch.optim.SGD(model.parameters(), lr=1.0), {"tp_size": 2}, 1, 2, 1)
    before = {n: p.detach().cpu().clone() for n, p in reference.named_parameters()}
    batch = batches(1, 2)[0]

    def loss_of(each: Any) -> torch.Tensor:
        if which == "norm on whole hidden states":
            hidden = each.model(input_ids=batch["input_ids"]).last_hidden_state * 1.0
            return (each.model.norm(hidden.view(2, -1, hidden.shape[-1]).contiguous()) ** 2).mean() + hidden.pow(
                2
            ).mean()
        return each(**batch).loss

    engine.backward(loss_of(engine.module))
    engine.step()
    loss_of(reference).backward()
    after = ds_seqpar.full_state_dict(engine)
    if which == "clones its input":
        assert engine.seqpar_report.materialised["GatheredInput.clone"] == 2
    if dist.get_rank():
        return {}
    return change_errors(
        before, after, {n: -p.grad.cpu() for n, p in reference.named_parameters() if p.grad is not None}
    )


@pytest.mark.parametrize("which", ["clones its input", "norm on whole hidden states"])
def test_code_that_leaves_the_fast_path_stays_exact(which: str) -> None:
    results = run_ranks(2, _odd_code, which)
    assert results[0]
    _assert_exact(results)


def _auxiliary(stage: int, which: str) -> dict[str, float]:
    """Losses over more than the logits, and more than one forward before a backward."""
    model, reference = tiny("gpt_neox").train(), tiny("gpt_neox").train()
    if which == "frozen up to the blocks":
        for each in (model, reference):
            for name, parameter in each.named_parameters():
                parameter.requires_grad = "query_key_value" in name or "dense" in name
    engine = engine_for(
        model, torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0), {"tp_size": 2}, stage, 2, 1
    )
    before = {n: p.detach().cpu().clone() for n, p in reference.named_parameters()}
    first, second = batches(2, 2)

    def loss_of(each: Any) -> torch.Tensor:
        if which == "hidden states":
            output = each(**first, output_hidden_states=True)
            return output.loss + output.hidden_states[-1].pow(2).mean() + output.hidden_states[1].pow(2).mean()  # type: ignore[no-any-return]
        if which == "two forwards":
            return each(**first).loss + 0.5 * each(**second).loss  # type: ignore[no-any-return]
        return each(**first).loss  # type: ignore[no-any-return]

    engine.backward(loss_of(engine))
    engine.step()
    loss_of(reference).backward()
    after = ds_seqpar.full_state_dict(engine)
    if dist.get_rank():
        return {}
    return change_errors(
        before, after, {n: -p.grad.cpu() for n, p in reference.named_parameters() if p.grad is not None}
    )


@pytest.mark.parametrize("stage", [1, 2, 3])
@pytest.mark.parametrize("which", ["hidden states", "two forwards", "frozen up to the blocks"])
def test_losses_over_more_than_one_forwards_logits(stage: int, which: str) -> None:
    results = run_ranks(2, _auxiliary, stage, which)
    assert results[0]
    _assert_exact(results)


def _misuse(managed: bool) -> dict[str, str]:
    model = tiny("llama").train()
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    engine = engine_for(model, optimizer, {"tp_size": 2}, 1, 2, 1, managed_gradient_accumulation=managed)
    batch = batches(1, 2)[0]
    said = {}

    def expect(name: str, error: type[Exception], act: Any) -> None:
        with pytest.raises(error) as caught:
            act()
        said[name] = str(caught.value)

    expect("copy", ds_seqpar.SeqParError, lambda: copy.deepcopy(engine.module))
    expect("resize", ds_seqpar.PlanError, lambda: engine.module.resize_token_embeddings(110))
    bad = {**batch, "input_ids": batch["input_ids"] + 100}
    if device().type == "cpu":  # on a GPU it is a device-side assertion, as in torch, which ends the process
        expect("ids", IndexError, lambda: engine(**bad))
    else:
        said["ids"] = "outside the vocabulary of 101"
    output = engine(**batch)
    engine.backward(output.loss)
    engine.step()
    expect("late logits", ds_seqpar.SeqParError, lambda: output.logits.argmax(-1))
    output = engine(**batch)

    class Doubled(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
            return x.detach()

        @staticmethod
        def backward(ctx: Any, dy: torch.Tensor) -> torch.Tensor:
            return 2 * dy

    expect("below Python", ds_seqpar.SeqParError, lambda: Doubled.apply(output.logits).sum().backward())
    return said


@pytest.mark.parametrize("managed", [True, False])
def test_misuse_that_would_be_silent_is_an_error(managed: bool) -> None:
    for said in run_ranks(2, _misuse, managed):
        assert len(said) == 5
        assert "checkpoint" in said["copy"]
        assert "before deepspeed.initialize" in said["resize"]
        assert "outside the vocabulary of 101" in said["ids"]
        assert "before the step" in said["late logits"]
        assert "materialise" in said["below Python"]


def _built_apart() -> str:
    model = tiny("llama", seed=dist.get_rank())
    with pytest.raises(ds_seqpar.PlanError) as caught:
        engine_for(model, None, {"tp_size": 2}, 1, 1, 1)
    assert model.lm_head.weight.shape[0] == 101, "nothing was touched"
    return str(caught.value)


def test_models_that_differ_between_ranks_are_refused() -> None:
    for said in run_ranks(2, _built_apart):
        assert "embed_tokens.weight differs" in said
        assert "seed" in said
