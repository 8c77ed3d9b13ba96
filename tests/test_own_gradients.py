"""Gradients that no data-parallel rank shares stay where backward made them, and nothing of the run changes by it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from exactness import engine_for
from models import batches, tiny
from ranks import ON_GPU, run_ranks
from torch import Tensor

from ds_seqpar.own_gradients import left_in_place

REMARK = "ZeRO leaves the gradients"
AS_DEEPSPEED_DOES = {"contiguous_gradients": True}


def _run(stage: int, named: dict[str, Any], precision: dict[str, Any]) -> tuple[list[Tensor], list[Tensor], bool]:
    """This rank's weights before and after steps of two micro batches (stage 2: one), clipped; and whether the report says it."""
    model = tiny("llama").train()
    engine = engine_for(
        model, torch.optim.AdamW(model.parameters(), lr=1e-2), {"tp_size": 2}, stage, 1, 3 - stage,
        zero_optimization={"stage": stage, **named}, gradient_clipping=0.1, **precision,
    )  # fmt: skip
    before = [p.detach().clone() for p in engine.module.parameters()]
    for batch in batches(4, 1, 6):
        engine.backward(engine(**batch).loss)
        engine.step()
    after = [p.detach().clone() for p in engine.module.parameters()]
    return before, after, any(REMARK in remark for remark in engine.seqpar_report.remarks)


def _same(stage: int, precision: dict[str, Any]) -> tuple[bool, bool, bool, bool]:
    before, ours, here = _run(stage, {}, precision)
    _, theirs, there = _run(stage, AS_DEEPSPEED_DOES, precision)
    equal = all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))
    return equal, here, there, any(torch.equal(a, b) for a, b in zip(before, ours, strict=True))


@pytest.mark.parametrize("precision", [{}, {"bf16": {"enabled": True}}, pytest.param(
    {"fp16": {"enabled": True, "loss_scale": 64}},
    marks=pytest.mark.skipif(not ON_GPU, reason="DeepSpeed has no fp16 on the CPU; DS_SEQPAR_TEST_DEVICE=cuda runs it"),
)])  # fmt: skip
@pytest.mark.parametrize("stage", [1, 2])
def test_weights_are_bit_for_bit_those_of_a_run_with_the_copies(stage: int, precision: dict[str, Any]) -> None:
    for equal, here, there, unchanged in run_ranks(2, _same, stage, precision):
        assert (equal, here, there, unchanged) == (True, True, False, False)


def _where(stage: int, named: dict[str, Any], by_hand: bool = False) -> tuple[int, int, bool]:
    """How many gradients backward made, how many of them are the ones that the optimizer will read, and whether buckets were made.

    `by_hand`: of two micro batches that the caller counts.
    """
    model = tiny("llama").train()
    engine = engine_for(
        model, torch.optim.AdamW(model.parameters()), {"tp_size": 2}, stage, 1, 1, zero_optimization={"stage": stage, **named}
    )  # fmt: skip
    made: list[Tensor] = []  # held, so that nothing else gets their memory
    buckets: list[bool] = []

    def look(parameter: Tensor) -> None:
        assert parameter.grad is not None
        made.append(parameter.grad.detach())

    look.takes_parts = True  # type: ignore[attr-defined]

    # Ours run first: DeepSpeed's hook on the same parameter comes after, and may put another tensor there.
    for parameter in engine.module.parameters():
        hooks = parameter._post_accumulate_grad_hooks or {}
        before = dict(hooks)
        hooks.clear()
        parameter.register_post_accumulate_grad_hook(look)
        for hook in before.values():
            parameter.register_post_accumulate_grad_hook(hook)
    plain = engine.optimizer.reduce_ipg_grads

    def reduce(*args: Any, **kwargs: Any) -> None:
        buckets.append(any(bucket.buffer for bucket in engine.optimizer.ipg_buckets.values()))
        plain(*args, **kwargs)

    engine.optimizer.reduce_ipg_grads = reduce
    micro_batches = batches(1 + by_hand, 1)
    for i, batch in enumerate(micro_batches):
        loss = engine(**batch).loss
        if by_hand:  # where accelerate does it
            engine.set_gradient_accumulation_boundary(i == len(micro_batches) - 1)
        engine.backward(loss)
    read = {grad.data_ptr() for group in engine.optimizer.averaged_gradients.values() for grad in group}
    return len(made), sum(grad.data_ptr() in read for grad in made), any(buckets)


