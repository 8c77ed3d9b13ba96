"""What TransformerEngine's distributed numerics promise of its modules, asked of ours: outputs and all gradients of one device.

Column and row linears, a norm, norm + MLP and a whole layer; sequence parallel on and off; their tolerances (fp32: 1e-3
relative, 1e-5 absolute; bf16: 1.6e-2 and 1e-5), and ours in float64.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from ranks import run_ranks
from sharding import full_gradients, twins
from torch import Tensor

from ds_seqpar.checkpoint.gathering import part_of
from ds_seqpar.comm.regions import gather_columns
from ds_seqpar.layers.linear import column_parallel

UNITS = ("column linear", "row linear", "norm", "norm and MLP", "layer")
THEIRS = {torch.float32: (1e-3, 1e-5), torch.bfloat16: (1.6e-2, 1e-5), torch.float64: (1e-6, 1e-9)}


def _sharded(model: Any, unit: str, x: Tensor, rotary: Any) -> Tensor:
    """The unit's whole output [b, s, ...] on every rank."""
    layer, state = model.model.layers[0], model.seqpar
    region = state.region_for(*x.shape[:2])
    with state.within(region), state.partial.in_model(model.model, by_layer=False):
        if unit == "layer":
            y = layer(x, position_embeddings=rotary, attention_mask=None)
            return y.materialise("test") if hasattr(y, "materialise") else y  # type: ignore[no-any-return]
        if unit == "row linear":
            cut = state.entries[id(layer.mlp.down_proj.weight)].cut
            start, stop = cut.ranges[state.groups.tp_rank][0]
            return region.full_for_replicated(layer.mlp.down_proj(x[..., start:stop]))  # type: ignore[no-any-return]
        local = region.local_of_replicated(x)
        if unit == "column linear":
            (mine,) = column_parallel(local, region, [layer.mlp.up_proj])
            cut = state.entries[id(layer.mlp.up_proj.weight)].cut
            widths = tuple(cut.local_size(rank) for rank in range(state.groups.tp_size))
            whole = gather_columns(mine.reshape(region.tokens, -1), widths, state.groups.tp_group)
            return whole.view(*x.shape[:2], -1)
        y = layer.post_attention_layernorm(local)
        return region.full_for_replicated(layer.mlp(y) if unit == "norm and MLP" else y)  # type: ignore[no-any-return]


def _plain(model: Any, unit: str, x: Tensor, rotary: Any) -> Tensor:
    layer = model.model.layers[0]
    if unit == "layer":
        return layer(x, position_embeddings=rotary, attention_mask=None)  # type: ignore[no-any-return]
    if unit in ("row linear", "column linear"):
        return (layer.mlp.down_proj if unit == "row linear" else layer.mlp.up_proj)(x)  # type: ignore[no-any-return]
    y = layer.post_attention_layernorm(x)
    return layer.mlp(y) if unit == "norm and MLP" else y  # type: ignore[no-any-return]


def _numerics(sequence_parallel: bool, dtype: torch.dtype) -> None:
    rtol, atol = THEIRS[dtype]
    for unit in UNITS:
        model, reference = twins(
            "llama", key={"sequence_parallel": sequence_parallel}, dtype=dtype, num_hidden_layers=1
        )
        generator = torch.Generator().manual_seed(4)
        width, out = (50, 48) if unit == "row linear" else (48, 50 if unit == "column linear" else 48)
        x = torch.randn(2, 7, width, generator=generator).to(dtype)
        dy = torch.randn(2, 7, out, generator=generator).to(dtype)
        rotary = reference.model.rotary_emb(x, torch.arange(7)[None])
        mine, theirs = x.clone().requires_grad_(), x.clone().requires_grad_()
        y, expected = _sharded(model, unit, mine, rotary), _plain(reference, unit, theirs, rotary)
        torch.testing.assert_close(y, expected, rtol=rtol, atol=max(atol, rtol * float(expected.detach().abs().max())))
        y.backward(dy)
        expected.backward(dy)
        gradients = full_gradients(model)
        if unit == "row linear":  # each rank's gradient of its own columns of the input
            dist.all_reduce(mine.grad)
        pairs = [("input", mine.grad, theirs.grad)] + [
            (n, gradients[n], p.grad) for n, p in reference.named_parameters()
        ]
        seen = 0
        for name, grad, wanted in pairs:
            assert (grad is None) == (wanted is None), f"{unit}: {name}"
            if grad is not None and wanted is not None:
                seen += 1
                largest = float(wanted.abs().max())
                torch.testing.assert_close(
                    grad, wanted, rtol=rtol, atol=max(atol, rtol * largest), msg=f"{unit}: {name}"
                )
        assert seen == {"column linear": 3, "row linear": 3, "norm": 2, "norm and MLP": 8, "layer": 17}[unit], (
            unit,
            seen,
        )


@pytest.mark.parametrize("sequence_parallel", [True, False])
@pytest.mark.parametrize("dtype", list(THEIRS))
def test_outputs_and_all_gradients_are_those_of_one_device(sequence_parallel: bool, dtype: torch.dtype) -> None:
    run_ranks(2, _numerics, sequence_parallel, dtype)


def _part_of_a_part() -> None:
    """The parts that the ranks hold of a weight are the weight."""
    model, reference = twins("llama", num_hidden_layers=1)
    for name, parameter in model.named_parameters():
        cut = model.seqpar.entries[id(parameter)].cut
        whole = reference.get_parameter(name)
        assert torch.equal(parameter, whole if cut is None else part_of(whole, cut, model.seqpar.groups.tp_rank)), name


def test_weights_are_distributed_as_they_were() -> None:
    run_ranks(3, _part_of_a_part)
