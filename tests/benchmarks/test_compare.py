"""The benchmark itself: its commands run on gloo ranks, arms agree, a case that fails is a row, and rows that lie are void."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import time
import types
from pathlib import Path
from typing import Any

import compare
import pytest
from arms import ARMS, Arm
from harness.case import LLAMA_8B, Case
from harness.report import judge
from harness.trace import Activity, summarise

ROOT = Path(__file__).resolve().parents[2]
ON_THE_CPU = [
    "unsharded", "seqpar", "seqpar_overlap_off", "seqpar_tp_only", "autotp", "autotp_vocab", "ulysses", "ulysses_alst", "dtensor"
]  # fmt: skip


def run(script: str, *options: str, timeout: float = 400) -> str:
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}:{os.environ.get('PYTHONPATH', '')}"}
    command = [sys.executable, str(ROOT / "benchmarks" / script), "--tiny", *options]
    done = subprocess.run(command, capture_output=True, text=True, timeout=timeout, env=environment)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return done.stdout


def rows_of(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "cases.jsonl").read_text().splitlines()]


def test_all_arms_train_the_same_model(tmp_path: Path) -> None:
    text = run("compare.py", "--arms", *ON_THE_CPU, "--tokens", "64", "--out", str(tmp_path))
    rows = rows_of(tmp_path)
    assert [(row["arm"], row["status"]) for row in rows] == [(arm, "ok") for arm in ON_THE_CPU]
    first, second = rows[0]["losses"]
    assert second < first - 0.05, "one step must change the loss by far more than the tolerance"
    for row in rows:
        assert row["losses"] == pytest.approx([first, second], rel=1e-5)
        assert 0 < row["forward_ms"] <= row["fwd_bwd_ms"] <= row["step_ms"] and row["tokens_per_s_per_gpu"] > 0
    assert "void" not in text and "ds_seqpar, overlap off" in (tmp_path / "table.md").read_text()
    assert list(tmp_path.glob("compare_*.png"))


def test_full_recompute_and_a_failing_case_leave_the_others_alone(tmp_path: Path) -> None:
    options = ["--arms", "unsharded", "ulysses", "seqpar", "--tokens", "63", "--recompute", "none", "full"]
    run("compare.py", *options, "--out", str(tmp_path))
    rows = rows_of(tmp_path)
    assert [row["status"] for row in rows] == ["ok"] * 2 + ["crash"] * 2 + ["ok"] * 2
    assert "cannot cut 63 tokens" in rows[2]["error"]
    losses = [row["losses"] for row in rows if row["status"] == "ok"]
    assert all(loss == pytest.approx(losses[0], rel=1e-5) for loss in losses)


@pytest.mark.slow
@pytest.mark.skipif(
    importlib.util.find_spec("megatron") is None or importlib.util.find_spec("triton") is None,
    reason="needs megatron-core and triton installed",
)
def test_megatron_core_trains_the_same_model(tmp_path: Path) -> None:
    run("compare.py", "--arms", "unsharded", "megatron", "--recompute", "none", "full", "--out", str(tmp_path))
    rows = rows_of(tmp_path)
    assert [row["status"] for row in rows] == ["ok"] * 4
    assert all(row["losses"] == pytest.approx(rows[0]["losses"], rel=1e-5) for row in rows)


def test_ranks_are_laid_out_in_groups_where_the_arm_can(capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--tiny", "--ranks", "8", "--tp", "2", "8", "--zero", "1", "3", "--arms", "seqpar", "ulysses", "dtensor"]
    layouts = {
        arm: [(case.tp, case.zero) for case in cases] for arm, cases in compare.cases_of(compare.parse(options)).items()
    }
    groups = [(2, 1), (2, 3), (8, 1), (8, 3)]
    assert layouts == {"seqpar": groups, "ulysses": [(2, 1), (8, 1)], "dtensor": [(8, 1)]}
    with pytest.raises(SystemExit):
        compare.parse(["--ranks", "8", "--tp", "3"])
    assert "--tp [3]: 8 ranks do not divide into groups of so many" in capsys.readouterr().err


@pytest.mark.slow
def test_groups_beside_each_other_train_the_same_model(tmp_path: Path) -> None:
    arms = ["unsharded", "seqpar", "autotp", "ulysses", "ulysses_alst", "zero3"]
    run("compare.py", "--ranks", "4", "--tp", "2", "4", "--zero", "1", "3", "--arms", *arms, "--out", str(tmp_path))
    rows = rows_of(tmp_path)
    assert [row["status"] for row in rows] == ["ok"] * (1 + 4 + 4 + 2 + 2 + 1)
    assert {(row["arm"], row["tp"]): row["sequences"] for row in rows if row["arm"] in ("seqpar", "ulysses", "zero3")} == {
        ("seqpar", 2): 2, ("seqpar", 4): 1, ("ulysses", 2): 2, ("ulysses", 4): 1, ("zero3", 4): 4,
    }  # fmt: skip
    assert all(row["losses"] == pytest.approx(rows[0]["losses"], rel=1e-5) for row in rows)


@pytest.mark.slow
def test_compiled_layers_train_the_same_model(tmp_path: Path) -> None:
    run("compare.py", "--arms", "unsharded", "dtensor_compiled", "--limit", "300", "--out", str(tmp_path), timeout=700)
    rows = rows_of(tmp_path)
    assert [row["status"] for row in rows] == ["ok"] * 2
    assert rows[1]["losses"] == pytest.approx(rows[0]["losses"], rel=1e-5)


@pytest.mark.slow
def test_a_step_can_be_profiled(tmp_path: Path) -> None:
    text = run("profile_step.py", "--arm", "seqpar", "--out", str(tmp_path))
    assert "host operators" in text and "aten::mm" in text
    assert json.loads((tmp_path / "profile.jsonl").read_text())["arm"] == "seqpar"


@pytest.mark.slow
def test_parts_are_measured(tmp_path: Path) -> None:
    run("parts.py", "--out", str(tmp_path))
    lines = [json.loads(line) for line in (tmp_path / "parts.jsonl").read_text().splitlines()]
    assert {line["part"] for line in lines} == {"collectives", "peer", "gemm", "attention", "hidden", "exposed"}
    exposed = lines[-1]
    assert exposed["transfers"] >= 2 * (2 * 2 + 2 * 2 + 2) and exposed["without_ms"] < exposed["with_ms"]


def test_steps_are_one_number_or_one_a_length(capsys: pytest.CaptureFixture[str]) -> None:
    assert compare.parse([]).steps == {8192: 5, 32768: 5}
    assert compare.parse(["--tokens", "4096", "512", "--steps", "2", "7"]).steps == {4096: 2, 512: 7}
    with pytest.raises(SystemExit):
        compare.parse(["--tokens", "512", "--steps", "2", "7"])
    assert "--steps [2, 7]: give one number, or one for each of --tokens [512]" in capsys.readouterr().err


def case(arm: str, tokens: int = 64) -> Case:
    return Case(arm, tokens, 2, "default", "none", "float32", tiny=True)


def run_fake(monkeypatch: pytest.MonkeyPatch, folder: Path, build: Any, cases: list[Case], limit: float) -> Any:
    """The rows of an arm whose `build` is given."""
    module = types.ModuleType("arms.fake")
    module.build = build  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "arms.fake", module)
    monkeypatch.setitem(ARMS, "fake", Arm("fake", "fake"))
    (folder / "logs").mkdir()
    args = types.SimpleNamespace(out=folder, ranks=2, limit=limit, steps={case.tokens: 1 for case in cases})
    return list(compare.run_arm("fake", cases, args))


def test_a_hanging_case_ends_at_the_limit(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    begin = time.monotonic()
    rows = run_fake(monkeypatch, tmp_path, lambda case: time.sleep(1000), [case("fake")], limit=2.0)
    assert [row["status"] for row in rows] == ["timeout"] and time.monotonic() - begin < 60


def test_a_case_larger_than_one_without_memory_is_not_tried(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def build(case: Case) -> None:
        raise RuntimeError("CUDA out of memory. Tried to allocate 1 GiB" if case.tokens == 128 else "something else")

    cases = [case("fake", 64), case("fake", 128), case("fake", 256)]
    rows = run_fake(monkeypatch, tmp_path, build, cases, limit=60.0)
    assert [row["status"] for row in rows] == ["crash", "oom", "oom"]
    assert rows[0]["error"].endswith("something else") and rows[2]["error"].startswith("not run")


def row(arm: str, losses: list[float], **own: Any) -> dict[str, Any]:
    return {**vars(case(arm)), "status": "ok", "losses": losses, **own}


def test_a_row_with_other_losses_is_void() -> None:
    rows = [
        row("unsharded", [6.0, 5.9]),
        row("seqpar", [6.0, 5.9001]),
        row("autotp", [6.0, 5.95]),
        row("dtensor", [6.1, 5.9]),
        row("megatron", [float("nan"), 5.9]),
        row("ulysses", [7.0, 6.9], tokens=128),
    ]
    judge(rows)
    assert [r["status"] for r in rows] == ["ok", "ok", "void", "void", "void", "ok"]
    assert rows[2]["error"] == "loss 2 is 5.95000, not 5.90000"


def test_without_the_unsharded_model_the_median_is_the_measure() -> None:
    rows = [row("seqpar", [6.0, 5.9]), row("autotp", [6.0, 5.9]), row("dtensor", [6.2, 5.9])]
    judge(rows)
    assert [r["status"] for r in rows] == ["ok", "ok", "void"]


def test_model_flops_count_causal_attention_half_and_recompute_not() -> None:
    one = Case("seqpar", 8192, 8, "cudnn", "none", "bfloat16")
    linears = 8 * (4096 * 4096 * 2 + 2 * 4096 * 1024 + 3 * 4096 * 14336) + 128256 * 4096
    attention = 8 * 3 * 2 * 2 * 8192**2 * 4096 / 2  # layers x (forward + 2 backward) x two products x 2 FLOPs, half
    assert LLAMA_8B.matrix_parameters(8) == linears
    assert one.model_flops() == pytest.approx(6 * linears * 8192 + attention)
    assert Case("seqpar", 8192, 8, "cudnn", "full", "bfloat16").model_flops() == one.model_flops()


def test_time_lines_give_exposed_communication_and_idle_time() -> None:
    activities = [
        Activity("nvjet_gemm", "kernel", 0, 100, 7),
        Activity("ncclDevKernel_AllGather", "kernel", 50, 100, 9),  # 50 beside the product, 50 alone
        Activity("cudnn_sdpa_sm90_flash_fprop", "kernel", 150, 100, 7),
        Activity("Memcpy DtoD", "gpu_memcpy", 160, 40, 11),  # hidden
        Activity("vectorized_elementwise_kernel", "kernel", 300, 20, 7),  # after 50 of nothing
    ]
    found = summarise(activities)
    assert found["span"] == pytest.approx(0.32) and found["idle"] == pytest.approx(0.05)
    assert found["communication"] == pytest.approx(0.14) and found["exposed"] == pytest.approx(0.05)
    assert found["hidden_share"] == pytest.approx(90 / 140)
    kinds = {"GEMM": 0.1, "NCCL": 0.1, "attention": 0.1, "peer copies": 0.04, "elementwise": 0.02}
    assert found["classes"] == pytest.approx(kinds)
    assert found["gaps"][0]["us"] == pytest.approx(50) and found["gaps"][0]["before"].startswith("vectorized")
