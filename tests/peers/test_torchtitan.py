"""What torchtitan's distributed-linear suite promises, asked of ours: one gather for several linears, bias once, kv heads checked."""

from __future__ import annotations

from unittest import mock

import pytest
import torch
from ranks import run_ranks
from sharding import full_gradients, relative_error, twins

from ds_seqpar.comm.exchange import Exchange


def _attention_step() -> tuple[int, int]:
    """(gathers, scatters) of one layer's forward, whose gradients were compared."""
    model, reference = twins("llama", num_hidden_layers=1)
    counts = {"gather": 0, "scatter": 0}
    plain = {name: getattr(Exchange, name) for name in counts}

    def counting(name: str):  # type: ignore[no-untyped-def]
        def call(self, *args):  # type: ignore[no-untyped-def]
            counts[name] += 1
            return plain[name](self, *args)

        return call

    x = torch.randn(2, 5, 48, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    rotary = reference.model.rotary_emb(x, torch.arange(5)[None])
    state = model.seqpar
    with mock.patch.multiple(Exchange, gather=counting("gather"), scatter=counting("scatter")):
        with state.within(state.region_for(2, 5)), state.partial.in_model(model.model, by_layer=False):
            y = model.model.layers[0](x, position_embeddings=rotary, attention_mask=None)
        forward = (counts["gather"], counts["scatter"])
    expected = reference.model.layers[0](x, position_embeddings=rotary, attention_mask=None)
    y.materialise("test").square().sum().backward()
    expected.square().sum().backward()
    mine = full_gradients(model)
    for name, parameter in reference.named_parameters():
        assert relative_error(mine[name], parameter.grad) <= 1e-6, name
    return forward


def test_all_linears_of_a_block_share_one_gather() -> None:
    for gathers, scatters in run_ranks(2, _attention_step):
        assert (gathers, scatters) == (2, 2)  # attention and MLP: q, k, v in one, gate and up in one


def _bias() -> tuple[float, float]:
    """(error of a row-parallel linear's output, error that adding its bias once more would make)."""
    model, reference = twins("llama", num_hidden_layers=1)
    mine, theirs = model.model.layers[0].mlp.down_proj, reference.model.layers[0].mlp.down_proj
    state = model.seqpar
    x = torch.randn(1, 6, 50, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    start, stop = state.entries[id(mine.weight)].cut.ranges[state.groups.tp_rank][0]
    region = state.region_for(1, 6)
    with state.within(region):
        y = region.full_for_replicated(mine(x[..., start:stop]))
    expected = theirs(x)
    return float((y - expected).norm()), float((y + theirs.bias - expected).norm())


def test_a_row_parallel_bias_is_added_once() -> None:
    for once, twice in run_ranks(3, _bias):
        assert once <= 1e-12 and twice > 0.1, "the bias must be large enough to be missed"


def _kv_heads(kv: int) -> float:
    model, reference = twins("qwen2", num_key_value_heads=kv, num_attention_heads=4 * kv)
    ids = torch.arange(1, 8)[None]
    loss, expected = (m(input_ids=ids, labels=ids).loss for m in (model, reference))
    loss.backward(), expected.backward()
    mine = full_gradients(model)
    return max(relative_error(mine[name], p.grad) for name, p in reference.named_parameters())


@pytest.mark.parametrize("kv", [1, 2, 3])
def test_fewer_kv_heads_than_ranks_work_where_theirs_raise(kv: int) -> None:
    assert max(run_ranks(4, _kv_heads, kv)) <= 1e-5
