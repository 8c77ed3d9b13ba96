"""Ten steps equal five, a checkpoint, a new process and five more, bit for bit; checkpoints that do not fit are refused."""

from __future__ import annotations

import itertools
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from deepspeed.ops.adam import DeepSpeedCPUAdam
from deepspeed.ops.op_builder import CPUAdamBuilder
from ranks import run_ranks
from training import engine_at, optimizer_states, random_draws, run, weights

DROPOUT = {"llama": {"attention_dropout": 0.1}, "gpt_neox": {"hidden_dropout": 0.1, "attention_dropout": 0.1}}


def _everything(engine: Any) -> dict[str, Any]:
    own = {"losses": run(engine, 5, 10), "draws": random_draws(), "lr": engine.get_lr(), "steps": engine.global_steps}
    return own | {"weights": weights(engine), "optimizer": optimizer_states(engine)}


def _first_half(settings: dict[str, Any], folder: str) -> dict[str, Any]:
    engine = engine_at(**settings)
    assert engine.zero_use_cpu_optimizer() == ("offload_optimizer" in settings.get("zero_optimization", {}))
    torch.manual_seed(7)
    run(engine, 0, 5)
    assert engine.save_checkpoint(folder, client_state={"position": 5})
    return _everything(engine)


def _second_half(settings: dict[str, Any], folder: str) -> dict[str, Any]:
    engine = engine_at(**settings, seed=1)  # other weights, so that what is not loaded shows
    torch.manual_seed(8)
    path, client_state = engine.load_checkpoint(folder)
    assert path is not None and client_state is not None
    assert client_state["position"] == 5 and "ds_seqpar" not in client_state
    return _everything(engine)


def _differences(ours: dict[str, Any], theirs: dict[str, Any]) -> list[str]:
    bad = [name for name in ("losses", "draws", "lr", "steps") if ours[name] != theirs[name]]
    for part in ("weights", "optimizer"):
        assert ours[part].keys() == theirs[part].keys()
        bad += [f"{part} {n}" for n, x in ours[part].items() if not torch.equal(x, theirs[part][n])]
    return bad


DTYPES = (torch.float32, torch.bfloat16)
CASES = [
    ("llama", 2, 1, 0, torch.float32),
    ("llama", 2, 2, 1, torch.float32),
    ("gpt_neox", 2, 1, 2, torch.float32),
    ("llama", 2, 1, 3, torch.float32),
    ("phi3", 2, 1, 2, torch.bfloat16),
]
ALL = [
    (family, 2, dp, stage, dtype)
    for family in ("llama", "gpt_neox")
    for dp in (1, 2)
    for stage in (0, 1, 2, 3)
    for dtype in DTYPES
] + [("qwen3", 4, 1, 3, torch.bfloat16), ("qwen3", 2, 2, 0, torch.bfloat16), ("llama", 1, 2, 1, torch.float32)]


def _check(tmp_path: Path, family: str, tp: int, dp: int, stage: int, dtype: torch.dtype, **ds: Any) -> None:
    settings = dict(family=family, tp=tp, stage=stage, dtype=dtype, own=DROPOUT.get(family), **ds)
    through = run_ranks(tp * dp, _first_half, settings, str(tmp_path))
    resumed = run_ranks(tp * dp, _second_half, settings, str(tmp_path))
    for rank, (a, b) in enumerate(zip(through, resumed, strict=True)):
        assert not _differences(a, b), f"rank {rank}: {_differences(a, b)}"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["global_step5", "latest"]


@pytest.mark.parametrize(("family", "tp", "dp", "stage", "dtype"), CASES)
def test_ten_steps_equal_five_and_five(
    tmp_path: Path, family: str, tp: int, dp: int, stage: int, dtype: torch.dtype
) -> None:
    _check(tmp_path, family, tp, dp, stage, dtype)


def _offloaded(stage: int) -> dict[str, Any]:
    zero = {"stage": stage, "offload_optimizer": {"device": "cpu"}}
    return {"zero_optimization": zero, "zero_force_ds_cpu_optimizer": False}


@pytest.mark.parametrize(
    ("dp", "stage", "dtype"),
    [
        (1, 2, torch.bfloat16),
        *(pytest.param(*case, marks=pytest.mark.slow) for case in itertools.product((1, 2), (1, 2, 3), DTYPES)),
    ],
)
def test_an_optimizer_on_the_host_comes_back(tmp_path: Path, dp: int, stage: int, dtype: torch.dtype) -> None:
    _check(tmp_path, "llama", 2, dp, stage, dtype, **_offloaded(stage))


@pytest.mark.slow
@pytest.mark.skipif(
    shutil.which("ninja") is None, reason="DeepSpeed compiles its optimizer: install ninja and a C++ compiler"
)
@pytest.mark.parametrize("stage", [2, 3])
def test_deepspeeds_own_host_optimizer_comes_back(tmp_path: Path, stage: int) -> None:
    CPUAdamBuilder().load(verbose=False)  # once, before the ranks
    _check(tmp_path, "llama", 2, 1, stage, torch.bfloat16, optimizer_class=DeepSpeedCPUAdam, **_offloaded(stage))


@pytest.mark.parametrize("stage", [1, 3])
def test_frozen_parameters_come_back(tmp_path: Path, stage: int) -> None:
    settings = dict(family="llama", tp=2, stage=stage, freeze=("embed", "q_proj", "layernorm"))
    through = run_ranks(2, _first_half, settings, str(tmp_path))
    resumed = run_ranks(2, _second_half, settings, str(tmp_path))
    assert not [d for a, b in zip(through, resumed, strict=True) for d in _differences(a, b)]


@pytest.mark.slow
@pytest.mark.parametrize(("family", "tp", "dp", "stage", "dtype"), ALL)
def test_ten_steps_equal_five_and_five_everywhere(
    tmp_path: Path, family: str, tp: int, dp: int, stage: int, dtype: torch.dtype
) -> None:
    _check(tmp_path, family, tp, dp, stage, dtype)
