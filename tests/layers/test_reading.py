"""Reading an output is a collective: where the ranks do different things, all of them are told, and none waits for ever."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from models import batches
from ranks import run_ranks
from sharding import twins

from ds_seqpar import SeqParError

READS: dict[str, Callable[[Any], Any]] = {
    "logits": lambda out: out.logits.sum(),
    "hidden states": lambda out: out.hidden_states[-1].sum(),
}


def _read_on_the_first_rank(what: str, training: bool) -> str:
    model, _ = twins()
    model.train(training)
    batch = batches(1, 2)[0]
    with torch.set_grad_enabled(training):
        out = model(**batch, output_hidden_states=True)
        with pytest.raises(SeqParError) as caught:
            if dist.get_rank() == 0:
                READS[what](out)
            else:
                model(**batch)
        model(**batch)  # the refusal left nothing behind
    return str(caught.value)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("what", list(READS))
def test_a_read_on_one_rank_is_named_on_all(what: str, training: bool) -> None:
    for said in run_ranks(2, _read_on_the_first_rank, what, training, timeout=60):
        assert "rank 0 reads" in said and "rank 1 begins a forward" in said and "outside `if rank == 0`" in said


def _left_alone() -> str:
    model, _ = twins()
    out = model(**batches(1, 2)[0])
    if dist.get_rank() == 1:
        return "left"
    with pytest.raises(SeqParError) as caught:
        out.logits.sum()
    return str(caught.value)


def test_a_read_that_others_left_is_named() -> None:
    said, _ = run_ranks(2, _left_alone, timeout=60)
    assert "rank 0 read ShardedLogits" in said and "reading is a collective" in said
