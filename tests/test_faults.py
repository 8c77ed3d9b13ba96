"""Whatever happens to one rank: every process ends in bounded time and says why, files stay whole, and the run resumes."""

from __future__ import annotations

import time
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator
from exactness import engine_for
from faults import STEPS, train
from models import batches, tiny
from ranks import ON_GPU, RankError, run_ranks
from torch import Tensor

SECONDS = 60.0
PLACES = ("forward", "backward", "step", "save")
UNDISTURBED: dict[tuple[int, int], list[list[float]]] = {}


def _undisturbed(tmp_path: Path, stage: int, world: int = 2, **ds: Any) -> list[list[float]]:
    if (stage, world) not in UNDISTURBED:
        folder = str(tmp_path / "undisturbed")
        UNDISTURBED[stage, world] = run_ranks(world, partial(train, folder, stage=stage, **ds))
    return UNDISTURBED[stage, world]


def _struck(
    tmp_path: Path, where: str, fault: str, stage: int = 1, world: int = 2, aborts: bool = False, **ds: Any
) -> list[str]:
    """What each rank said at the end. Fails if a rank did not end, and if the run does not resume to the same losses."""
    folder = str(tmp_path / "run")
    if where == "load":
        run_ranks(world, partial(train, folder, stage=stage, **ds))
    begun = time.monotonic()
    with pytest.raises(RankError) as caught:
        run = partial(train, folder, where, fault, resume=where == "load", stage=stage, aborts=aborts, **ds)
        run_ranks(world, run, timeout=SECONDS)
    assert time.monotonic() - begun < SECONDS
    errors = [str(error) for error in caught.value.errors]
    assert not any(error.endswith("hang") for error in errors), f"a rank did not end: {errors}"
    expected = _undisturbed(tmp_path, stage, world, **ds)
    resumed = run_ranks(world, partial(train, folder, resume=True, stage=stage, **ds))
    for mine, theirs in zip(resumed, expected, strict=True):
        assert 2 <= STEPS - len(mine) <= 5 and mine == theirs[STEPS - len(mine) :]
    return errors


def _says_where_to_look(error: str, where: str, rank: int = 0) -> None:
    lines = [line for line in error.splitlines() if "RankLostError" in line]
    assert lines, f"rank {rank} ended without a word of ours: {error}"
    assert f"rank {rank} stopped in" in lines[-1]
    assert "another rank ended, raised an error, or did not arrive within 4 s" in lines[-1]
    if where == "forward" and not ON_GPU:  # a GPU is waited for later
        assert "in forward, step 5" in lines[-1]


@pytest.mark.parametrize("where", ["forward", "save"])
def test_a_killed_rank(tmp_path: Path, where: str) -> None:
    survivor, killed = _struck(tmp_path, where, "killed")
    assert killed == "exit code -9"
    _says_where_to_look(survivor, where)


@pytest.mark.slow
@pytest.mark.parametrize("where", ["backward", "step"])
def test_a_rank_killed_elsewhere(tmp_path: Path, where: str) -> None:
    survivor, killed = _struck(tmp_path, where, "killed")
    assert killed == "exit code -9"
    _says_where_to_look(survivor, where)


@pytest.mark.slow
@pytest.mark.parametrize("where", PLACES)
@pytest.mark.parametrize("stage", [0, 2, 3])
def test_a_rank_killed_at_another_stage(tmp_path: Path, where: str, stage: int) -> None:
    survivor, killed = _struck(tmp_path, where, "killed", stage)
    assert killed == "exit code -9"
    _says_where_to_look(survivor, where)


PERSISTENT = {"zero_optimization": {"stage": 3}}
"""ZeRO-3 as it is by default: small parameters are gathered at the end of a save or load."""


@pytest.mark.parametrize(
    ("where", "stage", "world", "fault"),
    [
        ("save", 1, 2, "killed"),
        ("save", 3, 4, "killed"),
        pytest.param("save", 0, 2, "killed", marks=pytest.mark.slow),
        pytest.param("load", 3, 4, "killed", marks=pytest.mark.slow),
        pytest.param("save", 1, 2, "stalls", marks=pytest.mark.slow),
        pytest.param("save", 3, 4, "stalls", marks=pytest.mark.slow),
        pytest.param("load", 3, 4, "stalls", marks=pytest.mark.slow),
    ],
)
def test_a_rank_is_lost_where_a_wait_of_deepspeeds_would_abort(
    tmp_path: Path, where: str, stage: int, world: int, fault: str
) -> None:
    """Over NCCL, torch's watchdog ends the process of whoever waits in DeepSpeed's own save; ours must notice before."""
    errors = _struck(tmp_path, where, fault, stage, world, aborts=True, **(PERSISTENT if stage == 3 else {}))
    for rank, error in enumerate(errors):
        if rank != 1:
            _says_where_to_look(error, where, rank)
            assert f"stopped in {where}_checkpoint" in error


