"""Forwards do not wait for the GPU to say what is known: whether a batch without position ids is packed."""

from __future__ import annotations

import torch
from ranks import run_ranks
from sharding import relative_error, twins
from transformers import masking_utils


def _asked_and_errors() -> list[tuple[int, float]]:
    asked: list[torch.Tensor] = []
    original = masking_utils.find_packed_sequence_indices
    # Before sharding, so that the answer stands in front of it.
    masking_utils.find_packed_sequence_indices = lambda position_ids: (
        asked.append(position_ids) or original(position_ids)
    )
    model, reference = twins("llama", dtype=torch.float32)
    ids = torch.arange(2, 14).view(1, 12)
    packed = torch.tensor([[0, 1, 2, 3, 4, 0, 1, 2, 3, 0, 1, 2]])
    results = []
    for given in (
        {},
        {"position_ids": packed},
        {},
        {"position_ids": packed - packed},
        {"attention_mask": torch.ones_like(ids)},
    ):
        asked.clear()
        mine = model(input_ids=ids, use_cache=False, **given).logits + 0
        before = len(asked)
        theirs = reference(input_ids=ids, use_cache=False, **given).logits
        assert len(asked) == before + ("attention_mask" not in given), "another model asks as ever"
        results.append((before, relative_error(mine, theirs)))
    return results


def test_only_positions_that_the_caller_gave_are_looked_at() -> None:
    for results in run_ranks(2, _asked_and_errors):
        assert [asked for asked, _ in results] == [0, 1, 0, 1, 0]
        assert max(error for _, error in results) < 1e-5
