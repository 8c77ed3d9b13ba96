"""Per-token figures of the vocabulary-parallel head, and their gradients, are the unsharded head's."""

from __future__ import annotations

import types
from typing import Any

import pytest
import torch
import torch.distributed as dist
from models import batches
from ranks import RankError, run_ranks
from sharding import relative_error, same_loss_and_gradients, twins

import ds_seqpar
from ds_seqpar.layers.logprobs import TokenFigures


def _expected(logits: torch.Tensor, targets: torch.Tensor) -> TokenFigures:
    log_p = logits.log_softmax(-1)
    return TokenFigures(
        log_p.gather(-1, targets.unsqueeze(-1)).squeeze(-1), -(log_p.exp() * log_p).sum(-1),
        log_p.mul(2).exp().sum(-1).log(), logits.mean(-1), logits.argmax(-1) == targets,
    )  # fmt: skip


def _figures(model: Any, sharded: bool, key: str) -> TokenFigures:
    batch = batches(1, 2)[0]
    targets = batch["input_ids"].reshape(-1).clone()
    hidden = model.model(batch["input_ids"], attention_mask=batch["attention_mask"]).last_hidden_state
    logits = model.lm_head(hidden)
    act = lambda z: 2.0 * (z * 0.7 / 2.0).tanh() / 0.5  # noqa: E731
    if not sharded:
        real = act(logits).view(-1, logits.shape[-1])
        targets[0] = real[0].argmax()
        return _expected(real, targets)
    targets[0] = act(logits.head(hidden).materialise()).view(-1, logits.shape[-1])[0].argmax() if key else targets[0]
    return logits.head.token_figures(
        logits.source, logits.region, targets, vocab_size=101, chunk_tokens=4, transforms=(act,)
    )  # fmt: skip


def _compare(family: str, key: dict[str, Any]) -> None:
    model, reference = twins(family, key=key)

    def loss(of: Any) -> torch.Tensor:
        figures = _figures(of, of is model, "top1")
        weights = torch.linspace(0.5, 2.0, figures.log_probs.numel(), dtype=torch.float64)
        return (figures.log_probs * weights).sum() + 0.3 * (figures.entropy * weights.flip(0)).sum()

    mine, theirs = _figures(model, True, "top1"), _figures(reference, False, "")
    for name in ("log_probs", "entropy", "log_sum_sq_probs", "mean_logits"):
        assert relative_error(getattr(mine, name).detach(), getattr(theirs, name).detach()) < 1e-6, name
    assert torch.equal(mine.is_top1, theirs.is_top1) and bool(mine.is_top1.any()) and not bool(mine.is_top1.all())
    same_loss_and_gradients(model, reference, loss)


@pytest.mark.parametrize("tp", [2, 3])
@pytest.mark.parametrize("key", [{}, {"sequence_parallel": False}], ids=["", "tp only"])
def test_token_figures_and_their_gradients_are_the_unsharded_models(tp: int, key: dict[str, Any]) -> None:
    run_ranks(tp, _compare, "llama", key, timeout=60)


def _replaced() -> None:
    from models import tiny

    model = tiny("llama")
    plain = model.forward
    model.forward = types.MethodType(lambda self, *args, **kwargs: plain(*args, **kwargs), model)
    ds_seqpar.shard(model, {"tp_size": dist.get_world_size()})


def test_an_unknown_forward_on_the_model_object_is_refused() -> None:
    with pytest.raises(RankError, match=r"object was replaced by test_logprobs.<lambda>"):
        run_ranks(2, _replaced, timeout=60)
