"""`"replica_check_interval": N`: replicas that have come apart stop every rank, and the error says what, when and where."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from exactness import engine_for
from models import batches, tiny
from ranks import run_ranks
from replicas import KEY, train_with_checks


def _first_norm(engine: Any) -> torch.nn.Parameter:
    return engine.module.get_parameter("model.layers.0.input_layernorm.weight")  # type: ignore[no-any-return]


def _harm_parameter(engine: Any) -> None:
    _first_norm(engine).data.view(torch.int32)[3] ^= 1


def _harm_copied_heads(engine: Any) -> None:
    engine.module.get_parameter("model.layers.1.self_attn.k_proj.weight").data[0, 0] += 1.0


def _harm_moment(engine: Any) -> None:
    parameter, stage = _first_norm(engine), engine.zero_optimization_stage()
    if stage == 0:
        engine.optimizer.state[parameter]["exp_avg_sq"][3] *= 1.5
    elif stage == 3:
        from deepspeed.utils import safe_get_local_optimizer_state

        safe_get_local_optimizer_state(parameter, "exp_avg_sq")[3] *= 1.5
    else:
        parameter._hp_mapping.optim_fragment["exp_avg_sq"][3] *= 1.5  # type: ignore[attr-defined]


def _harm_random(engine: Any) -> None:
    torch.rand(())


def _stages(harm: Callable[[Any], None] | None, stages: tuple[int, ...]) -> list[str]:
    lr = 0.0 if harm is _harm_moment else 1e-3  # so that the parameter stays as it is and the moment alone can tell
    return [train_with_checks(stage, harm, lr=lr) for stage in stages]


@pytest.mark.parametrize("tp_dp", [4, pytest.param(2, marks=pytest.mark.slow)])
def test_a_sound_run_is_not_stopped(tp_dp: int) -> None:
    for outcome in run_ranks(tp_dp, _stages, None, (0, 1, 2, 3)):
        assert outcome == ["trained"] * 4


@pytest.mark.parametrize(
    ("harm", "stages", "what"),
    [
        (_harm_moment, (0, 1, 2, 3), "exp_avg_sq of model.layers.0.input_layernorm.weight"),
        (_harm_parameter, (0,), "model.layers.0.input_layernorm.weight"),
        (_harm_copied_heads, (0,), "model.layers.1.self_attn.k_proj.weight"),
        (_harm_random, (0, 3), "the state of the CPU's random numbers"),
    ],
)  # fmt: skip
def test_what_came_apart_is_named_with_the_step_and_both_ranks(harm: Any, stages: tuple[int, ...], what: str) -> None:
    for outcome in run_ranks(2, _stages, harm, stages, timeout=200):
        for message in outcome:
            assert "after step 4" in message and "between rank 0 and rank 1" in message and what in message


def test_a_difference_stops_the_ranks_of_every_group() -> None:
    outcomes = run_ranks(4, _stages, _harm_parameter, (0,), timeout=200)
    assert "between rank 0 and rank 1" in outcomes[0][0] and outcomes[0] == outcomes[1]
    assert (
        outcomes[2]
        == outcomes[3]
        == ["after step 4 replicas differ in another tensor-parallel group; its ranks name them"]
    )


def _seeded_apart() -> tuple[str, list[str]]:
    torch.manual_seed(dist.get_rank())
    state = torch.get_rng_state()
    model = tiny("qwen2")
    torch.set_rng_state(state)
    engine = engine_for(model, torch.optim.SGD(model.parameters(), lr=0.1), KEY, 1, 1, 1)
    for batch in batches(3, 1):
        engine.backward(engine(**batch).loss)
        engine.step()
    return "trained", engine.seqpar_report.remarks


def test_ranks_seeded_apart_are_said_and_not_an_error() -> None:
    for outcome, remarks in run_ranks(2, _seeded_apart):
        assert outcome == "trained"
        assert any("random streams are not compared" in remark for remark in remarks)
