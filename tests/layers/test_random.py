"""Forked random streams: apart inside, together again outside, and from a row-parallel linear on where its output is replicated."""

from __future__ import annotations

import torch
from exactness import fresh_groups
from models import device, tiny
from ranks import run_ranks

import ds_seqpar


def _streams() -> dict[str, float]:
    fresh_groups()
    model = tiny("llama")
    ds_seqpar.shard(model, {"tp_size": 2, "sequence_parallel": False})
    state, draws = model.seqpar, {}
    torch.manual_seed(7)
    draws["first"], draws["second"] = float(torch.rand(())), float(torch.rand(()))
    torch.manual_seed(7)
    with state.random.fork(11, per_rank=True):
        draws["apart"] = float(torch.rand(()))
    draws["after"] = float(torch.rand(()))
    with state.random.fork(11, per_rank=False):
        draws["together"] = float(torch.rand(()))
    torch.manual_seed(7)
    with state.random.fork(11, per_rank=True), torch.no_grad():
        state.block_forked = True  # as a block does that opened the fork
        row = model.model.layers[0].mlp.down_proj
        row(torch.ones(1, 3, row.in_features, device=device()))
        draws["after the row"] = float(torch.rand(()))
    return draws


def test_streams_are_apart_inside_a_fork_only() -> None:
    first, second = run_ranks(2, _streams)
    assert first["apart"] != second["apart"]
    for name in ("together", "after", "after the row"):
        assert first[name] == second[name], name
    assert first["after"] == first["second"], "a fork that drew is followed by one draw outside"
    assert first["after the row"] == first["first"], "a fork that drew nothing leaves the stream where it was"
