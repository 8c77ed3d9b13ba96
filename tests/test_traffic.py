"""What travels and what is kept: number and bytes of the collectives of a layer, and the tensors saved for backward."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
import torch.distributed as dist
from exactness import engine_for
from model_types import batches_for
from models import batches, tiny
from ranks import ON_GPU, live_tensors, run_ranks

from ds_seqpar.comm import collectives

HIDDEN, SEQ = 48, 8
COLLECTIVES: dict[str, Any] = {"overlap": "off"} if ON_GPU else {}
"""Rows that the copy engines move are no collectives, and the memory that they read is kept from step to step."""


def _count(layers: int, tp: int, key: dict[str, Any], family: str = "llama") -> dict[str, Counter[str]]:
    """Calls and elements of each collective in forward and in backward of one step."""
    batch = batches(1, 2, SEQ)[0]
    batch.pop("attention_mask")
    return _counted(tiny(family, num_hidden_layers=layers, **_own(family)).train(), batch, tp, key)


def _counted(model: Any, batch: dict[str, torch.Tensor], tp: int, key: dict[str, Any]) -> dict[str, Counter[str]]:
    engine = engine_for(model, torch.optim.SGD(model.parameters(), lr=1.0), {"tp_size": tp, **COLLECTIVES, **key}, 1, 2, 1)
    counts: dict[str, Counter[str]] = {"forward": Counter(), "backward": Counter()}
    phase = "forward"
    plain = collectives._all_gather, collectives._reduce_scatter, dist.all_reduce

    def all_gather(out: Any, x: Any, **kwargs: Any) -> Any:
        counts[phase].update({"all_gather": 1, "all_gather elements": out.numel(), f"all_gather of {out.numel()}": 1})
        return plain[0](out, x, **kwargs)

    def reduce_scatter(out: Any, x: Any, **kwargs: Any) -> Any:
        of_size = f"reduce_scatter of {x.numel()}"
        counts[phase].update({"reduce_scatter": 1, "reduce_scatter elements": x.numel(), of_size: 1})
        return plain[1](out, x, **kwargs)

    def all_reduce(tensor: Any, *args: Any, **kwargs: Any) -> Any:
        if kwargs.get("group") is engine.module.seqpar.groups.tp_group:  # ZeRO's own are over the data-parallel group
            counts[phase].update({"all_reduce": 1, "all_reduce elements": tensor.numel()})
        return plain[2](tensor, *args, **kwargs)

    collectives._all_gather, collectives._reduce_scatter, dist.all_reduce = all_gather, reduce_scatter, all_reduce
    try:
        loss = engine(**batch).loss
        phase = "backward"
        engine.backward(loss)
    finally:
        collectives._all_gather, collectives._reduce_scatter, dist.all_reduce = plain
    return counts


def _own(family: str) -> dict[str, Any]:
    """The experts' own default, grouped products; no auxiliary loss, whose tokens are counted elsewhere."""
    return (
        {}
        if family == "llama"
        else {"experts": None, "intermediate_size": 56, "dtype": torch.float32, "output_router_logits": False}
    )


def _per_layer(tp: int, key: dict[str, Any], family: str = "llama") -> dict[str, dict[str, int]]:
    two, three = (run_ranks(tp, _count, layers, tp, key, family)[0] for layers in (2, 3))
    return {
        phase: {n: three[phase][n] - two[phase][n] for n in three[phase] if three[phase][n] != two[phase][n]}
        for phase in ("forward", "backward")
    }