@pytest.mark.slow
@pytest.mark.parametrize("where", PLACES)
@pytest.mark.parametrize("fault", ["raises", "out of memory", "stalls"])
def test_a_rank_that_raises_runs_out_of_memory_or_stalls(tmp_path: Path, where: str, fault: str) -> None:
    waiting, struck = _struck(tmp_path, where, fault)
    if fault != "stalls":
        own = {"raises": "the user's own mistake", "out of memory": "CUDA out of memory"}[fault]
        assert own in struck, struck
    if not (where == "save" and own in waiting if fault != "stalls" else False):
        _says_where_to_look(waiting, where)


def test_a_stalled_rank_is_given_up(tmp_path: Path) -> None:
    waiting, _ = _struck(tmp_path, "backward", "stalls")
    _says_where_to_look(waiting, "backward")


class _Bad:
    """Puts a value that is no number into one rank's gradient of an activation, in one step."""

    def __init__(self, value: float, at: int) -> None:
        self.value, self.at, self.step = value, at, 0

    def __call__(self, grad: Tensor) -> Tensor:
        if self.step == self.at and dist.get_rank() == 1:
            grad = grad.clone()
            grad.view(-1)[0] = self.value
        return grad


def _overflow(stage: int, dtype: torch.dtype, value: float, module: str) -> list[Any]:
    """[steps skipped, losses, loss scale] of a run in half precision in which a gradient on one rank overflows once."""
    torch.manual_seed(0)
    model = tiny("llama", dtype=dtype).train()
    bad = _Bad(value, 1)
    options: dict[str, Any] = {"gradient_clipping": 1.0 if stage else 0.0}
    if dtype == torch.float16:
        options["fp16"] = {"enabled": True, "initial_scale_power": 8, "hysteresis": 1}
    else:
        options["bf16"] = {"enabled": True}
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, eps=1e-4)
    engine = engine_for(model, optimizer, {"tp_size": 2}, stage, 1, 1, **options)
    engine.module.get_submodule(module).register_forward_hook(lambda m, args, y: y.register_hook(bad) and None)
    seen, losses = [], []
    for bad.step, batch in enumerate(batches(4, 1)):
        loss = engine(**batch).loss
        losses.append(float(loss.detach()))
        engine.backward(loss)
        engine.step()
        seen.append([float(x.float().abs().sum()) for x in _weights(engine)])
    assert seen[1] == seen[0], "a parameter moved in a step that overflowed"
    assert seen[2] != seen[1]
    skipped, scale = (
        int(engine.skipped_steps),
        float(getattr(engine.optimizer, "cur_scale", engine.optimizer.loss_scale)),
    )
    engine.destroy()
    return [skipped, losses, scale]


def _weights(engine: Any) -> list[Tensor]:
    """What this rank holds of every parameter."""
    return [getattr(p, "ds_tensor", p).detach() for p in engine.module.parameters()]


def _overflows(stages: tuple[int, ...], dtype: torch.dtype) -> list[Any]:
    if dtype == torch.float16:  # DeepSpeed does not offer it on the CPU; torch computes in it there
        device = get_accelerator()
        device.is_fp16_supported = lambda: True
        device.supported_dtypes = lambda: [torch.float32, torch.bfloat16, torch.float16]
    places = ("model.layers.1.post_attention_layernorm", "model.layers.0.input_layernorm")
    values = (float("inf"), float("nan"))
    return [_overflow(stage, dtype, v, place) for stage in stages for v, place in zip(values, places, strict=True)]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_gradient_that_is_no_number_on_one_rank_skips_the_step_on_all(dtype: torch.dtype) -> None:
    first, second = run_ranks(2, _overflows, (0, 1, 2, 3), dtype, timeout=120)
    assert first == second, "the ranks went different ways"
    for skipped, losses, scale in first:
        assert skipped == 1 and all(loss == loss for loss in losses)
        assert scale == (2.0**7 if dtype == torch.float16 else 1.0), "the loss scale is halved, on all ranks alike"
