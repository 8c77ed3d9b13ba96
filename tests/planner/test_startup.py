"""A run says how its memory compares with the plan, and warns where they are more than 10 % apart."""

from __future__ import annotations

import copy
import functools
import json
import logging
import subprocess
import sys
import time
from typing import Any

import deepspeed
import pytest
import torch
import torch.distributed as dist
from exactness import engine_for, fresh_groups
from models import batches, tiny
from ranks import ON_GPU, run_ranks

from ds_seqpar.config import SeqParConfig
from ds_seqpar.engine import watches
from ds_seqpar.planner import startup
from ds_seqpar.planner.memory import Zero, estimate
from ds_seqpar.planner.startup import MemoryCheck, predict_memory, question_of
from ds_seqpar.planner.step import trace_step

pytestmark = pytest.mark.skipif(ON_GPU, reason="the allocator's figures are played by the test")
KEY = {"tp_size": 2, "recompute": "selective"}
BATCH, SEQ, START = 2, 7, 5_000_000


class _Played:
    """An allocator that reaches what it is told to in forward."""

    def __init__(self, held: int, peak: int) -> None:
        self.held, self.highest, self.calls = held, peak, 0

    def allocated(self) -> int:
        self.calls += 1
        return START + (self.held if self.calls % 2 == 0 else 0)

    def peak(self) -> int:
        return self.highest if self.calls else START


class _Lines(logging.Handler):
    def __init__(self) -> None:
        super().__init__()
        self.found: list[tuple[int, str]] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.found.append((record.levelno, record.getMessage()))


def _train(
    cases: list[tuple[int, int, dict[str, Any]]], answer: dict[str, int]
) -> list[tuple[list[tuple[int, str]], list[str], int]]:
    """For each (held, peak, key) the log's lines about memory, and the Report's, of steps until the comparison is there.

    Third, how many meters were asked for: a comparison that is off logs nothing either way before its child has answered.
    The first case's child imports and plans, which takes it ten seconds; the others' only say the `answer`.
    """
    found = []
    meters: list[_Played] = []

    def meter(held: int, peak: int) -> _Played:
        meters.append(_Played(held, peak))
        return meters[-1]

    logging.getLogger("ds_seqpar").setLevel(logging.INFO)
    for held, peak, key in cases:
        meters.clear()
        watches.memory_meter = functools.partial(meter, held, peak)  # type: ignore[assignment]
        lines = _Lines()
        logging.getLogger("ds_seqpar").addHandler(lines)
        model = tiny("llama").train()
        # With the copies, whose bucket is large beside what counts as a difference.
        engine = engine_for(
            model, torch.optim.AdamW(model.parameters(), lr=1e-3), {**KEY, **key}, 1, BATCH, 1,
            zero_optimization={"stage": 1, "contiguous_gradients": True},
        )  # fmt: skip
        deadline = time.monotonic() + (90 if key.get("memory_check", True) else 0)
        said = torch.zeros(1)
        step = 0
        while not said:
            loss = engine(**batches(1, BATCH, SEQ)[0]).loss
            engine.backward(loss)
            engine.step()
            step += 1
            over = any("memory" in text for _, text in lines.found) and step >= 2
            said.fill_(float(over or (time.monotonic() > deadline and step >= 3)))
            dist.broadcast(said, 0)
            time.sleep(0 if step < 3 else 0.2)
        startup._ask = functools.partial(_answered, answer)
        found.append(
            (
                [x for x in lines.found if "memory" in x[1]],
                [r for r in engine.seqpar_report.remarks if "memory" in r],
                len(meters),
            )
        )
        logging.getLogger("ds_seqpar").removeHandler(lines)
        engine.destroy()
    return found