@pytest.mark.parametrize("tp", [2, 4])
def test_a_layer_gathers_and_scatters_twice_and_regathers_twice_in_backward(tp: int) -> None:
    layer = _per_layer(tp, {})
    block = 2 * SEQ * HIDDEN  # T*h elements
    assert layer["forward"]["all_gather"] == layer["forward"]["reduce_scatter"] == 2
    assert layer["forward"]["all_gather elements"] == layer["forward"]["reduce_scatter elements"] == 2 * block
    assert layer["forward"].get("all_reduce", 0) == 0
    assert layer["backward"]["all_gather"] == 4  # dy of o and down, and the inputs of q,k,v and gate,up again
    assert layer["backward"]["reduce_scatter"] == 2
    assert layer["backward"]["all_gather elements"] == 4 * block
    assert layer["backward"]["reduce_scatter elements"] == 2 * block
    # both norms and the two row biases in the one of the whole forward, h elements each; with more ranks than kv heads, the
    # copied k, v weights and biases by themselves
    assert layer["backward"].get("all_reduce", 0) == (0 if tp == 2 else 4)
    if tp == 2:
        assert layer["backward"]["all_reduce elements"] == 4 * HIDDEN


def test_a_layer_with_experts_gathers_and_scatters_as_often_as_a_dense_one() -> None:
    layer = _per_layer(2, {}, "mixtral")
    block = 2 * SEQ * HIDDEN
    assert layer["forward"]["all_gather"] == layer["forward"]["reduce_scatter"] == 2
    assert layer["forward"]["all_gather elements"] == layer["forward"]["reduce_scatter elements"] == 2 * block
    assert layer["forward"].get("all_reduce", 0) == 0
    assert layer["backward"]["all_gather"] == 3  # dy of o and of the experts, and the input of q,k,v again
    assert layer["backward"]["reduce_scatter"] == 2
    assert layer["backward"]["reduce_scatter elements"] == 2 * block
    # the gradient of two weights for each token, which makes the router's complete; both norms in the one of the whole forward
    assert layer["backward"]["all_reduce"] == 1
    assert layer["backward"]["all_reduce elements"] == 2 * HIDDEN + 2 * SEQ * 2


def _count_stacks(model_type: str, decoder_layers: int) -> dict[str, Counter[str]]:
    name = {"t5": "num_decoder_layers", "bart": "decoder_layers"}[model_type]
    model = tiny(model_type, head="seq2seq-lm", **{name: decoder_layers}).train()
    return _counted(model, batches_for(1, 2, SEQ, head="seq2seq-lm")[0], 2, {})


@pytest.mark.parametrize("model_type", ["bart", "t5"])
def test_the_encoders_output_is_gathered_once_for_all_cross_attentions(model_type: str) -> None:
    one, three = (run_ranks(2, _count_stacks, model_type, layers)[0] for layers in (1, 3))
    source, target = (f"of {2 * seq * HIDDEN}" for seq in (SEQ, SEQ - 2))  # T*h elements
    for counts in (one, three):
        # attention and MLP of the encoder's two layers, and its output
        assert counts["forward"][f"all_gather {source}"] == 5
        # the same, and the embedding in place of the output
        assert counts["forward"][f"reduce_scatter {source}"] == 5
        # the same, and the sum of the gradients of all cross-attentions
        assert counts["backward"][f"reduce_scatter {source}"] == 5
    for phase, gathers in (("forward", 3), ("backward", 6)):  # self-attention, cross-attention, MLP; again in backward
        more = {n: three[phase][n] - one[phase][n] for n in three[phase] if three[phase][n] != one[phase][n]}
        assert more[f"all_gather {target}"] == 2 * gathers
        assert more[f"reduce_scatter {target}"] == 2 * 3
        assert not any(name.endswith(source) for name in more)


def test_plain_tensor_parallelism_all_reduces_twice_each_way() -> None:
    layer = _per_layer(2, {"sequence_parallel": False})
    block = 2 * SEQ * HIDDEN
    for phase in ("forward", "backward"):
        assert layer[phase] == {"all_reduce": 2, "all_reduce elements": 2 * block}