@pytest.mark.parametrize("stage", [1, 2])
def test_they_are_the_tensors_that_backward_made(stage: int) -> None:
    for made, kept, buckets in run_ranks(2, _where, stage, {}):
        assert made == kept > 10 and not buckets
    for made, kept, buckets in run_ranks(2, _where, stage, AS_DEEPSPEED_DOES):
        assert made > kept == 0 and buckets, "this test can tell"


def _counted(accumulation: int) -> tuple[list[Tensor], list[str]]:
    """This rank's weights after two steps of three micro batches, which DeepSpeed counts or, where it was told of one, the caller."""
    model = tiny("llama").train()
    engine = engine_for(model, torch.optim.SGD(model.parameters(), lr=1.0), {"tp_size": 2}, 2, 1, accumulation)
    for i, batch in enumerate(batches(6, 1)):
        if accumulation == 1:
            engine.set_gradient_accumulation_boundary(i % 3 == 2)
        # DeepSpeed divides by the number that it knows.
        engine.backward(engine(**batch).loss / (3 // accumulation))
        if accumulation > 1 or i % 3 == 2:
            engine.step()
    return [p.detach().clone() for p in engine.module.parameters()], engine.seqpar_report.remarks


def _same_counted() -> tuple[float, list[str]]:
    (ours, remarks), (theirs, _) = _counted(1), _counted(3)
    return max(float((a - b).abs().max()) for a, b in zip(ours, theirs, strict=True)), remarks


def test_they_are_copied_from_where_the_caller_first_counts_micro_batches() -> None:
    for error, remarks in run_ranks(2, _same_counted):
        assert error < 1e-6
        assert sum("ZeRO copies the gradients from here on" in remark for remark in remarks) == 1
    for made, kept, buckets in run_ranks(2, _where, 2, {}, True):
        assert made > kept == 0 and buckets
    for made, kept, buckets in run_ranks(2, _where, 1, {}, True):  # autograd adds up, in what backward made
        assert made == kept > 10 and not buckets


def _remarks(world_tp: int, section: dict[str, Any], ds: dict[str, Any]) -> list[str]:
    model = tiny("llama").train()
    optimizer = torch.optim.AdamW(model.parameters())
    engine = engine_for(model, optimizer, {"tp_size": world_tp}, 1, 1, 1, zero_optimization=section, **ds)
    return [remark for remark in engine.seqpar_report.remarks if REMARK in remark]


@pytest.mark.parametrize(("world", "tp", "section", "ds"), [
    (4, 2, {"stage": 1}, {}),  # a data-parallel rank shares them
    (2, 2, {"stage": 1, **AS_DEEPSPEED_DOES}, {}),
    (2, 2, {"stage": 0}, {}),
    (2, 2, {"stage": 3}, {}),
    (2, 2, {"stage": 1}, {"bf16": {"enabled": True}, "data_types": {"grad_accum_dtype": "fp32"}}),
    (2, 2, {"stage": 2}, {"gradient_accumulation_steps": 2}),  # DeepSpeed adds into them
    (2, 2, {"stage": 1, "overlap_comm": True}, {"gradient_accumulation_steps": 2}),
    (2, 2, {"stage": 1}, {"managed_gradient_accumulation": False}),
    (2, 2, {"stage": 2, "offload_optimizer": {"device": "cpu"}}, {"zero_force_ds_cpu_optimizer": False}),
])  # fmt: skip
def test_deepspeed_keeps_them_wherever_more_is_asked_of_it(
    world: int, tp: int, section: dict[str, Any], ds: dict[str, Any]
) -> None:
    assert run_ranks(world, _remarks, tp, section, ds) == [[]] * world
    accumulation = ds.get("gradient_accumulation_steps", 1)
    assert not left_in_place({"zero_optimization": section, **ds}, world // tp, accumulation)


def _timers(named: dict[str, Any]) -> tuple[bool, bool]:
    model = tiny("llama").train()
    engine = engine_for(model, torch.optim.AdamW(model.parameters()), {"tp_size": 2}, 1, 1, 1, **named)
    remarked = any("throughput timer" in remark for remark in engine.seqpar_report.remarks)
    return engine.tput_timer.config.synchronized, remarked


@pytest.mark.parametrize(("named", "synchronized", "remarked"), [
    ({}, False, True),
    ({"timers": {"throughput": {"synchronized": True}}}, True, False),
    ({"timers": {"throughput": {"enabled": False}}}, True, False),
])  # fmt: skip
def test_the_throughput_timer_waits_only_where_the_user_names_it(
    named: dict[str, Any], synchronized: bool, remarked: bool
) -> None:
    assert run_ranks(2, _timers, named) == [(synchronized, remarked)] * 2