def _answered(answer: dict[str, int], question: dict[str, Any]) -> subprocess.Popen[str]:
    assert question["seq"] == SEQ
    says = f"print({startup.ANSWER + json.dumps(answer)!r})"
    return subprocess.Popen([sys.executable, "-c", says], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def _planned(in_place: bool) -> tuple[int, int]:
    model = tiny("llama")
    trace = trace_step(
        copy.deepcopy(model.config),
        SeqParConfig.from_json(KEY),
        batch=BATCH,
        seq=SEQ,
        dtype=torch.float32,
        on_gpu=False,
    )
    memory = estimate(trace, Zero(stage=1, masters=False, in_place=in_place), dp_size=1)
    return memory.held_bytes, max(memory.peak, memory.peak_step)


def test_the_second_step_is_compared_with_the_plan_and_a_difference_warns() -> None:
    held, peak = _planned(in_place=False)
    cases = [
        (round(held * 1.05), peak, {}),
        (held, peak * 2, {}),
        (held, peak, {"memory_check": False}),
        (held, START, {}),
    ]
    first, others = run_ranks(2, _train, cases, {"held": held, "peak": peak})
    (close, noted, asked), (far, _, _), (off, _, asked_though_off), (early, _, _) = first
    assert [level for level, _ in close] == [logging.INFO] and "planned" in close[0][1]
    assert "(+5.0%)" in close[0][1] and "(+0.0%)" in close[0][1] and noted[0] in close[0][1]
    assert [level for level, _ in far] == [logging.INFO, logging.WARNING] and "(+100.0%)" in far[1][1]
    assert off == [] and (asked, asked_though_off) == (1, 0)
    assert "peak below" in early[0][1]
    assert all(lines == [] and not asked for lines, _, asked in others)


def test_the_question_of_a_run_holds_everything_that_its_memory_depends_on() -> None:
    model = tiny("llama")
    config = SeqParConfig.from_json(KEY)
    ds_config = {"zero_optimization": {"stage": 1}, "gradient_accumulation_steps": 1, "ds_seqpar": KEY}
    question = question_of(model, config, ds_config, 1, False) | {"batch": BATCH, "seq": SEQ}
    held, peak = _planned(in_place=True)
    assert predict_memory(question) == {"held": held, "peak": peak}
    assert predict_memory({**question, "seq": 2 * SEQ})["held"] > held
    copies = {"stage": 1, "contiguous_gradients": True, "reduce_bucket_size": 8}
    fewer, more = (
        predict_memory({**question, "ds_config": {"zero_optimization": {**copies, "reduce_bucket_size": size}}})["peak"]
        for size in (8, 10**6)
    )
    assert peak < fewer < more
    for named in ({"data_types": {"grad_accum_dtype": "fp32"}}, {"managed_gradient_accumulation": False}):
        copied = question_of(model, config, {**ds_config, **named}, 1, False) | {"batch": BATCH, "seq": SEQ}
        assert predict_memory(copied)["peak"] > peak


def _asked_of_a_run() -> dict[str, Any] | None:
    """The DeepSpeed sections that a run of four micro batches, which its JSON does not count, asks its plan with."""
    asked: list[dict[str, Any]] = []

    def question(model: Any, config: Any, ds_config: dict[str, Any], *more: Any) -> dict[str, Any]:
        asked.append(ds_config)
        return question_of(model, config, ds_config, *more)

    watches.question_of = question  # type: ignore[attr-defined]
    watches.memory_meter = functools.partial(_Played, 0, 0)  # type: ignore[assignment]
    fresh_groups()
    model = tiny("llama").train()
    ds_config = {
        "train_batch_size": 4 * BATCH, "train_micro_batch_size_per_gpu": BATCH, "zero_optimization": {"stage": 2},
        "zero_allow_untested_optimizer": True, "ds_seqpar": KEY,
    }  # fmt: skip
    deepspeed.initialize(model=model, optimizer=torch.optim.AdamW(model.parameters()), config=ds_config)
    return asked[0] if asked else None


def test_a_run_is_planned_with_the_accumulation_that_its_batch_sizes_give() -> None:
    asked, others = run_ranks(2, _asked_of_a_run)
    assert asked["gradient_accumulation_steps"] == 4 and others is None


def test_batches_without_tokens_are_said_not_to_be_compared() -> None:
    told: list[str] = []
    engine = torch.nn.Linear(2, 2)
    check = MemoryCheck(engine, {}, _Played(0, 0), told.append)
    engine(torch.zeros(1, 2, 2))
    assert check.done and "no input_ids" in told[0]