def _saved(tp: int, key: dict[str, Any], family: str = "llama") -> list[tuple[int, ...]]:
    model = tiny(family, **{"intermediate_size": 56, **_own(family)}).train()
    engine = engine_for(model, torch.optim.SGD(model.parameters(), lr=1.0), {"tp_size": tp, **COLLECTIVES, **key}, 1, 2, 1)
    parameters = {p.data_ptr() for p in model.parameters()}
    before = {id(x): x for x in live_tensors() if type(x) is torch.Tensor}  # kept, so that no new one gets its id
    shapes = []

    def pack(x: torch.Tensor) -> torch.Tensor:
        if x.data_ptr() not in parameters:
            shapes.append(tuple(x.shape))
        return x

    batch = batches(1, 2, 16)[0]
    batch.pop("attention_mask")
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        output = engine(**batch)
    # What nodes of the graph hold by attribute; integers are generator states and masks.
    alive = [x for x in live_tensors() if type(x) is torch.Tensor and x.is_floating_point()]
    assert output.loss.requires_grad
    return shapes + [tuple(x.shape) for x in alive if id(x) not in before]


@pytest.mark.parametrize("recompute", ["selective", "full"])
def test_experts_that_are_recomputed_keep_their_input_shard_alone(recompute: str) -> None:
    for shapes in run_ranks(3, _saved, 3, {"recompute": recompute}, "mixtral"):
        too_large = [
            s for s in shapes if torch.Size(s).numel() >= 2 * 16 * HIDDEN and s not in ((34, HIDDEN), (33, HIDDEN))
        ]
        assert shapes and not too_large, f"saved for backward: {too_large}"


@pytest.mark.parametrize("key", [{}, {"recompute": "selective"}, {"recompute": "full"}])
def test_nothing_of_full_length_and_full_width_is_saved_for_backward(key: dict[str, Any]) -> None:
    tokens, head_gradient = (
        2 * 16,
        ((34, HIDDEN), (33, HIDDEN)),
    )  # the fused loss makes the head's weight gradient in forward
    for shapes in run_ranks(3, _saved, 3, key):
        assert shapes
        too_large = [s for s in shapes if torch.Size(s).numel() >= tokens * HIDDEN and s not in head_gradient]
        assert not too_large, f"saved for backward: {too_large}"
        logits = [s for s in shapes if s and s[-1] in (101, 34, 33) and torch.Size(s).numel() >= tokens * 33]
        assert not logits, f"logits are kept: {logits}"


def _held(key: dict[str, Any]) -> int:
    """Bytes kept for backward by one layer more."""
    totals = []
    for layers in (2, 3):
        model = tiny("llama", num_hidden_layers=layers).train()
        engine = engine_for(model, torch.optim.SGD(model.parameters(), lr=1.0), {"tp_size": 2, **COLLECTIVES, **key}, 1, 2, 1)
        parameters = {p.data_ptr() for p in model.parameters()}
        kept: dict[int, int] = {}

        def pack(x: torch.Tensor, kept: dict[int, int] = kept, parameters: set[int] = parameters) -> torch.Tensor:
            if x.data_ptr() not in parameters:
                kept[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
            return x

        batch = batches(1, 2, 16)[0]
        batch.pop("attention_mask")
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            output = engine(**batch)
        totals.append(sum(kept.values()))
        del output
    return totals[1] - totals[0]


def test_recompute_keeps_less_and_full_keeps_the_input_shard_alone() -> None:
    none, selective, full = (run_ranks(2, _held, {"recompute": r})[0] for r in ("none", "selective", "full"))
    assert full < selective < none
    # non-reentrant checkpointing holds its input outside saved tensors: nothing of a recomputed layer is in them but generator state
    assert full <= 2 * 16 // 2 * HIDDEN * 4 + 16384


@pytest.mark.skipif(ON_GPU, reason="what a GPU's attention kernel keeps beside is its own; run without a GPU")
def test_a_layer_keeps_what_it_must_and_no_more() -> None:
    """Residual inputs of both norms, q, k, v, attention output, gate, up; on the first of two ranks, which has 4 of 6 heads."""
    tokens, rows, q, kv, intermediate = 2 * 16, 16, 4 * 8, 2 * 8, 25
    must = 4 * (2 * rows * HIDDEN + tokens * (2 * q + 2 * kv + 2 * intermediate))
    # One number a row of each norm, where a kernel makes it, and one a row and head of the softmax.
    statistics = 4 * (2 * rows * ON_GPU + 4 * tokens)
    held = run_ranks(2, _held, {})[0]
    assert held == must + statistics
