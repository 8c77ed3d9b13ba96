"""Dropout: masks differ where tokens or heads differ, agree where activations are replicated, and are replayed by recompute."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as functional
from exactness import engine_for
from models import batches, tiny
from ranks import run_ranks

import ds_seqpar

OWN = dict(hidden_dropout=0.5, attention_dropout=0.5, num_attention_heads=4, attn_implementation="eager")


def dropout_step(key: dict[str, Any], seed: int = 5, steps: int = 1) -> dict[str, Any]:
    """One training step with every dropout mask recorded, in forward and (recomputed) in backward."""
    model = tiny("gpt_neox", **OWN).train()
    engine = engine_for(model, torch.optim.SGD(model.parameters(), lr=0.1), {"tp_size": 2, **key}, 1, 2, 1)
    masks: list[tuple[tuple[int, ...], bytes]] = []
    plain = functional.dropout

    def recording(x: torch.Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> torch.Tensor:
        mask = plain(torch.ones(x.shape if type(x) is torch.Tensor else x.source.shape, device=x.device), p, training)
        masks.append((tuple(mask.shape), mask.cpu().numpy().tobytes()))
        return x * mask if type(x) is torch.Tensor else x._apply(lambda shard: shard * mask)

    functional.dropout = recording
    try:
        torch.manual_seed(seed)
        losses, forward = [], 0
        for batch in batches(steps, 2, 6):
            loss = engine(**batch).loss
            forward = forward or len(masks)
            engine.backward(loss)
            engine.step()
            losses.append(float(loss.detach()))
    finally:
        functional.dropout = plain
    state = ds_seqpar.full_state_dict(engine)
    return {
        "losses": losses,
        "forward": masks[:forward],
        "backward": masks[forward:],
        "weights": state,
        "after": float(torch.rand(())),
    }


def masks_of_parts_differ(first: dict[str, Any], second: dict[str, Any]) -> None:
    """Asserts of two ranks' sequence-parallel step that no mask is the same on both."""
    assert len(first["forward"]) == 1 + 2 * 3  # the embedding's; attention, attention's output and MLP's of two layers
    for (shape, mine), (other, theirs) in zip(first["forward"], second["forward"], strict=True):
        assert shape == other
        assert mine != theirs, f"the mask of shape {shape} is the same on both ranks"
    assert first["losses"] == second["losses"]
    assert first["after"] == second["after"], "the default generator ran apart on the ranks"


def test_sequence_parallel_masks_differ_between_ranks() -> None:
    masks_of_parts_differ(*run_ranks(2, dropout_step, {}))


def masks_of_replicas_agree(first: dict[str, Any], second: dict[str, Any]) -> None:
    """Asserts of two ranks' plain tensor-parallel step that masks differ for heads, and agree for what is replicated."""
    kinds = {"replicated": 0, "heads": 0}
    for (shape, mine), (_, theirs) in zip(first["forward"], second["forward"], strict=True):
        attention = len(shape) == 4
        kinds["heads" if attention else "replicated"] += 1
        assert (mine != theirs) is attention, f"mask of shape {shape}"
    assert kinds == {"replicated": 5, "heads": 2}
    assert first["losses"] == second["losses"]


def test_plain_tensor_parallel_masks_differ_by_head_only() -> None:
    masks_of_replicas_agree(*run_ranks(2, dropout_step, {"sequence_parallel": False}))


def test_recompute_replays_the_masks_and_a_seed_repeats_the_run() -> None:
    kept = run_ranks(2, dropout_step, {}, 5, 3)
    for again in (run_ranks(2, dropout_step, {}, 5, 3), run_ranks(2, dropout_step, {"recompute": "full"}, 5, 3)):
        for a, b in zip(kept, again, strict=True):
            assert a["losses"] == b["losses"]
            assert a["forward"] == b["forward"]
            for name, weight in a["weights"].items():
                assert torch.equal(weight, b["weights"][name]), name
    other = run_ranks(2, dropout_step, {}, 6, 3)
    assert kept[0]["losses"] != other[0]["losses"]


def test_recomputed_masks_are_the_forwards() -> None:
    for result in run_ranks(2, dropout_step, {"recompute": "full"}):
        inside_layers = result["forward"][1:]
        assert sorted(result["backward"]) == sorted(inside_layers)
